"""What to restore and what to remove of a damaged store, so that the next run makes the rest again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from statsvc.integrity.findings import Damage, Verdict
from statsvc.integrity.verify import examine
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.fence import FencedBackend
from statsvc.storage.lease import Lease
from statsvc.store.commits import Ledger, teachers_with_commits
from statsvc.store.copies import sound_copy
from statsvc.store.index import read_index, write_summary
from statsvc.store.paths import INDEX, commit_folder, is_stored_twice, original_path, parse

PHASES = ("index", "measure", "cache")


class Repaired(NamedTuple):
    """removed, restored: paths; requeued: by phase, how many dataset shards that were committed are done again."""

    removed: list[str]
    restored: list[str]
    requeued: dict[str, int]


def verify_and_repair(location: str, report: Callable[[str], None]) -> tuple[Verdict, Repaired]:
    """Look at everything and repair it, under one lease: nobody restores meanwhile what is about to be removed.

    Raises as `repair` and `examine` do; report: of what is waited for.
    """
    storage = open_backend(location)
    if not (storage.exists() or storage.list(".statsvc")):
        return examine(location), Repaired([], [], {})  # it says what is wrong, and nothing is written there
    storage.check()
    lease = Lease(storage)
    lease.wait_for_others(report)
    with lease:
        fenced = FencedBackend(storage, lease.fence)
        if swept := fenced.sweep():
            report(f"removed {swept} unfinished files of an earlier run")
        verdict = examine(location)
        return verdict, _repair(fenced, verdict.damage)


def repair(location: str, damage: Iterable[Damage]) -> Repaired:
    """Restore damaged documents from their second copies; remove other damaged objects and the commits that list them.

    A unit without its commit is missing, and everything of it is written again with the same bytes. Without its index,
    a dataset shard is read again, and what was done under its number goes, too: it gets the same number where the index
    summary has it, and may get another one where both are lost. Whatever dies in between, to repair again does the
    rest. Raises LeaseError while a driver works on the store, and PlanError for one that is read only.
    """
    storage = open_backend(location)
    storage.check()
    with Lease(storage) as lease:
        return _repair(FencedBackend(storage, lease.fence), damage)


def _repair(storage: Backend, damage: Iterable[Damage]) -> Repaired:
    damage = list(damage)
    restored = [found.path for found in damage if found.restored and _restore(storage, found.path)]
    paths = {path for found in damage if found.removed for path in (found.path, found.commit) if path is not None}
    lost = {
        found.shard for path in paths if (found := parse(path)) and (found.kind, found.phase) == ("commit", "index")
    }
    for teacher in teachers_with_commits(storage):
        measured, cached = commit_folder("measure", teacher), commit_folder("cache", teacher)
        for folder in (measured, *(f"{cached}/{cache_set}" for cache_set in storage.list(cached))):
            for path in (f"{folder}/{name}" for name in storage.list(folder)):
                if (commit := parse(path)) and commit.shard in lost:
                    paths.add(path)
    removed = [path for path in sorted(paths, key=_order) if storage.size(path) is not None]
    for path in removed:
        storage.remove(path)
    if INDEX in paths:
        write_summary(storage, read_index(storage, Ledger(storage)))
    commits = [found for path in removed if (found := parse(path)) is not None and found.kind == "commit"]
    units = {(commit.phase, commit.shard) for commit in commits}
    return Repaired(removed, restored, {phase: sum(unit[0] == phase for unit in units) for phase in PHASES})


def _restore(storage: Backend, path: str) -> bool:
    """Copy the good one of two copies over the other; False where it is no longer there."""
    if is_stored_twice(path):
        data = sound_copy(storage, path)
        if data is not None:
            storage.write(path, data)
        return data is not None
    original = original_path(path)
    assert original is not None  # only documents that are stored twice are restored
    storage.write(path, storage.read(original))
    return True


def _order(path: str) -> tuple[bool, str]:
    """Remove index commits last; they are needed to find dependants."""
    return path.startswith(commit_folder("index")), path
