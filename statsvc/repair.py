"""What to remove of a damaged store, so that the next run restores it."""

from __future__ import annotations

import json
import time

from statsvc.backends import Backend, backend
from statsvc.errors import LeaseError
from statsvc.layout import LEASE, LEASE_SECONDS, commit_folder, fit_path
from statsvc.ledger import teachers_with_commits, unseal
from statsvc.verify import Damage


def repair(location: str, damage: list[Damage]) -> int:
    """Remove damaged objects and the commits that vouch for them; how many that were.

    A unit without its commit is missing, and everything of it is written anew with the same bytes. Without its index, a
    dataset shard may get another number, so what was done under the old one goes, too; and a fit goes with its moments
    and its pilot. Raises LeaseError while a driver works on the store, and PlanError for one that is read only.
    """
    storage, index, pilots = backend(location), commit_folder("index"), commit_folder("pilot")
    storage.check()
    _refuse_while_driven(storage)
    paths = {path for found in damage for path in (found.path, found.commit) if path is not None}
    lost = {path.rpartition("/")[2] for path in paths if path.startswith(f"{index}/")}
    with_pilot = set[str]()
    for path in {f"{pilots}/{name}" for name in storage.list(pilots)} - paths:
        record = unseal(path, storage.read(path))
        if lost & {f"{shard:06d}.json" for shard in record["shards"]}:
            paths.add(path)
        else:
            with_pilot |= set(record["teachers"])
    for teacher in teachers_with_commits(storage):
        measured, cached = commit_folder("measure", teacher), commit_folder("cache", teacher)
        for folder in (measured, *(f"{cached}/{cache_set}" for cache_set in storage.list(cached))):
            paths |= {f"{folder}/{name}" for name in lost & set(storage.list(folder))}
        if teacher not in with_pilot or any(path.startswith(f"{measured}/") for path in paths):
            paths.add(fit_path(teacher))
    there = sorted(path for path in paths if storage.size(path) is not None)
    for path in there:
        storage.remove(path)
    return len(there)


def _refuse_while_driven(storage: Backend) -> None:
    """A driver that died is told from one that lives by its heartbeat alone: this may be another machine."""
    try:
        age = time.time() - json.loads(storage.read(LEASE))["heartbeat"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return
    if age < LEASE_SECONDS:
        raise LeaseError(
            f"a driver works on this store, last heartbeat {max(age, 0):.0f} s ago; repair once it has ended (a lease "
            f"without a heartbeat expires after {LEASE_SECONDS:.0f} s)"
        )
