"""Does a store hold what its commits say? Every byte is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from statsvc.arrays import open_feature_shard, read_chunk
from statsvc.backends import Backend, backend
from statsvc.canonical import canonical_json, sha256
from statsvc.checksum import CRC_NBYTES
from statsvc.errors import DamagedObject, StatsvcError
from statsvc.layout import (
    OK,
    STATUS_NAMES,
    ArraySpec,
    cache_arrays,
    commit_folder,
    commit_path,
    fit_path,
    group_metadata,
    groups,
    moments_arrays,
    report_path,
    sample_arrays,
    teacher_status,
    transform_path,
)
from statsvc.ledger import Commit, Ledger, attributes
from statsvc.normalizations import moments_digest
from statsvc.store import Store, Teacher, open_store

ROOT = "zarr.json"


class Damage(NamedTuple):
    """A damaged object, and the commit that vouches for it (None: nothing but the object itself is to be made anew)."""

    path: str
    reason: str
    commit: str | None


def verify_store(location: str) -> tuple[int, list[Damage]]:
    """How many objects were checked, and those that are damaged, by path. Raises StoreError where there is no store."""
    storage = backend(location)
    if not storage.exists() and Ledger(storage).shards("index"):
        return 1, [Damage(ROOT, "missing", None)]
    try:
        check = _Check(open_store(location))
    except DamagedObject as error:
        return 1, [Damage(ROOT, _reason(ROOT, error), None)]
    check.everything()
    return check.checked, [check.damage[path] for path in sorted(check.damage)]


class _Check:
    """Collects damage by path; each method checks one kind of object."""

    def __init__(self, store: Store) -> None:
        self.store, self.checked, self.damage = store, 0, dict[str, Damage]()
        self._rows = store.rows_per_shard
        self._groups = set[str]()
        self._arrays = list[tuple[ArraySpec, int, Any]]()  # with the dataset shards it must have room for, and zarr.json

    def damaged(self, path: str, reason: object, commit: str | None) -> None:
        self.damage.setdefault(path, Damage(path, _reason(path, reason), commit))

    def everything(self) -> None:
        index = list(self.commits("index"))
        if not self.root(index):
            return  # nothing could be found in its place
        for commit in index:
            self.objects(commit, None)
        for spec in sample_arrays(self._rows).values():
            self.array(spec, _shards(index))
        for name in sorted({*self.store.teachers(), *_teachers_with_commits(self.store.backend)}):
            teacher = self.teacher(name)
            if teacher is not None:
                self.work(teacher, {commit.shard for commit in index})
        self.shapes()

    def root(self, index: list[Commit]) -> bool:
        about, found = attributes(self.store.backend, ""), json.loads(self.store.backend.read(ROOT))
        kept = {(record.bytes - CRC_NBYTES) // 16 for commit in index for record in commit.objects}
        self.checked += 1
        if found != json.loads(group_metadata(about)):
            self.damaged(ROOT, "not the metadata of a Zarr group", None)
        elif kept - {self._rows}:
            self.damaged(ROOT, f"rows_per_shard is {self._rows}, the dataset shards were indexed with {kept}", None)
        else:
            for name in self.store.teachers():
                settings = self._settings(name)
                if settings and settings["views"] != about.get("views"):
                    self.damaged(ROOT, f"its views are not those of teacher {name}", None)
        return ROOT not in self.damage

    def _settings(self, name: str) -> dict[str, Any] | None:
        """What the fingerprint of a teacher was taken of; None where it was not."""
        try:
            about = attributes(self.store.backend, f"teachers/{name}")
            settings: dict[str, Any] = about["settings"]
            return settings if sha256(canonical_json(settings)) == about["fingerprint"] else None
        except (StatsvcError, LookupError, TypeError, ValueError):
            return None

    def teacher(self, name: str) -> Teacher | None:
        """The teacher, unless its own metadata is damaged: then nothing can be said about the rest."""
        path = f"teachers/{name}/zarr.json"
        self.checked += 1
        try:
            found = json.loads(self.store.backend.read(path))
            teacher, settings = Teacher(self.store, name), self._settings(name)
            if found != json.loads(group_metadata(found["attributes"])):
                raise ValueError("not the metadata of a Zarr group")
            if settings is None or any(settings[key] != teacher.preprocessing[key] for key in ("size", "mean", "std")):
                raise ValueError("settings, preprocessing and fingerprint do not belong together")
            for shard in self.store.ledger.shards("measure", name)[:1]:
                _check_outputs(teacher, shard)
        except FileNotFoundError:
            self.damaged(path, "missing", None)
        except (StatsvcError, LookupError, TypeError, ValueError) as error:
            self.damaged(path, error, None)
        return None if path in self.damage else teacher

    def work(self, teacher: Teacher, indexed: set[int]) -> None:
        """All that was done for one teacher."""
        name, cached = teacher.name, self.store.backend.list(commit_folder("cache", teacher.name))
        units = {cache_set: list(self.commits("cache", teacher, cache_set)) for cache_set in cached}
        measured = list(self.commits("measure", teacher))
        for output, shape in teacher.outputs.items():
            for spec in moments_arrays(name, output, shape.dim).values():
                self.array(spec, _shards(measured))
        every = measured + [commit for commits in units.values() for commit in commits]
        self.array(teacher_status(name, self._rows), _shards(every))
        for commit in every:
            self.objects(commit, teacher)
            if commit.shard not in indexed:
                self.damaged(commit_path("index", commit.shard), f"missing, though {commit.path} is there", None)
        for commits in units.values():
            for commit in commits[:1]:
                for output in teacher.outputs:
                    for spec in _cache_specs(teacher, commit, output).values():
                        self.array(spec, _shards(commits))
        self.fits(teacher, bool(sum(units.values(), [])))

    def commits(self, phase: str, teacher: Teacher | None = None, cache_set: str | None = None) -> Iterator[Commit]:
        """The sound commits of a phase."""
        name = teacher.name if teacher else None
        for shard in self.store.ledger.shards(phase, name, cache_set):
            path = commit_path(phase, shard, name, cache_set)
            self.checked += 1
            try:
                commit = self.store.ledger.read(phase, shard, name, cache_set)
            except DamagedObject as error:
                self.damaged(path, error, path)
                continue
            if commit is None:
                continue  # a run removed it meanwhile
            if teacher and commit.fingerprint != teacher.fingerprint:
                self.damaged(path, f"made with fingerprint {commit.fingerprint}, not the teacher's", path)
            elif cache_set and _fit_of(commit) != cache_set.split("-")[-2:-1]:
                self.damaged(path, "made with transforms of another fit than that of its cache set", path)
            else:
                yield commit

    def objects(self, commit: Commit, teacher: Teacher | None) -> None:
        """Everything that a commit vouches for, and what it counts."""
        try:
            expected = list(_expected(self._rows, commit, teacher))
        except (StatsvcError, LookupError) as error:
            self.damaged(commit.path, error, commit.path)
            return
        if {record.path for record in commit.objects} != {spec.object(commit.shard) for spec in expected}:
            self.damaged(commit.path, "vouches for other objects than its unit has", commit.path)
            return
        counted: dict[str, np.ndarray] = {}
        for spec in expected:
            self.checked += 1
            try:
                if spec.sharded:
                    shard_file = open_feature_shard(self.store.backend, spec, commit.shard, commit)
                    shard_file.verify_all()
                    counted[spec.path.rpartition("/")[2]] = shard_file.present_R
                else:
                    chunk = read_chunk(self.store.backend, spec, commit.shard, commit)
                    counted[spec.path.rpartition("/")[2]] = chunk
            except DamagedObject as error:
                self.damaged(spec.object(commit.shard), error, commit.path)
        for reason in _miscounts(commit, counted):
            self.damaged(commit.path, reason, commit.path)

    def fits(self, teacher: Teacher, in_use: bool) -> None:
        path, ledger = fit_path(teacher.name), self.store.ledger
        try:
            fits = teacher.fits()
        except DamagedObject as error:
            self.damaged(path, error, path)
            return
        if in_use and not fits:
            self.damaged(path, "missing, though targets made with it are there", path)
        self.checked += 1
        found = [(output, method, fit) for output, methods in fits.items() for method, fit in methods.items()]
        for output, method, digest in found:
            if not isinstance(digest, str):
                continue
            self.checked += 2
            try:
                report = self.store.report(digest)
                if report["digest"] != digest:
                    raise DamagedObject("a report on another transform")
                for shard in report["pilot"]:
                    if ledger.read("measure", shard, teacher.name) is None:
                        self.damaged(commit_path("measure", shard, teacher.name), "missing, though it was fitted", path)
            except StatsvcError as error:
                self.damaged(report_path(digest), error, path)
                continue
            try:
                transform = self.store.transform(digest)
            except DamagedObject as error:
                self.damaged(transform_path(digest), error, path)
                continue
            if (transform.method, transform.output, transform.fingerprint) != (method, output, teacher.fingerprint):
                self.damaged(path, f"{digest} is not {method} of {output}", path)
                continue
            try:
                moments = teacher.pilot_moments(output, report["pilot"])
            except StatsvcError:
                continue  # found above
            if transform.moments_digest != moments_digest(moments):
                self.damaged(transform_path(digest), "fitted to other moments than the pilot's", path)

    def array(self, spec: ArraySpec, shards: int) -> None:
        """zarr.json of an array that must have room for so many dataset shards, and of the groups above it."""
        for group in groups(spec.path):
            if group not in self._groups and not (group.startswith("teachers/") and group.count("/") == 1):
                self._groups.add(group)
                if self._document(group) not in (None, json.loads(group_metadata({}))):
                    self.damaged(f"{group}/zarr.json", "not the metadata of a Zarr group", None)
        found = self._document(spec.path)
        if found is not None:
            self._arrays.append((spec, shards, found))

    def _document(self, path: str) -> Any:
        self.checked += 1
        try:
            return json.loads(self.store.backend.read(f"{path}/zarr.json"))
        except FileNotFoundError:
            self.damaged(f"{path}/zarr.json", "missing", None)
        except ValueError as error:
            self.damaged(f"{path}/zarr.json", f"not JSON: {error}", None)
        return None

    def shapes(self) -> None:
        """Arrays grow one after the other, so a run that was stopped leaves two lengths; never one for itself."""
        lengths = [_length(found) // spec.rows for spec, _, found in self._arrays]
        how_many = Counter(lengths)
        for (spec, shards, found), length in zip(self._arrays, lengths, strict=True):
            grown = length if length >= shards and (length == shards or how_many[length] > 1) else shards
            due = json.loads(spec.metadata(grown))
            if found != due:
                keys = due.keys() | found.keys() if isinstance(found, dict) else due.keys()
                wrong = [key for key in sorted(keys) if not isinstance(found, dict) or found.get(key) != due.get(key)]
                self.damaged(f"{spec.path}/zarr.json", f"{', '.join(wrong)}: not as the commits say", None)
