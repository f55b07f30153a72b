"""Is what was done for each dataset shard whole: its commit, and every object that the commit vouches for?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from statsvc.digests import CRC_NBYTES, sha256
from statsvc.errors import DamagedObject
from statsvc.integrity.findings import Findings
from statsvc.store.arrays import open_feature_shard, read_chunk
from statsvc.store.commits import Commit
from statsvc.store.layout import (
    BEYOND_RANGE,
    OK,
    STATUS_NAMES,
    ArraySpec,
    cache_arrays,
    moments_arrays,
    sample_arrays,
    teacher_status,
)
from statsvc.store.paths import cache_group, chunk_path, commit_path, is_raw, set_dtype, set_name
from statsvc.store.reader import Store, Teacher


class UnitCheck:
    """Checks units, which are a phase of one dataset shard: for one teacher, and in one cache set, or for the index."""

    def __init__(self, store: Store, findings: Findings) -> None:
        self._store, self._findings = store, findings

    def commits(self, phase: str, teacher: Teacher | None = None, cache_set: str | None = None) -> Iterator[Commit]:
        """The sound commits of a phase; what they vouch for is not read."""
        name = teacher.name if teacher else None
        for shard in self._store.ledger.shards(phase, name, cache_set):
            path = commit_path(phase, shard, name, cache_set)
            self._findings.checked += 1
            try:
                commit = self._store.ledger.read(phase, shard, name, cache_set)
                assert commit is not None  # it was listed
                if teacher and commit.fingerprint != teacher.fingerprint:
                    raise DamagedObject(f"made with fingerprint {commit.fingerprint}, not the teacher's")
                if cache_set and not belongs(commit, cache_set):
                    raise DamagedObject("made with transforms of another fit than that of its cache set")
                due = {spec.object(shard) for spec in expected_arrays(self._store.rows_per_shard, commit, teacher)}
                if {record.path for record in commit.objects} != due:
                    raise DamagedObject("vouches for other objects than its unit has")
            except DamagedObject as error:
                self._findings.damaged(path, error, path)
                continue
            yield commit

    def objects(self, commit: Commit, teacher: Teacher | None) -> None:
        """Everything that a commit vouches for, and what it counts."""
        arrays: dict[str, np.ndarray] = {}
        for spec in expected_arrays(self._store.rows_per_shard, commit, teacher):
            self._findings.checked += 1
            try:
                arrays[spec.path.rpartition("/")[2]] = self._read(spec, commit)
            except DamagedObject as error:
                self._findings.damaged(spec.object(commit.shard), error, commit.path)
        for reason in miscounts(commit, arrays, self._store.views_per_image):
            self._findings.damaged(commit.path, reason, commit.path)

    def _read(self, spec: ArraySpec, commit: Commit) -> np.ndarray:
        """The array, or of a feature shard which rows are present. Raises DamagedObject."""
        if not spec.sharded:
            return read_chunk(self._store.backend, spec, commit.shard, commit)
        shard_file = open_feature_shard(self._store.backend, spec, commit.shard, commit)
        shard_file.verify_all()
        return shard_file.present_R


def belongs(commit: Commit, cache_set: str) -> bool:
    """Whether a commit was made with the transforms that its cache set is named after."""
    if is_raw(cache_set) or not commit.transform:
        return is_raw(cache_set) and not commit.transform
    method, _, _ = cache_set.rsplit("-", 2)
    fit = sha256(*(digest.encode() for _, digest in sorted(commit.transform.items())))
    return cache_set == set_name(method, fit, set_dtype(cache_set))


def expected_arrays(rows: int, commit: Commit, teacher: Teacher | None) -> Iterator[ArraySpec]:
    """The arrays that a commit must vouch for."""
    samples = sample_arrays(rows)
    if teacher is None:
        yield samples["key_hash"]
        return
    for output, shape in teacher.outputs.items():
        if commit.phase == "measure":
            yield from moments_arrays(teacher.name, output, shape.dim).values()
        else:
            yield from cache_specs(teacher, commit, output).values()
    if commit.phase == "cache":
        yield from (samples["status"], samples["views"], teacher_status(teacher.name, rows))


def cache_specs(teacher: Teacher, commit: Commit, output: str) -> dict[str, ArraySpec]:
    """What the arrays of a cache set must be, by one of its commits."""
    set_ = commit.set or ""
    means = chunk_path(f"{cache_group(teacher.name, set_, output)}/target_mean", commit.shard, 1)
    nbytes = next((record.bytes for record in commit.objects if record.path == means), 0)
    return cache_arrays(
        teacher.name,
        set_,
        output,
        dtype=set_dtype(set_),
        transform=(commit.transform or {}).get(output),
        tokens=teacher.output(output).tokens,
        k=max(nbytes - CRC_NBYTES, 4) // 4,
        rows=teacher.store.rows_per_shard,
    )


def miscounts(commit: Commit, arrays: dict[str, np.ndarray], views: int) -> Iterator[str]:
    """What a commit counts, against what its objects hold. Outputs of one teacher count alike.

    views  of each image
    """
    if "key_hash" in arrays:
        hash_PV16 = arrays["key_hash"].reshape(-1, views, 16)
        if int(hash_PV16[:, 0].any(axis=1).sum()) != commit.samples or commit.rows != commit.samples * views:
            yield f"counts {commit.samples} samples and {commit.rows} rows, samples/key_hash holds others"
        if (hash_PV16 != hash_PV16[:, :1]).any():
            yield "views of one image have several keys in samples/key_hash"
    if "images" in arrays and int(arrays["images"].sum()) != commit.rows:
        yield f"counts {commit.rows} images, the moments hold {int(arrays['images'].sum())}"
    present = arrays.get("codes", arrays.get("values"))
    if present is not None and int(present.sum()) != commit.rows:
        yield f"counts {commit.rows} rows, the feature shard holds {int(present.sum())}"
    counted = commit.status or {}
    usable = counted.get(STATUS_NAMES[OK], 0) + counted.get(BEYOND_RANGE, 0)
    if "status" in arrays and int((arrays["status"] == OK).sum()) != usable:
        yield f"counts {commit.status}, the status array holds others"
