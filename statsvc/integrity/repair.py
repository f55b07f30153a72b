"""What to remove of a damaged store, so that the next run restores it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any, NamedTuple

from statsvc.errors import DamagedObject
from statsvc.integrity.findings import Damage, Verdict
from statsvc.integrity.verify import examine
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.fence import FencedBackend
from statsvc.storage.lease import Lease
from statsvc.store.commits import Ledger, pilots, teachers_with_commits
from statsvc.store.index import read_index, write_summary
from statsvc.store.paths import INDEX, RUN, commit_folder, fit_path, pilot_path
from statsvc.store.sealed import seal, unseal

PHASES = ("index", "measure", "cache")
UNIT = re.compile(r"\.statsvc/commits/(index|measure|cache)/(?:.+/)?([0-9]+)\.json")


class Repaired(NamedTuple):
    """removed: paths; requeued: how many dataset shards the next run does again, by phase, that were committed."""

    removed: list[str]
    requeued: dict[str, int]


def verify_and_repair(location: str, tell: Callable[[str], None]) -> tuple[Verdict, Repaired]:
    """Look at everything and repair it, under one lease: nobody restores meanwhile what is about to be removed.

    Raises as `repair` and `examine` do; tell: what is waited for.
    """
    storage = open_backend(location)
    if not (storage.exists() or storage.list(".statsvc")):
        return examine(location), Repaired([], {})  # it says what is wrong, and nothing is written there
    storage.check()
    lease = Lease(storage)
    lease.wait_for_others(tell)
    with lease:
        fenced = FencedBackend(storage, lease.fence)
        if swept := fenced.sweep():
            tell(f"removed {swept} unfinished files of an earlier run")
        verdict = examine(location)
        return verdict, _repair(fenced, verdict.damage)


def repair(location: str, damage: Iterable[Damage]) -> Repaired:
    """Remove damaged objects and the commits that vouch for them; write down again which pilot was fitted.

    A unit without its commit is missing, and everything of it is written anew with the same bytes. Without its index,
    a dataset shard is read again, and what was done under its number goes, too: it gets the same one where its key
    hashes are left, and may get another one where they are not. A fit goes with its moments. Whatever dies in between,
    to repair again does the rest. Raises LeaseError while a driver works on the store, and PlanError for one that is
    read only.
    """
    storage = open_backend(location)
    storage.check()
    with Lease(storage) as lease:
        return _repair(FencedBackend(storage, lease.fence), damage)


def _repair(storage: Backend, damage: Iterable[Damage]) -> Repaired:
    index = commit_folder("index")
    paths = {path for found in damage if found.removed for path in (found.path, found.commit) if path is not None}
    lost = {path.rpartition("/")[2] for path in paths if path.startswith(f"{index}/")}
    records = _pilots(storage, paths)
    with_pilot = {name for record in records.values() for name in record["teachers"]}
    for teacher in sorted({*teachers_with_commits(storage), *_fitted(storage)}):
        measured, cached = commit_folder("measure", teacher), commit_folder("cache", teacher)
        for folder in (measured, *(f"{cached}/{cache_set}" for cache_set in storage.list(cached))):
            paths |= {f"{folder}/{name}" for name in lost & set(storage.list(folder))}
        if teacher not in with_pilot or any(path.startswith(f"{measured}/") for path in paths):
            paths.add(fit_path(teacher))
    for path, record in records.items():
        if storage.size(path) is None or path in paths:
            storage.write(path, seal(record))
    removed = [path for path in sorted(paths - records.keys(), key=_order) if storage.size(path) is not None]
    for path in removed:
        storage.remove(path)
    if INDEX in paths:
        write_summary(storage, read_index(storage, Ledger(storage)))
    units = {(found[1], found[2]) for path in removed if (found := UNIT.fullmatch(path))}
    return Repaired(removed, {phase: sum(unit[0] == phase for unit in units) for phase in PHASES})


def _pilots(storage: Backend, damaged: set[str]) -> dict[str, dict[str, Any]]:
    """The pilots by path: those that are sound, and those that the reports on their fits still tell of.

    A pilot was chosen once, of the dataset shards that there were: no run would choose it again.
    """
    folder = commit_folder("pilot")
    sound = dict[str, dict[str, Any]]()
    for path in set(pilots(storage)) - damaged:
        try:
            record = unseal(path, storage.read(path))
            if pilot_path(record["teachers"]) == path:
                sound[path] = record
        except (DamagedObject, LookupError, TypeError):
            continue  # verify could not come so far
    named = {name for record in sound.values() for name in record["teachers"]}
    others = [name for name in _teachers(storage) if name not in named]
    told = {name: about for name in others if (about := _told(storage, name))}
    for path in sorted(path for path in damaged if path.startswith(f"{folder}/")):
        for teachers in (list(some) for n in range(len(others), 0, -1) for some in combinations(others, n)):
            if pilot_path(teachers) != path:
                continue
            shared = [{key: told[name][key] for key in ("shards", "options")} for name in teachers if name in told]
            if shared and all(about == shared[0] for about in shared):
                near = {name: told[name]["near"] for name in teachers if name in told and told[name]["near"]}
                sound[path] = {"teachers": teachers, **shared[0], **({"near": near} if near else {})}
    return sound


def _told(storage: Backend, teacher: str) -> dict[str, Any] | None:
    """What the reports on a teacher's current fits say of its pilot; else those on all its fits, if they agree.

    shards, options and by output the transforms it was to be near
    """
    try:
        fits = unseal(fit_path(teacher), storage.read(fit_path(teacher)))
        current = {digest for methods in fits.values() for digest in methods.values() if isinstance(digest, str)}
    except (FileNotFoundError, DamagedObject, AttributeError):
        current = set()
    names, near, told = storage.list(".statsvc/reports"), dict[str, str](), list[dict[str, Any]]()
    for path in (f".statsvc/reports/{name}" for name in names if not current or name.removesuffix(".json") in current):
        try:
            report = unseal(path, storage.read(path))
            if report["teacher"] != teacher:
                continue
            record = {"shards": report["pilot"], "options": report["options"]}
            if report["near"] is not None:
                near[report["output"]] = report["near"]
        except (FileNotFoundError, DamagedObject, LookupError):
            continue
        told += [] if record in told else [record]
    return {**told[0], "near": near} if len(told) == 1 else None


def _fitted(storage: Backend) -> list[str]:
    return [name.removesuffix(".json") for name in storage.list(commit_folder("fit"))]


def _teachers(storage: Backend) -> list[str]:
    """Those with commits, in the order of the plan that was run last: so a pilot names them."""
    found = teachers_with_commits(storage)
    try:
        planned = list(json.loads(storage.read(RUN))["plan"]["teachers"])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        planned = []
    return sorted(found, key=lambda name: planned.index(name) if name in planned else len(planned))


def _order(path: str) -> tuple[bool, str]:
    """The index comes last: what is to go with it is found by it."""
    return path.startswith(commit_folder("index")), path
