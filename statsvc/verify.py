"""Does a store hold what its commits say? Every byte is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from statsvc.arrays import open_feature_shard, read_chunk
from statsvc.checksum import crc32c_hex
from statsvc.errors import DamagedObject, StatsvcError
from statsvc.layout import (
    OK,
    STATUS_NAMES,
    ArraySpec,
    cache_arrays,
    commit_path,
    fit_path,
    moments_arrays,
    report_path,
    sample_arrays,
    teacher_status,
    transform_path,
)
from statsvc.ledger import Commit
from statsvc.normalizations import moments_digest
from statsvc.store import Store, Teacher


class Damage(NamedTuple):
    """A damaged object, and the commit that vouches for it (None: nothing can be done again by itself)."""

    path: str
    reason: str
    commit: str | None


def verify_store(store: Store) -> tuple[int, list[Damage]]:
    """How many objects were checked, and those that are damaged, by path."""
    check = _Check(store)
    check.commits("index")
    for name in store.teachers():
        try:
            teacher = store.teacher(name)
        except StatsvcError as error:
            check.damaged(f"teachers/{name}/zarr.json", error, None)
            continue
        check.teacher(teacher)
    check.samples()
    unique = {damage.path: damage for damage in check.damage}
    return check.checked, [unique[path] for path in sorted(unique)]


def repair(store: Store, damage: list[Damage]) -> int:
    """Remove damaged objects and the commits that vouch for them, so that the next run does that work again.

    A unit without its commit is missing; everything else of it is written anew with the same bytes.
    """
    paths = {path for found in damage for path in (found.path, found.commit) if path is not None}
    for path in sorted(paths):
        store.backend.remove(path)
    return len(paths)


class _Check:
    """Collects damage; each method checks one kind of object."""

    def __init__(self, store: Store) -> None:
        self.store, self.damage, self.checked = store, list[Damage](), 0
        self._shards = max(store.ledger.shards("index"), default=-1) + 1
        self._rows = store.rows_per_shard

    def damaged(self, path: str, reason: object, commit: str | None) -> None:
        self.damage.append(Damage(path, str(reason).removeprefix(f"{path}: "), commit))

    def samples(self) -> None:
        specs = sample_arrays(self._rows)
        for spec in specs.values():
            self._metadata(spec)

    def teacher(self, teacher: Teacher) -> None:
        name = teacher.name
        self._metadata(teacher_status(name, self._rows))
        for output, shape in teacher.outputs.items():
            for spec in moments_arrays(name, output, shape.dim).values():
                self._metadata(spec)
        self.commits("measure", teacher)
        self._fits(teacher)
        for cache_set in teacher.cache_sets():
            for output in teacher.outputs:
                try:
                    specs = _cache_specs(teacher, cache_set, output)
                except (StatsvcError, LookupError, OSError, ValueError) as error:
                    self.damaged(f"teachers/{name}/cache/{cache_set}/{output}", f"no readable commit: {error}", None)
                    continue
                for spec in specs.values():
                    self._metadata(spec)
            self.commits("cache", teacher, cache_set)

    def commits(self, phase: str, teacher: Teacher | None = None, cache_set: str | None = None) -> None:
        name = teacher.name if teacher else None
        for shard in self.store.ledger.shards(phase, name, cache_set):
            path = commit_path(phase, shard, name, cache_set)
            self.checked += 1
            try:
                commit = self.store.ledger.read(phase, shard, name, cache_set)
                assert commit is not None  # it was listed
                expected = list(_expected(self._rows, phase, teacher, cache_set))
            except (StatsvcError, LookupError, OSError, ValueError) as error:
                self.damaged(path, error, path)
                continue
            if teacher and commit.fingerprint != teacher.fingerprint:
                self.damaged(path, f"made with fingerprint {commit.fingerprint}, not the teacher's", path)
            counted: dict[str, np.ndarray] = {}
            for spec in expected:
                self.checked += 1
                try:
                    counted[spec.path.rpartition("/")[2]] = self._object(spec, shard, commit)
                except DamagedObject as error:
                    self.damaged(spec.object(shard), error, path)
            for reason in _miscounts(phase, commit, counted, teacher):
                self.damaged(path, reason, path)

    def _object(self, spec: ArraySpec, shard: int, commit: Commit) -> np.ndarray:
        """The array, or of a feature shard which rows are present. Raises DamagedObject."""
        if not spec.sharded:
            return read_chunk(self.store.backend, spec, shard, commit)
        shard_file = open_feature_shard(self.store.backend, spec, shard, commit)
        shard_file.verify_all()
        content = crc32c_hex(shard_file.content_crc32c)
        due = next(record for record in commit.objects if record.path == spec.object(shard)).content_crc32c
        if content != due:
            raise DamagedObject(f"{spec.object(shard)}: a shard of other rows: contents {content}, committed {due}")
        return shard_file.present_R

    def _fits(self, teacher: Teacher) -> None:
        commit = fit_path(teacher.name)
        if self.store.backend.size(commit) is None:
            return
        self.checked += 1
        try:
            digests = [
                (output, method)
                for output, methods in teacher.fits().items()
                for method, found in methods.items()
                if isinstance(found, str)
            ]
            reports = teacher.report()
        except (StatsvcError, ValueError, KeyError, OSError) as error:
            self.damaged(commit, f"unreadable, or a report is missing: {error}", commit)
            return
        for output, method in digests:
            self.checked += 1
            try:
                transform = teacher.transform(method, output)
                if reports[output][method]["digest"] != transform.digest:
                    raise DamagedObject("its report is of another transform")
                if transform.moments_digest != moments_digest(teacher.moments(output)):
                    raise DamagedObject("the pilot's moments are not those it was fitted on")
            except (StatsvcError, ValueError, KeyError) as error:
                self.damaged(transform_path(teacher.fits()[output][method]), error, commit)

    def _metadata(self, spec: ArraySpec) -> None:
        path = f"{spec.path}/zarr.json"
        self.checked += 1
        try:
            found = json.loads(self.store.backend.read(path))
        except (FileNotFoundError, ValueError) as error:
            self.damaged(path, "missing" if isinstance(error, FileNotFoundError) else f"not JSON: {error}", None)
            return
        due = json.loads(spec.metadata(self._shards))
        if wrong := [key for key in due if found.get(key) != due[key]]:
            self.damaged(path, f"{', '.join(wrong)}: not as the store's other metadata says", None)


def _expected(rows: int, phase: str, teacher: Teacher | None, cache_set: str | None) -> Iterator[ArraySpec]:
    """The arrays that a commit of a phase vouches for."""
    samples = sample_arrays(rows)
    if teacher is None:
        yield samples["key_hash"]
        return
    for output, shape in teacher.outputs.items():
        if phase == "measure":
            yield from moments_arrays(teacher.name, output, shape.dim).values()
        elif cache_set is not None:
            yield from _cache_specs(teacher, cache_set, output).values()
    if phase == "cache":
        yield from (samples["status"], samples["views"], teacher_status(teacher.name, rows))


def _cache_specs(teacher: Teacher, cache_set: str, output: str) -> dict[str, ArraySpec]:
    """What the arrays of a cache set must be, from its first commit and that fit's report, not from the arrays."""
    store = teacher.store
    first = store.ledger.read(
        "cache", store.ledger.shards("cache", teacher.name, cache_set)[0], teacher.name, cache_set
    )
    digest = (first.transform or {})[output] if first else ""
    return cache_arrays(
        teacher.name,
        cache_set,
        output,
        dtype=cache_set.rpartition("-")[2],
        transform=digest,
        tokens=teacher.output(output).tokens,
        k=json.loads(store.backend.read(report_path(digest)))["rank"],
        rows=store.rows_per_shard,
    )


def _miscounts(phase: str, commit: Commit, arrays: dict[str, np.ndarray], teacher: Teacher | None) -> Iterator[str]:
    """What a commit counts, against what its objects hold. Outputs of one teacher count alike."""
    if phase == "index" and "key_hash" in arrays and int(arrays["key_hash"].any(axis=1).sum()) != commit.samples:
        yield f"counts {commit.samples} samples, samples/key_hash holds others"
    if phase == "measure" and "images" in arrays and int(arrays["images"].sum()) != commit.rows:
        yield f"counts {commit.rows} images, the moments hold {int(arrays['images'].sum())}"
    if phase == "cache" and teacher is not None:
        present = next((arrays[name] for name in ("codes", "values") if name in arrays), None)
        if present is not None and int(present.sum()) != commit.rows:
            yield f"counts {commit.rows} rows, the feature shard holds {int(present.sum())}"
        if "status" in arrays and int((arrays["status"] == OK).sum()) != (commit.status or {}).get(STATUS_NAMES[OK], 0):
            yield f"counts {commit.status}, the status array holds others"
