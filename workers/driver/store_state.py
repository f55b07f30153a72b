"""What a store holds, read once into plain data: the other side of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from statsvc.errors import DamagedObject, NotAStore
from statsvc.storage.backend import Backend
from statsvc.store.commits import Ledger, teachers_with_commits
from statsvc.store.copies import sound_copy, stored_twice
from statsvc.store.index import Index, read_index, read_summary
from statsvc.store.paths import (
    ROOT,
    commit_folder,
    fit_path,
    is_raw,
    metadata_path,
    report_path,
    teacher_group,
    transform_path,
)
from statsvc.store.records import (
    Fit,
    PilotRecord,
    ReportRecord,
    RootRecord,
    TeacherRecord,
    read_fits,
    read_pilots,
    read_report,
    read_root,
    read_teacher,
)

Fits = dict[str, dict[str, Fit]]  # by output and method


class Lost(NamedTuple):
    """A document that is missing or damaged, and that nothing makes anew with the same bytes."""

    path: str
    has_copy: bool  # and the copy is sound


@dataclass(frozen=True)
class TeacherState:
    """What a store holds of one teacher.

    fits      the current ones; empty before the fit
    reports   on those fits, by output and method
    measured  the dataset shards that have a commit
    cached    the same by cache set
    lost      documents of its current fits
    """

    record: TeacherRecord
    fits: Fits
    reports: dict[str, dict[str, ReportRecord]]
    measured: frozenset[int]
    cached: dict[str, frozenset[int]]
    lost: tuple[Lost, ...] = ()


@dataclass(frozen=True)
class StoreState:
    """What a store holds; empty where there is none yet.

    index          the dataset shards with an index commit, by number
    lost_numbers   of dataset shards whose index commit is lost, by name: the index as it was written down tells them
    used           the numbers under which anything was measured or cached
    strange        something that lies where no store is yet
    lost_root      the root of a store that holds something else
    lost_teachers  metadata of teachers for which something was measured or cached
    """

    root: RootRecord | None = None
    teachers: dict[str, TeacherState] = field(default_factory=dict)
    index: Index = field(default_factory=dict)
    lost_numbers: dict[str, int] = field(default_factory=dict)
    used: frozenset[int] = frozenset()
    pilots: tuple[PilotRecord, ...] = ()
    strange: str | None = None
    lost_root: Lost | None = None
    lost_teachers: dict[str, Lost] = field(default_factory=dict)

    @classmethod
    def read(cls, backend: Backend) -> StoreState:
        """Raises DamagedObject for a document without which nothing can be told of the store."""
        root = _read_root(backend)
        ledger, names = Ledger(backend), _teachers(backend)
        summary = read_summary(backend)
        index = read_index(backend, ledger, summary)
        teachers = {name: _read_teacher(backend, ledger, name) for name in names}
        used = frozenset[int]().union(*(each.measured.union(*each.cached.values()) for each in teachers.values()))
        lost_teachers = {}
        for name in teachers_with_commits(backend):
            if name not in teachers and (
                shards := _measured(ledger, name).union(*_cached(backend, ledger, name).values())
            ):
                lost_teachers[name] = lost_document(backend, metadata_path(teacher_group(name)))
                used |= shards
        is_lost = root is None and (index or used or any(True for _ in stored_twice(backend)))
        return cls(
            root=root,
            teachers=teachers,
            index=index,
            lost_numbers={entry.name: shard for shard, entry in summary.items() if shard not in index},
            used=used,
            pilots=tuple(read_pilots(backend).values()),
            strange=next((name for name in backend.list("") if name != ".statsvc"), None) if root is None else None,
            lost_root=lost_document(backend, ROOT) if is_lost else None,
            lost_teachers=lost_teachers,
        )

    def pilot_of(self, teacher: str) -> PilotRecord | None:
        """The pilot that a teacher was measured with, or is to be measured with."""
        return next((pilot for pilot in self.pilots if teacher in pilot.teachers), None)


def _read_root(backend: Backend) -> RootRecord | None:
    try:
        return read_root(backend)
    except NotAStore:
        return None


def _teachers(backend: Backend) -> list[str]:
    names = backend.list("teachers")
    return [name for name in names if backend.size(metadata_path(teacher_group(name))) is not None]


def _read_teacher(backend: Backend, ledger: Ledger, name: str) -> TeacherState:
    record, cached, lost = read_teacher(backend, name), _cached(backend, ledger, name), list[Lost]()
    fits: Fits = {}
    try:
        found = read_fits(backend, name)
        fits = found.root if found else {}
    except DamagedObject:
        lost.append(lost_document(backend, fit_path(name)))
    if not fits and not lost:
        missing = lost_document(backend, fit_path(name))
        if missing.has_copy or any(not is_raw(cache_set) for cache_set in cached):
            lost.append(missing)
    reports: dict[str, dict[str, ReportRecord]] = {}
    artifacts = set(backend.list(transform_path("").rpartition("/")[0])) if fits else set()
    for output, methods in fits.items():
        reports[output] = {}
        for method, digest in methods.items():
            if not isinstance(digest, str):
                continue
            if transform_path(digest).rpartition("/")[2] not in artifacts:
                lost.append(lost_document(backend, transform_path(digest)))
            try:
                reports[output][method] = read_report(backend, digest)
            except DamagedObject:
                lost.append(lost_document(backend, report_path(digest)))
    return TeacherState(record, fits, reports, _measured(ledger, name), cached, tuple(lost))


def _measured(ledger: Ledger, name: str) -> frozenset[int]:
    return frozenset(ledger.shards("measure", name))


def _cached(backend: Backend, ledger: Ledger, name: str) -> dict[str, frozenset[int]]:
    return {
        cache_set: frozenset(ledger.shards("cache", name, cache_set))
        for cache_set in backend.list(commit_folder("cache", name))
    }


def lost_document(backend: Backend, path: str) -> Lost:
    """A document that is missing or damaged, and whether its copy is sound."""
    return Lost(path, sound_copy(backend, path) is not None)
