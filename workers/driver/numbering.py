"""The number of each dataset shard in a store."""

from collections.abc import Callable

from statsvc.dataset.shards import ShardSummary
from statsvc.digests import CRC_NBYTES, crc32c, sha256
from statsvc.storage.backend import Backend
from statsvc.store.index import read_summary
from statsvc.store.layout import sample_arrays
from workers.unit.index import hashes_of_rows


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


def number(names: list[str], known: dict[str, int]) -> dict[str, int]:
    """A number for every dataset shard: known ones keep theirs, the others take the free ones in sorted order."""
    taken = set(known.values())
    free = (n for n in range(len(names) + len(known)) if n not in taken)
    return known | {name: next(free) for name in sorted(names) if name not in known}
