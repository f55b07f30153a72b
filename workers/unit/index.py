"""The index of a dataset shard: whose rows are whose, and the bytes that every later phase must find again.

Suffixes: C = rows of the dataset shard, N = samples.
"""

import numpy as np

from statsvc.dataset.shards import ShardSummary
from statsvc.errors import ShardChanged, ShardTooLarge
from statsvc.storage.backend import Backend
from statsvc.store.arrays import write_chunk
from statsvc.store.commits import Commit, Failure, Ledger
from statsvc.store.layout import sample_arrays

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
    hash_C16 = hashes_of_rows(summary, rows_per_shard, per_image)
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


def hashes_of_rows(summary: ShardSummary, rows_per_shard: int, per_image: int) -> np.ndarray:
    """uint8 [C, 16]: of each row the hash of its sample's key, zero where there is no such sample."""
    hash_C16 = np.zeros((rows_per_shard, 16), np.uint8)
    if summary.key_hashes:
        hash_N16 = np.frombuffer(b"".join(summary.key_hashes), np.uint8).reshape(-1, 16)
        hash_C16[: len(hash_N16) * per_image] = np.repeat(hash_N16, per_image, axis=0)
    return hash_C16


def printable(text: str) -> str:
    """Text that JSON can hold and a terminal does not obey: tar names may be any bytes."""
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)
