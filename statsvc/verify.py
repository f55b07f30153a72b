"""Does a store hold what its commits say? Every byte is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from statsvc.arrays import open_feature_shard, read_chunk
from statsvc.backends import backend
from statsvc.errors import DamagedObject, StatsvcError
from statsvc.expected import belongs, cache_specs, expected_arrays, miscounts
from statsvc.layout import (
    ArraySpec,
    commit_folder,
    commit_path,
    fit_path,
    moments_arrays,
    pilot_path,
    report_path,
    sample_arrays,
    teacher_status,
    transform_path,
)
from statsvc.ledger import Commit, Ledger, teachers_with_commits, unseal
from statsvc.metadata import array_faults, root_fault, teacher_fault
from statsvc.normalizations import moments_digest
from statsvc.store import Store, Teacher, open_store

ROOT = "zarr.json"


class Damage(NamedTuple):
    """A damaged object, and the commit that vouches for it (None: only the object itself has to be made anew)."""

    path: str
    reason: str
    commit: str | None


def verify_store(location: str) -> tuple[int, list[Damage]]:
    """How many objects were checked, and those that are damaged, by path. Raises where there is no store."""
    storage = backend(location)
    if not storage.exists() and Ledger(storage).shards("index"):
        return 1, [Damage(ROOT, "missing", None)]
    try:
        check = _Check(open_store(location))
    except DamagedObject as error:
        return 1, [_damage(ROOT, error, None)]
    check.everything()
    return check.checked, [check.damage[path] for path in sorted(check.damage)]


class _Check:
    """Collects damage by path; each method checks one kind of object."""

    def __init__(self, store: Store) -> None:
        self.store, self.checked, self.damage = store, 0, dict[str, Damage]()
        self._rows = store.rows_per_shard
        self._pilots = dict[str, tuple[str, list[int]]]()  # record and dataset shards by teacher
        self._due_near = dict[str, dict[str, str]]()  # of refits: by teacher and output, what the fit is to be near
        self._fitted = set[str]()
        self._arrays = list[tuple[ArraySpec, int]]()  # that are there, with the dataset shards they must have room for

    def damaged(self, path: str, reason: object, commit: str | None) -> None:
        self.damage.setdefault(path, _damage(path, reason, commit))

    def everything(self) -> None:
        index = list(self.commits("index"))
        self.checked += 1
        if fault := root_fault(self.store, index):
            self.damaged(ROOT, fault, None)
            return  # in its light, everything else would look wrong
        for commit in index:
            self.objects(commit, None)
        self._arrays += [(spec, _shards(index)) for spec in sample_arrays(self._rows).values()]
        self.pilots()
        for name in sorted({*self.store.teachers(), *teachers_with_commits(self.store.backend)}):
            self.checked += 1
            if fault := teacher_fault(self.store, name):
                self.damaged(f"teachers/{name}/{ROOT}", fault, None)
            else:
                self.teacher(self.store.teacher(name), {commit.shard for commit in index})
        unnamed = sorted(self._fitted - self._pilots.keys())
        if unnamed and not any(path.startswith(commit_folder("pilot")) for path in self.damage):
            self.damaged(pilot_path(unnamed), f"missing, though {', '.join(unnamed)} were fitted with it", None)
        for path, fault in array_faults(self.store.backend, self._arrays):
            self.checked += 1
            if fault:
                self.damaged(path, fault, None)

    def pilots(self) -> None:
        folder = commit_folder("pilot")
        for name in self.store.backend.list(folder):
            path = f"{folder}/{name}"
            self.checked += 1
            try:
                record = unseal(path, self.store.backend.read(path))
                if pilot_path(record["teachers"]) != path:
                    raise DamagedObject(f"it belongs at {pilot_path(record['teachers'])}")
                self._pilots |= dict.fromkeys(record["teachers"], (path, record["shards"]))
                self._due_near |= record.get("near", {})
            except (DamagedObject, LookupError, TypeError) as error:
                self.damaged(path, error, None)

    def teacher(self, teacher: Teacher, indexed: set[int]) -> None:
        """All that was done for one teacher."""
        measured, cached = list(self.commits("measure", teacher)), list[Commit]()
        for output, shape in teacher.outputs.items():
            specs = moments_arrays(teacher.name, output, shape.dim)
            self._arrays += [(spec, _shards(measured)) for spec in specs.values()]
        for cache_set in self.store.backend.list(commit_folder("cache", teacher.name)):
            commits = list(self.commits("cache", teacher, cache_set))
            for output in teacher.outputs if commits else ():
                specs = cache_specs(teacher, commits[0], output)
                self._arrays += [(spec, _shards(commits)) for spec in specs.values()]
            cached += commits
        self._arrays.append((teacher_status(teacher.name, self._rows), _shards(cached)))
        for commit in measured + cached:
            self.objects(commit, teacher)
            if commit.shard not in indexed:
                self.damaged(commit_path("index", commit.shard), f"missing, though {commit.path} is there", None)
        self.fits(
            teacher, {d: f"cache set {commit.set}" for commit in cached for d in (commit.transform or {}).values()}
        )

    def commits(self, phase: str, teacher: Teacher | None = None, cache_set: str | None = None) -> Iterator[Commit]:
        """The sound commits of a phase."""
        name = teacher.name if teacher else None
        for shard in self.store.ledger.shards(phase, name, cache_set):
            path = commit_path(phase, shard, name, cache_set)
            self.checked += 1
            try:
                commit = self.store.ledger.read(phase, shard, name, cache_set)
                assert commit is not None  # it was listed
                if teacher and commit.fingerprint != teacher.fingerprint:
                    raise DamagedObject(f"made with fingerprint {commit.fingerprint}, not the teacher's")
                if cache_set and not belongs(commit, cache_set):
                    raise DamagedObject("made with transforms of another fit than that of its cache set")
                due = {spec.object(shard) for spec in expected_arrays(self._rows, commit, teacher)}
                if {record.path for record in commit.objects} != due:
                    raise DamagedObject("vouches for other objects than its unit has")
            except DamagedObject as error:
                self.damaged(path, error, path)
                continue
            yield commit

    def objects(self, commit: Commit, teacher: Teacher | None) -> None:
        """Everything that a commit vouches for, and what it counts."""
        arrays: dict[str, np.ndarray] = {}
        for spec in expected_arrays(self._rows, commit, teacher):
            self.checked += 1
            try:
                arrays[spec.path.rpartition("/")[2]] = self._read(spec, commit)
            except DamagedObject as error:
                self.damaged(spec.object(commit.shard), error, commit.path)
        for reason in miscounts(commit, arrays, self.store.views_per_image):
            self.damaged(commit.path, reason, commit.path)

    def _read(self, spec: ArraySpec, commit: Commit) -> np.ndarray:
        """The array, or of a feature shard which rows are present. Raises DamagedObject."""
        if not spec.sharded:
            return read_chunk(self.store.backend, spec, commit.shard, commit)
        shard_file = open_feature_shard(self.store.backend, spec, commit.shard, commit)
        shard_file.verify_all()
        return shard_file.present_R

    def _near(self, teacher: Teacher, fits: dict[str, dict[str, Any]]) -> dict[str, str]:
        """The transforms that fits are near to or are to be near to: without them, no fit can be made again."""
        found = dict.fromkeys(self._due_near.get(teacher.name, {}).values(), "a refit")
        for methods in fits.values():
            try:
                near = self.store.report(methods["phi-s"]).get("near")
            except (DamagedObject, TypeError, KeyError):
                continue  # found already, or refused
            if near:
                found[near] = f"the phi-s of {teacher.name}"
        return found

    def fits(self, teacher: Teacher, in_use: dict[str, str]) -> None:
        """The current fits, and the transforms of earlier ones that something still needs, by digest."""
        path = fit_path(teacher.name)
        self.checked += 1
        try:
            fits = teacher.fits()
        except DamagedObject as error:
            self.damaged(path, error, path)
            return
        if in_use and not fits:
            self.damaged(path, "missing, though there are targets that were made with it", path)
        self._fitted |= {teacher.name} if fits else set()
        for output, methods in fits.items():
            for method, digest in methods.items():
                if isinstance(digest, str):
                    self.fit(teacher, output, method, digest)
                    in_use.pop(digest, None)
        for digest, user in (self._near(teacher, fits) | in_use).items():
            self.checked += 1
            try:
                self.store.transform(digest)
            except DamagedObject as error:
                what = "missing" if self.store.backend.size(transform_path(digest)) is None else str(error)
                reason = f"{what}; {user} needs it, and no run makes it anew: restore the file from a copy"
                self.damaged(transform_path(digest), reason, None)

    def fit(self, teacher: Teacher, output: str, method: str, digest: str) -> None:
        """The transform that a fit commit names, its report, and the moments that both were made from."""
        path, pilot = fit_path(teacher.name), list[int]()
        self.checked += 2
        try:
            report = self.store.report(digest)
            if report["digest"] != digest:
                raise DamagedObject("a report on another transform")
            pilot = report["pilot"]
            record, shards = self._pilots.get(teacher.name, ("", pilot))
            # A pilot with `near` was written down by a refit; if that was broken off, the next run takes it up.
            if shards != pilot and teacher.name not in self._due_near:
                self.damaged(record, f"not the pilot that {teacher.name} was fitted on", None)
        except DamagedObject as error:
            self.damaged(report_path(digest), error, path)
        for shard in pilot:
            if self.store.backend.size(commit_path("measure", shard, teacher.name)) is None:
                self.damaged(commit_path("measure", shard, teacher.name), "missing, though it was fitted", path)
        try:
            transform = self.store.transform(digest)
        except DamagedObject as error:
            self.damaged(transform_path(digest), error, path)
            return
        if (transform.method, transform.output, transform.fingerprint) != (method, output, teacher.fingerprint):
            self.damaged(path, f"names {digest} as {method} of {output}, which it is not", path)
            return
        try:
            moments = teacher.pilot_moments(output, pilot) if pilot else None
        except StatsvcError:
            return  # found already, in the measure phase
        if moments and transform.moments_digest != moments_digest(moments):
            self.damaged(transform_path(digest), "fitted to other moments than those of its pilot", path)


def _damage(path: str, reason: object, commit: str | None) -> Damage:
    return Damage(path, str(reason).removeprefix(f"{path}: "), commit)


def _shards(commits: list[Commit]) -> int:
    """How many dataset shards an array must have room for."""
    return 1 + max((commit.shard for commit in commits), default=-1)
