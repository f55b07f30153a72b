"""Stores of any size without a teacher: real objects, commits and metadata, of random targets.

Suffixes: R = rows of a dataset shard, N = those with targets, T = tokens, k = channels of a target.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from statsvc.dataset.keys import key_hash
from statsvc.digests import crc32c_hex
from statsvc.numerics.codec import codec
from statsvc.storage import open_backend
from statsvc.storage.backend import ObjectRecord
from statsvc.store.arrays import declare_arrays, declare_group, write_chunk
from statsvc.store.commits import Commit, Failure, Ledger
from statsvc.store.layout import (
    ABSENT,
    FORMAT,
    NON_FINITE,
    OK,
    STATUS_NAMES,
    UNDECODABLE,
    cache_arrays,
    sample_arrays,
    teacher_status,
)
from statsvc.store.paths import raw_set_name, set_name
from statsvc.store.shard_file import ShardWriter

FINGERPRINT, DIGEST = "f" * 64, "0" * 64


@dataclass(frozen=True)
class MadeTeacher:
    """refused: rows of the store of which it gave no number; uncached: dataset shards it has not done."""

    tokens: int = 2
    dim: int = 3
    dtype: str = "int8"
    refused: Collection[int] = ()
    uncached: Collection[int] = ()

    @property
    def cache_set(self) -> str:
        return raw_set_name(self.dtype) if self.dtype.startswith("float") else set_name("phi-s", DIGEST, self.dtype)


def write_store(
    folder: Path,
    counts: Sequence[int],
    teachers: Mapping[str, MadeTeacher] | None = None,
    undecodable: Collection[int] = (),
    rows_per_shard: int | None = None,
) -> Path:
    """A store of dataset shards of so many samples.

    undecodable  rows of the store whose image is none
    """
    teachers = {"big": MadeTeacher()} if teachers is None else teachers
    storage, rows = open_backend(str(folder)), rows_per_shard or max(*counts, 1)
    ledger, samples = Ledger(storage), sample_arrays(rows)
    views = {"kind": "center", "per_image": 1, "seed": 0}
    declare_group(storage, "", {"format": FORMAT, "rows_per_shard": rows, "views": views, "images": ["jpg"]})
    declare_arrays(storage, samples.values(), len(counts))
    status = {}
    for shard, count in enumerate(counts):
        row_N = shard * rows + np.arange(rows)
        status[shard] = np.where(np.arange(rows) < count, OK, ABSENT).astype(np.uint8)
        status[shard][np.isin(row_N, list(undecodable)) & (status[shard] == OK)] = UNDECODABLE
        hash_R16 = np.zeros((rows, 16), np.uint8)
        for position in range(count):
            hash_R16[position] = np.frombuffer(key_hash(f"{shard}-{position}"), np.uint8)
        record = write_chunk(storage, samples["key_hash"], shard, hash_R16)
        ledger.write(
            Commit(phase="index", shard=shard, rows=count, objects=(record,), samples=count, name=f"{shard:06d}.tar")
        )
    for name, teacher in teachers.items():
        about = {"tokens": teacher.tokens, "dim": teacher.dim, "grid": [1, teacher.tokens]}
        declare_group(
            storage,
            f"teachers/{name}",
            {
                "fingerprint": FINGERPRINT,
                "settings": {},
                "outputs": {"patches": about},
                "preprocessing": {},
                "environment": {},
            },
        )
        for shard in set(status) - set(teacher.uncached):
            ledger.write(_cached(folder, name, teacher, shard, len(counts), status[shard]))
    return folder


def _cached(folder: Path, name: str, teacher: MadeTeacher, shard: int, shards: int, status_R: np.ndarray) -> Commit:
    storage, rows, samples = open_backend(str(folder)), len(status_R), sample_arrays(len(status_R))
    transform = None if teacher.dtype.startswith("float") else DIGEST
    arrays = cache_arrays(
        name, teacher.cache_set, "patches", dtype=teacher.dtype, transform=transform, tokens=teacher.tokens,
        k=teacher.dim, rows=rows,
    )  # fmt: skip
    own_status = teacher_status(name, rows)
    declare_arrays(storage, [*arrays.values(), own_status], shards)
    own_R = status_R.copy()
    own_R[np.isin(shard * rows + np.arange(rows), list(teacher.refused)) & (own_R == OK)] = NON_FINITE
    row_N = np.flatnonzero(own_R == OK)
    rng = np.random.default_rng([shard, len(name)])
    stored = codec(teacher.dtype).encode(
        rng.standard_normal((len(row_N), teacher.tokens, teacher.dim), dtype=np.float32)
    )
    records = []
    for part in codec(teacher.dtype).arrays:
        spec = arrays[part.name]
        if part.sharded:
            upload = storage.create(spec.object(shard))
            writer = ShardWriter(upload.file, rows, spec.row_nbytes)
            writer.append(row_N, np.ascontiguousarray(stored[part.name]))
            nbytes, crc = writer.finish()
            upload.publish()
            content = crc32c_hex(writer.content_crc32c)
            records.append(ObjectRecord(spec.object(shard), nbytes, crc32c_hex(crc), content))
        else:
            small_R = np.full((rows, *spec.shape), spec.fill, spec.dtype)
            small_R[row_N] = stored[part.name]
            records.append(write_chunk(storage, spec, shard, small_R))
    views_R5 = np.where((status_R == OK)[:, None], np.array([0, 0, 8, 8, 0], np.float32), np.float32(np.nan))
    for spec, array in ((samples["status"], status_R), (samples["views"], views_R5), (own_status, own_R)):
        records.append(write_chunk(storage, spec, shard, array))
    reasons = {UNDECODABLE: "cannot be decoded", NON_FINITE: "a feature is NaN or infinite"}
    failed = [Failure(f"{shard}-{row}", row, reasons[s]) for row, s in enumerate(own_R.tolist()) if s in reasons]
    found = np.bincount(own_R, minlength=len(STATUS_NAMES)).tolist()
    return Commit(
        phase="cache", shard=shard, rows=len(row_N), objects=tuple(records), teacher=name, set=teacher.cache_set,
        fingerprint=FINGERPRINT, transform={"patches": transform} if transform else None, failed=tuple(failed),
        status={n: c for n, c in zip(STATUS_NAMES, found, strict=True) if c},
    )  # fmt: skip
