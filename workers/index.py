"""The index of a dataset shard: whose rows are whose, and the bytes that every later phase must find again.

Suffixes: C = rows of the dataset shard, N = samples.
"""

import numpy as np

from statsvc.arrays import write_chunk
from statsvc.backends import Backend
from statsvc.dataset.shards import ShardSummary
from statsvc.errors import ShardChanged, ShardTooLarge
from statsvc.layout import sample_arrays
from statsvc.ledger import Commit, Failure, Ledger

RESTORE = "restore the file (of a folder: all its files, and data.images_per_shard), or give the new one another name"


def index_shard(
    shard: int, name: str, summary: ShardSummary, rows_per_shard: int, per_image: int, backend: Backend, ledger: Ledger
) -> None:
    """Commit the index of a dataset shard that was read to its end, or check it against the one there is.

    per_image  views of each image, and so rows of each sample

    Raises ShardChanged where the dataset shard does not hold what was indexed, ShardTooLarge where it has more
    samples than there are rows for.
    """
    known = ledger.read("index", shard)
    if known is not None:
        if (known.samples, known.size, known.etag) != (summary.samples, summary.size, summary.etag):
            raise ShardChanged(
                f"dataset shard {name} has changed since it was indexed: {summary.size} bytes with {summary.etag}, "
                f"then {known.size} bytes with {known.etag}; {RESTORE}"
            )
        return
    rows = summary.samples * per_image
    if rows > rows_per_shard:
        raise ShardTooLarge(
            f"dataset shard {name} holds {summary.samples} samples, this store keeps "
            f"{rows_per_shard // per_image} of each; put it in a store made with data.rows_per_shard: "
            f"{summary.samples}"
        )
    hash_C16 = np.zeros((rows_per_shard, 16), np.uint8)
    if summary.key_hashes:
        hash_N16 = np.frombuffer(b"".join(summary.key_hashes), np.uint8).reshape(-1, 16)
        hash_C16[:rows] = np.repeat(hash_N16, per_image, axis=0)
    record = write_chunk(backend, sample_arrays(rows_per_shard)["key_hash"], shard, hash_C16)
    ledger.write(
        Commit(
            phase="index",
            shard=shard,
            name=name,
            samples=summary.samples,
            size=summary.size,
            etag=summary.etag,
            rows=rows,
            failed=tuple(Failure(printable(p.key), p.position, printable(p.reason)) for p in summary.problems),
            objects=(record,),
        )
    )


def printable(text: str) -> str:
    """Text that JSON can hold and a terminal does not obey: tar names may be any bytes."""
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)


def number(names: list[str], known: dict[str, int]) -> dict[str, int]:
    """A number for every dataset shard: known ones keep theirs, the others take the free ones in sorted order."""
    taken = set(known.values())
    free = (n for n in range(len(names) + len(known)) if n not in taken)
    return known | {name: next(free) for name in sorted(names) if name not in known}
