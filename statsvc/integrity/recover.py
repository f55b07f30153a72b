"""What a store without its root, or a teacher without its metadata, must have been: by what is left of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from statsvc.digests import CRC_NBYTES, crc32c
from statsvc.errors import DamagedObject
from statsvc.storage.backend import Backend
from statsvc.store.arrays import read_chunk
from statsvc.store.commits import Commit, Ledger
from statsvc.store.layout import Output, moments_arrays
from statsvc.store.reader import Store, Teacher

WITNESSES = 8  # chunks of each array that may tell how many rows it has


class RecoveredStore(Store):
    """A store whose root cannot be read. Its views are not known, but how many there are of each image."""

    def __init__(self, backend: Backend, rows_per_shard: int) -> None:
        self.backend, self.ledger, self.rows_per_shard, self.views = backend, Ledger(backend), rows_per_shard, {}
        counted = ((commit.rows, commit.samples) for commit in sound_commits(self.ledger, "index"))
        self.views_per_image = next((rows // samples for rows, samples in counted if samples), 1)


class RecoveredTeacher(Teacher):
    """A teacher whose metadata cannot be read. Raises DamagedObject where too little is left."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name, self.preprocessing = store, name, {}
        commits = list(_commits_of(store, name))
        made_with = Counter(commit.fingerprint for commit in commits if commit.fingerprint)
        outputs = [output for output in store.backend.list(f"teachers/{name}/moments") if output != "zarr.json"]
        self.fingerprint = next((found for found, _ in made_with.most_common(1)), "")
        self.outputs = {output: _shape(store, name, output, commits) for output in outputs}
        if not self.fingerprint or not outputs:
            raise DamagedObject(f"teachers/{name}: too little is left to say what it was")


def rows_left(storage: Backend) -> int | None:
    """Rows of a dataset shard, views included: as the index has it, else as most that is left of its arrays has it."""
    for commit in sound_commits(Ledger(storage), "index"):
        for record in commit.objects:
            return record.bytes // 16  # of samples/key_hash
    arrays = {"samples/key_hash": 16, "samples/status": 1, "samples/views": 20}  # by bytes of a row
    arrays |= {f"teachers/{name}/status": 1 for name in storage.list("teachers")}
    votes = Counter[int]()
    for array, row_nbytes in arrays.items():
        if shape := _numbers(storage, array, "chunk_grid", "configuration", "chunk_shape"):
            votes[shape[0]] += 1
        for shard in storage.list(f"{array}/c")[:WITNESSES]:
            with suppress(FileNotFoundError):
                content = storage.read(f"{array}/c/{shard}{'/0' if row_nbytes > 1 else ''}")
                sealed = crc32c(content[:-CRC_NBYTES]).to_bytes(CRC_NBYTES, "little") == content[-CRC_NBYTES:]
                votes[(len(content) - CRC_NBYTES) // row_nbytes] += sealed and len(content) > CRC_NBYTES
    (first, count), (_, second) = [*votes.most_common(2), (0, 0), (0, 0)][:2]
    return first if count > 1 + 2 * second else None  # or what is left is not to be believed


def sound_commits(
    ledger: Ledger, phase: str, teacher: str | None = None, cache_set: str | None = None
) -> Iterator[Commit]:
    """The commits of a phase that can be read."""
    for shard in ledger.shards(phase, teacher, cache_set):
        try:
            commit = ledger.read(phase, shard, teacher, cache_set)
        except DamagedObject:
            continue
        if commit is not None:
            yield commit


def _commits_of(store: Store, name: str) -> Iterator[Commit]:
    yield from sound_commits(store.ledger, "measure", name)
    for cache_set in store.backend.list(f".statsvc/commits/cache/{name}"):
        yield from sound_commits(store.ledger, "cache", name, cache_set)


def _shape(store: Store, name: str, output: str, commits: list[Commit]) -> Output:
    """Tokens and channels of an output, by the metadata of its arrays, else by what was measured."""
    mean = _numbers(store.backend, f"teachers/{name}/moments/{output}/mean", "shape")
    dims = mean[2:] if len(mean) == 3 else []
    tokens = [
        shape[1]
        for cache_set in store.backend.list(f"teachers/{name}/cache")
        for array in ("codes", "values")
        if len(shape := _numbers(store.backend, f"teachers/{name}/cache/{cache_set}/{output}/{array}", "shape")) == 3
    ]
    for commit in commits:
        if dims and tokens:
            break
        nbytes = {record.path: record.bytes for record in commit.objects}
        specs = moments_arrays(name, output, 1)
        if (path := specs["mean"].object(commit.shard)) in nbytes:
            dims = dims or [(nbytes[path] - CRC_NBYTES) // 16]
            try:
                count, images = (
                    read_chunk(store.backend, specs[array], commit.shard, commit).sum() for array in ("count", "images")
                )
            except DamagedObject:
                continue
            tokens = tokens or ([int(count // images)] if images else [])
    if not dims or not tokens:
        raise DamagedObject(f"teachers/{name}/moments/{output}: too little is left to say what it was")
    return Output(tokens[0], dims[0])


def _numbers(storage: Backend, array: str, *keys: str) -> list[int]:
    """A list of numbers in the metadata of an array; empty where that is missing or damaged."""
    try:
        found = json.loads(storage.read(f"{array}/zarr.json"))
        for key in keys:
            found = found[key]
        return [int(number) for number in found]
    except (FileNotFoundError, LookupError, TypeError, ValueError):
        return []
