"""Does a store hold what its commits say? Every byte is read.

Here is the way through a store; `copies` looks at what is stored twice, `units` at dataset shards, `fits` at fits,
`metadata` at zarr.json, and `unaccounted` at what no commit names.
"""

from __future__ import annotations

from collections import Counter

from statsvc.errors import DamagedObject, NotFound, StoreError
from statsvc.integrity.copies import check_copies, lost, settle
from statsvc.integrity.findings import Findings, Verdict
from statsvc.integrity.fits import FitCheck
from statsvc.integrity.metadata import array_faults, root_fault, teacher_fault
from statsvc.integrity.unaccounted import has_objects, take
from statsvc.integrity.units import UnitCheck, cache_specs
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.lease import driven_since
from statsvc.storage.local import LocalBackend
from statsvc.store.commits import Commit, teachers_with_commits
from statsvc.store.index import entry_of, parse_summary
from statsvc.store.layout import ArraySpec, moments_arrays, sample_arrays, teacher_status
from statsvc.store.paths import (
    INDEX,
    ROOT,
    RUN,
    commit_folder,
    commit_path,
    is_folder,
    metadata_path,
    parse,
    teacher_group,
)
from statsvc.store.reader import Store, open_store
from statsvc.store.records import fault_named_by, read_run


def examine(location: str) -> Verdict:
    """Check a whole store. Raises NotAStore where there is none, StoreError where it cannot be read."""
    storage, findings = open_backend(location), Findings()
    restored = check_copies(storage, findings)
    if restored.size(ROOT) is None and not storage.list(".statsvc/commits"):
        open_store(location)  # which says what is there instead
    try:
        store = Store(restored)
    except StoreError as error:
        # Without a root, nothing says what the rest must be.
        findings.damaged(ROOT, f"missing; {lost(ROOT)}" if restored.size(ROOT) is None else error, removed=False)
        return findings.verdict()
    _Walk(store, storage, findings).everything()
    settle(storage, findings)
    return findings.verdict()


class _Walk:
    """The way through a store: what is looked at and when, since one thing tells what another must be.

    store    as it will be once damaged documents are restored from their copies
    storage  as it is
    """

    def __init__(self, store: Store, storage: Backend, findings: Findings) -> None:
        self._store, self._storage, self._findings = store, storage, findings
        self._units, self._fits = UnitCheck(store, findings), FitCheck(store, findings)
        self._index = list[Commit]()  # its sound commits
        self._arrays = list[tuple[ArraySpec, int]]()  # that are there, with the dataset shards they must have room for

    def everything(self) -> None:
        """Fits come after pilots, and what a whole store must have after all of its teachers."""
        self._findings.checked += 1
        self._index += self._units.commits("index")
        if fault := root_fault(self._store, self._index):
            self._findings.damaged(ROOT, fault)
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
            self._teacher(name)
        self._fits.missing_pilot()
        for path, fault in array_faults(self._store.backend, self._arrays):
            self._findings.checked += 1
            if fault:
                self._findings.damaged(path, fault)
        self._fits.earlier_fits()

    def _run_record(self) -> None:
        """The record of the run has no checksum, and nothing in it decides a number."""
        try:
            read_run(self._storage)
        except DamagedObject as error:
            self._findings.damaged(
                RUN, f"{fault_named_by(error, RUN)}; the next run writes it, and retries what was quarantined"
            )

    def _index_summary(self) -> None:
        """What was derived from the commits of the index also tells of a sound commit that is not the one we had."""
        try:
            known = parse_summary(self._storage.read(INDEX))
        except FileNotFoundError:
            return
        except DamagedObject as error:
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
        foreign, unfinished = take(self._store.backend)
        self._findings.unfinished += unfinished
        for path, reason, ours in foreign:
            kept = "" if ours else "; it is left alone: move it away, or remove it"
            self._findings.damaged(path, f"foreign: {reason}{kept}", foreign=True, removed=ours)
        if isinstance(self._storage, LocalBackend) and driven_since(self._storage) is None:
            self._findings.unfinished += self._storage.partials()  # with a driver, they may still be written
        # A commit that is ours and foreign is of no teacher of this store; anything may lie beside those of one.
        found = (parse(path) for path, _, ours in foreign if ours)
        return {known.teacher for known in found if known and known.kind == "commit" and known.teacher}

    def _worked_on(self) -> list[str]:
        """The teachers with commits."""
        storage = self._storage
        return [
            name
            for name in teachers_with_commits(storage)
            if any(has_objects(storage, commit_folder(phase, name)) for phase in ("measure", "cache"))
        ]

    def _committed_sets(self, teacher: str) -> list[str]:
        names = self._storage.list(commit_folder("cache", teacher))
        return [name for name in names if is_folder(commit_folder("cache", teacher, name))]

    def _teacher(self, name: str) -> None:
        """All that was done for one teacher, unless nothing says any more what the teacher was."""
        self._findings.checked += 1
        path = metadata_path(teacher_group(name))
        damage = self._findings.damage.get(path)
        if damage is not None and not damage.restored:
            return
        try:
            teacher = self._store.teacher(name)
        except NotFound:
            self._findings.damaged(path, f"missing, though work was done for the teacher; {lost(path)}")
            return
        if fault := teacher_fault(teacher):
            self._findings.damaged(path, fault)
        measured, cached = list(self._units.commits("measure", teacher)), list[Commit]()
        for output, shape in teacher.outputs.items():
            specs = moments_arrays(name, output, shape.dim)
            self._arrays += [(spec, _shards(measured)) for spec in specs.values()]
        for cache_set in self._committed_sets(name):
            commits = list(self._units.commits("cache", teacher, cache_set))
            for output in teacher.outputs if commits else ():
                specs = cache_specs(teacher, commits[0], output)
                self._arrays += [(spec, _shards(commits)) for spec in specs.values()]
            cached += commits
        self._arrays.append((teacher_status(name, self._store.rows_per_shard), _shards(cached)))
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
