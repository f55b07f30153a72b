"""Does a store hold what its commits say? Every byte is read.

Here is the way through a store; `verify_units` looks at dataset shards, `verify_fits` at fits, `metadata` at zarr.json,
and `inventory` at what no commit names.
"""

from __future__ import annotations

import json
import re
from collections import Counter

from statsvc.errors import DamagedObject, StoreError
from statsvc.integrity.findings import Damage, Findings, Verdict
from statsvc.integrity.fits import FitCheck
from statsvc.integrity.metadata import array_faults, root_fault, teacher_fault
from statsvc.integrity.recover import RecoveredStore, RecoveredTeacher, rows_left
from statsvc.integrity.unaccounted import has_objects, take
from statsvc.integrity.units import UnitCheck, cache_specs
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.lease import driven_since
from statsvc.storage.local import LocalBackend
from statsvc.store.arrays import attributes
from statsvc.store.commits import Commit, teachers_with_commits
from statsvc.store.index import Entry, entry_of
from statsvc.store.layout import FORMAT, ArraySpec, moments_arrays, sample_arrays, teacher_status
from statsvc.store.paths import CACHE_SET, INDEX, RUN, commit_folder, commit_path
from statsvc.store.reader import Store, Teacher, open_store
from statsvc.store.sealed import unseal

ROOT = "zarr.json"
RUN_KEYS = ("plan", "locations", "quarantine")
FORMAT_NAME = re.compile(r"statsvc/[0-9]+")


def verify_store(location: str) -> tuple[int, list[Damage]]:
    """How many objects were checked, and those that are damaged or foreign, by path."""
    verdict = examine(location)
    return verdict.checked, verdict.damage


def examine(location: str) -> Verdict:
    """All there is to say about a store. Raises where there is none."""
    storage = open_backend(location)
    rows, commits = rows_left(storage), bool(storage.list(".statsvc/commits"))
    try:
        return _examine(Store(storage) if commits else open_store(location), Findings())
    except StoreError as error:
        if not commits and not isinstance(error, DamagedObject):
            raise
        if FORMAT_NAME.fullmatch(str(_other_format(storage))):
            reason = f"{error}; if no other version wrote it, remove it, and the next run restores it"
            return Verdict(1, [Damage(ROOT, reason, None, removed=False)], [])
        findings = Findings()
        findings.damaged(ROOT, error)
        if rows is not None:
            return _examine(RecoveredStore(storage, rows), findings)
        _Walk(RecoveredStore(storage, 1), findings, []).nothing_but_commits()
        return findings.verdict()


def _examine(store: Store, findings: Findings) -> Verdict:
    """A store of which it is known, or to be had from the rest, how many rows a dataset shard has."""
    index = list(UnitCheck(store, findings).commits("index"))
    findings.checked += 1
    if ROOT not in findings.damage and (fault := root_fault(store, index)):
        findings.damaged(ROOT, fault)
        if (rows := rows_left(store.backend)) is not None:
            store = RecoveredStore(store.backend, rows)
    _Walk(store, findings, index).everything()
    return findings.verdict()


def _other_format(storage: Backend) -> object:
    """The format that a root names, if it is not ours."""
    try:
        found = attributes(storage, "")["format"]
    except (DamagedObject, KeyError):
        return None
    return found if found != FORMAT else None


class _Walk:
    """The way through a store: what is looked at and when, since one thing tells what another must be.

    index  the sound commits of the index
    """

    def __init__(self, store: Store, findings: Findings, index: list[Commit]) -> None:
        self._store, self._findings, self._index = store, findings, index
        self._units, self._fits = UnitCheck(store, findings), FitCheck(store, findings)
        self._arrays = list[tuple[ArraySpec, int]]()  # that are there, with the dataset shards they must have room for

    def everything(self) -> None:
        """Fits come after pilots, and what a whole store must have after all of its teachers."""
        for commit in self._index:
            self._units.objects(commit, None)
        for name in [name for name, count in Counter(commit.name for commit in self._index).items() if count > 1]:
            for path in [commit.path for commit in self._index if commit.name == name]:
                self._findings.damaged(path, f"several commits index the dataset shard {name}", path)
        self._arrays += [(spec, _shards(self._index)) for spec in sample_arrays(self._store.rows_per_shard).values()]
        self._run_record()
        self._index_summary()
        self._fits.pilots()
        strangers = self._others()
        for name in sorted({*self._store.teachers(), *self._worked_on()} - strangers):
            self._findings.checked += 1
            if teacher := self._described(name):
                self._teacher(teacher)
        self._fits.missing_pilot()
        for path, fault in array_faults(self._store.backend, self._arrays):
            self._findings.checked += 1
            if fault:
                self._findings.damaged(path, fault)
        self._fits.earlier_fits()

    def nothing_but_commits(self) -> None:
        """Without a root, and without anything that tells how many rows a dataset shard has, all is done again."""
        self._units.given_up("index")
        for teacher in self._store.teachers():
            if fault := teacher_fault(self._store, teacher):
                self._findings.damaged(f"teachers/{teacher}/{ROOT}", fault)
        for teacher in teachers_with_commits(self._store.backend):
            self._units.given_up("measure", teacher)
            self._units.given_up("cache", teacher)
        self._run_record()
        self._index_summary()
        self._fits.pilots()

    def _run_record(self) -> None:
        """The record of the run has no checksum, and nothing in it decides a number."""
        try:
            found = json.loads(self._store.backend.read(RUN))
            if not isinstance(found, dict) or not all(isinstance(found.get(key, {}), dict) for key in RUN_KEYS):
                raise ValueError("not the record of a run")
        except FileNotFoundError:
            pass
        except (ValueError, RecursionError) as error:
            self._findings.damaged(RUN, f"{error}; the next run writes it, and takes up again what was quarantined")

    def _index_summary(self) -> None:
        """What was derived from the commits of the index also tells of a sound commit that is not the one we had."""
        try:
            known = {shard: Entry(*rest) for shard, *rest in unseal(INDEX, self._store.backend.read(INDEX))["shards"]}
        except FileNotFoundError:
            return
        except (DamagedObject, LookupError, TypeError, ValueError) as error:
            self._findings.damaged(INDEX, error)
            return
        for commit in self._index:
            same = known.get(commit.shard, entry_of(commit)) == entry_of(commit)
            if not same and commit.path not in self._findings.damage:
                reason = f"not what {INDEX} has of dataset shard {commit.shard}"
                self._findings.damaged(commit.path, reason, commit.path)
                self._findings.damaged(INDEX, f"not what {commit.path} has")

    def _others(self) -> set[str]:
        """Objects that no commit names; returns the teachers whose commits are such."""
        storage = self._store.backend
        foreign, self._findings.unfinished = take(storage)
        for path, reason, ours in foreign:
            kept = "" if ours else "; it is left alone: move it away, or remove it"
            self._findings.damaged(path, f"foreign: {reason}{kept}", foreign=True, removed=ours)
        if isinstance(storage, LocalBackend) and driven_since(storage) is None:  # else a driver may still write them
            self._findings.unfinished += storage.partials()
        # A commit that is ours and foreign is of no teacher of this store; anything may lie beside those of one.
        of_teachers = (path.split("/") for path, _, ours in foreign if ours and path.startswith(".statsvc/commits/"))
        return {parts[3] for parts in of_teachers if parts[2] in ("measure", "cache")}

    def _worked_on(self) -> list[str]:
        """The teachers with commits."""
        storage = self._store.backend
        folders = {
            name: [commit_folder(phase, name) for phase in ("measure", "cache")]
            for name in teachers_with_commits(storage)
        }
        return [name for name in folders if any(has_objects(storage, folder) for folder in folders[name])]

    def _described(self, name: str) -> Teacher | None:
        """A teacher, also where its metadata are damaged but enough else is left of it."""
        fault, path = teacher_fault(self._store, name), f"teachers/{name}/{ROOT}"
        if not fault:
            return self._store.teacher(name)
        try:
            teacher = RecoveredTeacher(self._store, name)
        except DamagedObject:
            self._findings.damaged(path, f"{fault}; too little is left to say what the teacher was")
            self._units.given_up("measure", name)
            self._units.given_up("cache", name)
            self._fits.given_up(name)
            return None
        self._findings.damaged(path, fault)
        return teacher

    def _teacher(self, teacher: Teacher) -> None:
        """All that was done for one teacher."""
        measured, cached = list(self._units.commits("measure", teacher)), list[Commit]()
        for output, shape in teacher.outputs.items():
            specs = moments_arrays(teacher.name, output, shape.dim)
            self._arrays += [(spec, _shards(measured)) for spec in specs.values()]
        cache_sets = self._store.backend.list(commit_folder("cache", teacher.name))
        for cache_set in (name for name in cache_sets if re.fullmatch(CACHE_SET, name)):
            commits = list(self._units.commits("cache", teacher, cache_set))
            for output in teacher.outputs if commits else ():
                specs = cache_specs(teacher, commits[0], output)
                self._arrays += [(spec, _shards(commits)) for spec in specs.values()]
            cached += commits
        self._arrays.append((teacher_status(teacher.name, self._store.rows_per_shard), _shards(cached)))
        indexed = {commit.shard for commit in self._index}
        for commit in measured + cached:
            self._units.objects(commit, teacher)
            if commit.shard not in indexed:
                self._findings.damaged(commit_path("index", commit.shard), f"missing, though {commit.path} is there")
        in_use = {
            digest: f"cache set {commit.set}" for commit in cached for digest in (commit.transform or {}).values()
        }
        self._fits.teacher(teacher, in_use)


def _shards(commits: list[Commit]) -> int:
    """How many dataset shards an array must have room for."""
    return 1 + max((commit.shard for commit in commits), default=-1)
