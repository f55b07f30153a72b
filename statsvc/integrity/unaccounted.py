"""Every object that lies in a store, and what accounts for it: a commit, work under way, or nothing.

One listing per folder and no question about single objects: their names tell what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from statsvc.errors import DamagedObject
from statsvc.numerics.codec import codec
from statsvc.storage.backend import Backend
from statsvc.store.commits import Ledger, teachers_with_commits
from statsvc.store.layout import sample_arrays
from statsvc.store.paths import ObjectPath, commit_folder, is_folder, metadata_path, parse, set_dtype, teacher_group
from statsvc.store.records import parse_json, read_teacher

UNFINISHED = "unfinished"
Unit = tuple[str, str | None, str | None]  # phase, teacher, cache set


class Foreign(NamedTuple):
    """An object that nothing in the store accounts for.

    ours  it lies where only this software puts objects
    """

    path: str
    reason: str
    ours: bool


class Inventory(NamedTuple):
    foreign: list[Foreign]
    unfinished: list[str]  # objects of units without a commit


def take(storage: Backend) -> Inventory:
    """What is not accounted for; nothing behind a service, which hides such objects and lists no root."""
    accounts = _Accounts(storage)
    suspects = [path for path in _objects(storage, "") if (known := parse(path)) is None or accounts.lacks(known)]
    found = Inventory([], [])
    accounts = _Accounts(storage)  # what a driver did meanwhile was described before it was written
    for path in suspects:
        known = parse(path)
        lacks = accounts.lacks(known) if known else "no part of the layout of a store"
        if lacks == UNFINISHED:
            found.unfinished.append(path)
        elif lacks:
            found.foreign.append(Foreign(path, lacks, known is not None))
    return found


def _objects(storage: Backend, folder: str) -> Iterator[str]:
    """Every object below a folder; of a folder that the layout does not have only itself, with a slash."""
    for name in storage.list(folder):
        path = f"{folder}/{name}".lstrip("/")
        if parse(path) is not None:
            yield path
        elif not is_folder(path):
            if storage.size(path) is not None:
                yield path
            elif storage.list(path):  # an empty folder is no object
                yield f"{path}/"
        else:
            inside = False
            for found in _objects(storage, path):
                inside = True
                yield found
            if not inside and storage.size(path) is not None:
                yield path  # an object where a folder belongs


class _Accounts:
    """What accounts for objects: commits, and the metadata that is written before the objects it describes."""

    def __init__(self, storage: Backend) -> None:
        self._storage, self._ledger = storage, Ledger(storage)
        self._committed = dict[Unit, set[int]]()
        self._described = dict[str, bool]()
        self._lists = dict[str, list[str]]()
        self._outputs = dict[str, set[str] | None]()

    def lacks(self, found: ObjectPath) -> str:
        """Why an object of the layout is not accounted for; empty where it is."""
        teacher, output, cache_set = found.teacher, found.output, found.cache_set
        if teacher is not None and teacher not in self._teachers:
            return f"this store has no teacher {teacher}"
        if teacher is not None and output is not None and not self._has(teacher, output):
            return f"{teacher} has no output {output}"
        if teacher is not None and cache_set is not None and found.kind != "commit":
            if not self._is_set(teacher, cache_set):
                return f"nothing describes a cache set {cache_set}"
            if found.array is not None and found.array not in _arrays_of(cache_set):
                return f"targets of {set_dtype(cache_set)} have no array {found.array}"
        if found.kind != "chunk":
            return ""  # what is looked at one by one: metadata, commits of the index, pilots, transforms, reports
        assert found.shard is not None
        if any(found.shard in self._shards(unit) for unit in self._units(found)):
            return ""
        return UNFINISHED if found.shard < self._room else f"there is no dataset shard {found.shard}"

    def _units(self, found: ObjectPath) -> list[Unit]:
        """Those of which one has or would have made a chunk."""
        assert found.phase is not None
        if found.phase != "cache" or found.cache_set is not None:
            return [(found.phase, found.teacher, found.cache_set)]
        teachers = [found.teacher] if found.teacher is not None else self._teachers
        return [("cache", name, set_) for name in teachers for set_ in self._listed(commit_folder("cache", name))]

    def _shards(self, unit: Unit) -> set[int]:
        if unit not in self._committed:
            self._committed[unit] = set(self._ledger.shards(*unit))
        return self._committed[unit]

    def _has(self, teacher: str, output: str) -> bool:
        """Whether a teacher has an output; of one whose metadata are damaged, nobody knows."""
        if teacher not in self._outputs:
            try:
                self._outputs[teacher] = set(read_teacher(self._storage, teacher).outputs)
            except DamagedObject:
                self._outputs[teacher] = None
        known = self._outputs[teacher]
        return known is None or output in known

    def _is_set(self, teacher: str, set_: str) -> bool:
        """Whether anything was cached in a set, or was to be: its metadata come first."""
        path = metadata_path(f"{teacher_group(teacher)}/cache/{set_}")
        if path not in self._described:
            committed = bool(self._shards(("cache", teacher, set_)))
            self._described[path] = committed or self._storage.size(path) is not None
        return self._described[path]

    def _listed(self, folder: str) -> list[str]:
        if folder not in self._lists:
            self._lists[folder] = self._storage.list(folder)
        return self._lists[folder]

    @cached_property
    def _teachers(self) -> list[str]:
        return known_teachers(self._storage)

    @cached_property
    def _room(self) -> int:
        """How many dataset shards there may be: arrays grow before their chunks are written."""
        return max([1 + max(self._shards(("index", None, None)), default=-1), *map(self._length, sample_arrays(1))])

    def _length(self, array: str) -> int:
        path = metadata_path(f"samples/{array}")
        try:
            found = parse_json(path, self._storage.read(path))
            return int(found["shape"][0]) // int(found["chunk_grid"]["configuration"]["chunk_shape"][0])
        except (FileNotFoundError, DamagedObject, LookupError, TypeError, ValueError, ZeroDivisionError):
            return 0


def _arrays_of(cache_set: str) -> set[str]:
    return {"target_mean", "target_var", *(part.name for part in codec(set_dtype(cache_set)).arrays)}


def known_teachers(storage: Backend) -> list[str]:
    """The teachers that a store has or had: those described there, and those of which work and a folder are left."""
    names = [name for name in storage.list("teachers") if is_folder(teacher_group(name))]
    described = [name for name in names if storage.size(metadata_path(teacher_group(name))) is not None]
    worked = [
        name
        for name in teachers_with_commits(storage)
        if name not in described and has_objects(storage, teacher_group(name))
    ]
    return sorted([*described, *worked])


def has_objects(storage: Backend, folder: str) -> bool:
    """Whether anything lies below a folder."""
    return any(
        storage.size(f"{folder}/{name}") is not None or has_objects(storage, f"{folder}/{name}")
        for name in storage.list(folder)
    )
