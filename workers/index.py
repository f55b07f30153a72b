"""The index of a dataset shard: whose rows are whose, and the bytes that every later phase must find again.

Suffixes: C = rows of the dataset shard, N = samples.
"""

from collections.abc import Callable

import numpy as np

from statsvc.arrays import write_chunk
from statsvc.backends import Backend
from statsvc.canonical import sha256
from statsvc.checksum import CRC_NBYTES, crc32c
from statsvc.dataset.shards import ShardSummary
from statsvc.errors import ShardChanged, ShardTooLarge
from statsvc.index import read_summary
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


def lost_numbers(
    names: list[str],
    known: dict[str, int],
    rows_per_shard: int,
    per_image: int,
    backend: Backend,
    scan: Callable[[str], ShardSummary | None],
) -> dict[str, int]:
    """The numbers that dataset shards without an index had before it was lost.

    By the summary of the index, or else by the hashes of their keys: for those the dataset shards are read, first the
    ones that would get these numbers anyway.
    """
    new, taken = set(names), set(known.values())
    found = {entry.name: n for n, entry in read_summary(backend).items() if entry.name in new and n not in taken}
    taken |= set(found.values())
    left = {
        shard: hashes
        for folder in backend.list("samples/key_hash/c")
        if folder.isdecimal() and (shard := int(folder)) not in taken
        and (hashes := _digest_of_rows(backend, shard, rows_per_shard)) is not None
    }  # fmt: skip
    likely = number(names, known | found)
    for name in sorted(new - found.keys(), key=lambda name: (likely[name] not in left, name)):
        if not left:
            break
        summary = scan(name)
        if summary is None or summary.samples * per_image > rows_per_shard:
            continue
        digest = sha256(hashes_of_rows(summary, rows_per_shard, per_image).tobytes())
        alike = sorted((shard for shard in left if left[shard] == digest), key=lambda n: (n != likely[name], n))
        if alike:
            found[name] = alike[0]
            del left[alike[0]]
    return found


def _digest_of_rows(backend: Backend, shard: int, rows_per_shard: int) -> str | None:
    """Of the hashes that are left of a dataset shard without an index commit; None where they are damaged."""
    spec = sample_arrays(rows_per_shard)["key_hash"]
    try:
        data = backend.read(spec.object(shard))
    except FileNotFoundError:
        return None
    content, seal = data[:-CRC_NBYTES], data[-CRC_NBYTES:]
    if len(content) != rows_per_shard * spec.row_nbytes or crc32c(content).to_bytes(4, "little") != seal:
        return None
    return sha256(content) if any(content) else None


def printable(text: str) -> str:
    """Text that JSON can hold and a terminal does not obey: tar names may be any bytes."""
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in whole)


def number(names: list[str], known: dict[str, int]) -> dict[str, int]:
    """A number for every dataset shard: known ones keep theirs, the others take the free ones in sorted order."""
    taken = set(known.values())
    free = (n for n in range(len(names) + len(known)) if n not in taken)
    return known | {name: next(free) for name in sorted(names) if name not in known}
