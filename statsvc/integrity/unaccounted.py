"""Every object that lies in a store, and what accounts for it: a commit, work under way, or nothing.

One listing per folder and no question about single objects: their names tell what they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any, NamedTuple

from statsvc.errors import DamagedObject
from statsvc.storage.backend import Backend
from statsvc.storage.fence import LEASE
from statsvc.store.arrays import attributes
from statsvc.store.commits import COMMIT_NAME, PILOT_NAME, Ledger, teachers_with_commits
from statsvc.store.layout import ArraySpec, cache_arrays, moments_arrays, sample_arrays, teacher_status
from statsvc.store.paths import CACHE_SET, INDEX, RUN, commit_folder, set_dtype

Folder = dict[str, "Folder | None"]  # by a pattern of the name; None: an object

NAME, NUMBER, DIGEST = r"[a-z0-9][a-z0-9_-]{0,63}", r"0|[1-9][0-9]{0,8}", r"[0-9a-f]{64}"
METADATA = re.escape("zarr.json")


def _array(spec: ArraySpec) -> Folder:
    """The folder of an array: how deep its chunks lie depends on its axes."""
    chunk: Folder | None = None
    for _ in spec.shape:
        chunk = {"0": chunk}
    return {METADATA: None, "c": {NUMBER: chunk}}


def _arrays(specs: dict[str, ArraySpec]) -> Folder:
    return {METADATA: None} | {name: _array(spec) for name, spec in specs.items()}


@cache
def _of_set(dtype: str) -> dict[str, ArraySpec]:
    return cache_arrays("t", "s", "o", dtype=dtype, transform=None, tokens=1, k=1, rows=1)


TARGETS = _of_set("int8") | _of_set("float32")
TREE: Folder = {
    METADATA: None,
    "samples": _arrays(sample_arrays(1)),
    "teachers": {
        METADATA: None,
        NAME: {
            METADATA: None,
            "status": _array(teacher_status("t", 1)),
            "moments": {METADATA: None, NAME: _arrays(moments_arrays("t", "o", 1))},
            "cache": {METADATA: None, CACHE_SET: {METADATA: None, NAME: _arrays(TARGETS)}},
        },
    },
    r"\.statsvc": {
        **{re.escape(path.removeprefix(".statsvc/")): None for path in (RUN, LEASE, INDEX)},
        "transforms": {rf"{DIGEST}\.safetensors": None},
        "reports": {rf"{DIGEST}\.json": None},
        "commits": {
            "index": {COMMIT_NAME.pattern: None},
            "measure": {NAME: {COMMIT_NAME.pattern: None}},
            "fit": {rf"{NAME}\.json": None},
            "pilot": {PILOT_NAME.pattern: None},
            "cache": {NAME: {CACHE_SET: {COMMIT_NAME.pattern: None}}},
        },
    },
}


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
    suspects = [(path, shaped) for path, shaped in _objects(storage, "", TREE) if not shaped or accounts.lacks(path)]
    found = Inventory([], [])
    accounts = _Accounts(storage)  # what a driver did meanwhile was described before it was written
    for path, shaped in suspects:
        lacks = accounts.lacks(path) if shaped else "no part of the layout of a store"
        if lacks == UNFINISHED:
            found.unfinished.append(path)
        elif lacks:
            found.foreign.append(Foreign(path, lacks, shaped))
    return found


def _objects(storage: Backend, folder: str, tree: Folder) -> Iterator[tuple[str, bool]]:
    """Every object below a folder, and whether the layout has a place for it; of an unknown folder only itself."""
    for name in storage.list(folder):
        path = f"{folder}/{name}".lstrip("/")
        pattern = next((pattern for pattern in tree if re.fullmatch(pattern, name)), None)
        below = tree[pattern] if pattern is not None else None
        if pattern is not None and below is None:
            yield path, True
        elif pattern is None:
            if storage.size(path) is not None:
                yield path, False
            elif storage.list(path):  # an empty folder is no object
                yield f"{path}/", False
        else:
            assert below is not None  # a folder
            inside = False
            for found in _objects(storage, path, below):
                inside = True
                yield found
            if not inside and storage.size(path) is not None:
                yield path, False  # an object where a folder is due


UNFINISHED = "unfinished"


class _Accounts:
    """What accounts for objects: commits, and the metadata that is written before the objects it describes."""

    def __init__(self, storage: Backend) -> None:
        self._storage, self._ledger = storage, Ledger(storage)
        self._committed = dict[tuple[str | None, ...], set[int]]()
        self._described = dict[str, bool]()
        self._lists = dict[str, list[str]]()
        self._outputs = dict[str, Any]()

    def lacks(self, path: str) -> str:
        """Why an object of the layout is not accounted for; empty where it is."""
        match path.removesuffix("/zarr.json").split("/"):
            case ["samples", array, "c", shard, *_]:
                return self._unit(shard, [("index",)] if array == "key_hash" else self._cached(*self._teachers))
            case [".statsvc", "commits", "fit", name]:
                return self._teacher(name.removesuffix(".json"))
            case [".statsvc", "commits", "measure" | "cache", teacher, *_]:
                return self._teacher(teacher)
            case ["teachers", teacher, *rest]:
                return self._teacher(teacher) or self._of_teacher(teacher, rest)
        return ""  # the root, groups, and what is looked at one by one: commits of the index, pilots, transforms

    def _of_teacher(self, teacher: str, rest: list[str]) -> str:
        match rest:
            case ["status", "c", shard]:
                return self._unit(shard, self._cached(teacher))
            case ["moments", output, *_] | ["cache", _, output, *_] if not self._has(teacher, output):
                return f"{teacher} has no output {output}"
            case ["moments", _, _, "c", shard, *_]:
                return self._unit(shard, [("measure", teacher)])
            case ["cache", set_, *_] if not self._is_set(teacher, set_):
                return f"nothing describes a cache set {set_}"
            case ["cache", set_, _, array, *_] if array not in _of_set(set_dtype(set_)):
                return f"targets of {set_dtype(set_)} have no array {array}"
            case ["cache", set_, _, _, "c", shard, *_]:
                return self._unit(shard, [("cache", teacher, set_)])
        return ""

    def _unit(self, shard: str, units: list[tuple[str, ...]]) -> str:
        """The object of a dataset shard that one of these units has or would have made."""
        if any(int(shard) in self._shards(*unit) for unit in units):
            return ""
        return UNFINISHED if int(shard) < self._room else f"there is no dataset shard {shard}"

    def _shards(self, phase: str, teacher: str | None = None, set_: str | None = None) -> set[int]:
        key = (phase, teacher, set_)
        if key not in self._committed:
            self._committed[key] = set(self._ledger.shards(phase, teacher, set_))
        return self._committed[key]

    def _cached(self, *teachers: str) -> list[tuple[str, ...]]:
        folders = [(name, commit_folder("cache", name)) for name in teachers]
        return [("cache", name, set_) for name, folder in folders for set_ in self._listed(folder)]

    def _teacher(self, teacher: str) -> str:
        return "" if teacher in self._teachers else f"this store has no teacher {teacher}"

    def _has(self, teacher: str, output: str) -> bool:
        """Whether a teacher has an output; of one whose metadata are damaged, nobody knows."""
        if teacher not in self._outputs:
            try:
                self._outputs[teacher] = attributes(self._storage, f"teachers/{teacher}")["outputs"]
            except (DamagedObject, KeyError):
                self._outputs[teacher] = None
        known = self._outputs[teacher]
        return not isinstance(known, dict) or output in known

    def _is_set(self, teacher: str, set_: str) -> bool:
        """Whether anything was cached in a set, or was to be: its metadata come first."""
        group = f"teachers/{teacher}/cache/{set_}"
        if group not in self._described:
            committed = bool(self._shards("cache", teacher, set_))
            self._described[group] = committed or self._storage.size(f"{group}/zarr.json") is not None
        return self._described[group]

    def _listed(self, folder: str) -> list[str]:
        if folder not in self._lists:
            self._lists[folder] = self._storage.list(folder)
        return self._lists[folder]

    @cached_property
    def _teachers(self) -> list[str]:
        return _known_teachers(self._storage)

    @cached_property
    def _room(self) -> int:
        """How many dataset shards there may be: arrays grow before their chunks are written."""
        return max([1 + max(self._shards("index"), default=-1), *map(self._length, sample_arrays(1))])

    def _length(self, array: str) -> int:
        try:
            found = json.loads(self._storage.read(f"samples/{array}/zarr.json"))
            return int(found["shape"][0]) // int(found["chunk_grid"]["configuration"]["chunk_shape"][0])
        except (FileNotFoundError, LookupError, TypeError, ValueError, ZeroDivisionError):
            return 0


def _known_teachers(storage: Backend) -> list[str]:
    """The teachers that a store has or had: those described there, and those of which work and a folder are left."""
    names = [name for name in storage.list("teachers") if re.fullmatch(NAME, name)]
    described = [n for n in names if storage.size(f"teachers/{n}/zarr.json") is not None]
    worked = [n for n in teachers_with_commits(storage) if n not in described and has_objects(storage, f"teachers/{n}")]
    return sorted([*described, *worked])


def has_objects(storage: Backend, folder: str) -> bool:
    """Whether anything lies below a folder."""
    return any(
        storage.size(f"{folder}/{name}") is not None or has_objects(storage, f"{folder}/{name}")
        for name in storage.list(folder)
    )
