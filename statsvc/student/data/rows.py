"""Which rows there are to train on: of every dataset shard, those that the chosen teachers have a target of.

Most dataset shards need no more than their commits, which count; only where teachers differ are rows looked at.

Suffixes: S = dataset shards, C = rows of a dataset shard, N = rows of a dataset shard that are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from statsvc.errors import AbsentRow, NotFound, PlanError
from statsvc.store.commits import Commit
from statsvc.store.layout import BEYOND_RANGE, STATUS_NAMES
from statsvc.store.reader import Store, Targets

Missing = Literal["error", "skip", "mask"]
Chosen = Mapping[str, Mapping[str, Targets]]  # of each teacher, by output
OF_IMAGES = STATUS_NAMES[:3]  # the statuses that all teachers share
SHOWN = 3  # rows that an error lists


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Counted once; it then goes to every process that reads.

    shards      numbers of the dataset shards that have rows to train on
    count_S     how many rows each of them has
    undecodable rows whose image could not be decoded: nobody has them
    missing     by teacher, how many of the other rows it has no target of
    looked_at   by dataset shard, the rows that are used, where teachers differ
    """

    shards: list[int]
    count_S: NDArray[np.int64]
    undecodable: int
    missing: dict[str, int]
    looked_at: dict[int, NDArray[np.int64]]

    def rows_of(self, shard: int, chosen: Chosen) -> NDArray[np.int64]:
        """[N] ascending: the rows of a dataset shard that are used, counted from its first one."""
        if shard in self.looked_at:
            return self.looked_at[shard]
        return np.flatnonzero(_present(next(iter(chosen.values())), shard))


def find_rows(store: Store, chosen: Chosen, missing: Missing, only: Iterable[int] | None) -> TrainingRows:
    """Count the rows of all dataset shards, or of those that `only` names.

    Raises NotFound where there are none; AbsentRow where a teacher lacks a row that missing="error" wants of it.
    """
    if missing not in ("error", "skip", "mask"):
        raise PlanError(f"missing {missing!r} is none of 'error', 'skip', 'mask'")
    wanted = _shards(store, only)
    counting = _Counting(store, chosen, missing)
    scans = [store.ledger.scan("cache", name, _set(chosen[name]), wanted) for name in chosen]
    counts = {
        shard: counting.count(shard, dict(zip(chosen, (commit for _, commit in found), strict=True)))
        for shard, *found in zip(wanted, *scans, strict=True)
    }
    shards = [shard for shard, count in counts.items() if count]
    if not shards:
        raise NotFound(
            f"no row has targets of {', '.join(chosen)}: `statsvc status` says what is cached, `statsvc run` does the "
            "rest"
        )
    count_S = np.array([counts[shard] for shard in shards], np.int64)
    return TrainingRows(shards, count_S, counting.undecodable, dict(counting.lacking), counting.looked_at)


def _shards(store: Store, only: Iterable[int] | None) -> list[int]:
    indexed = store.ledger.shards("index")
    if only is None:
        return indexed
    chosen = sorted(set(only))
    if unknown := set(chosen) - set(indexed):
        there = f"{len(indexed)} of them, {indexed[0]} to {indexed[-1]}" if indexed else "none"
        raise NotFound(f"only=... names the dataset shards {sorted(unknown)[:5]}; the store has {there}")
    return chosen


class _Counting:
    def __init__(self, store: Store, chosen: Chosen, missing: Missing) -> None:
        self._store, self._chosen, self._missing = store, chosen, missing
        self.undecodable = 0
        self.lacking: Counter[str] = Counter(dict.fromkeys(chosen, 0))
        self.looked_at: dict[int, NDArray[np.int64]] = {}

    def count(self, shard: int, commits: Mapping[str, Commit | None]) -> int:
        """The rows of a dataset shard that are used, by the commits of the teachers."""
        there = [commit for commit in commits.values() if commit is not None]
        self.undecodable += (there[0].status or {}).get("undecodable", 0) if there else 0
        if len(there) == len(commits) and all(_is_plain(commit, there[0]) for commit in there):
            return there[0].rows
        return self._look(shard, commits)

    def _look(self, shard: int, commits: Mapping[str, Commit | None]) -> int:
        """Count the rows where teachers differ, and remember which they are."""
        rows, index = self._store.rows_per_shard, self._store.ledger.read("index", shard)
        present_C = {
            name: np.zeros(rows, bool) if commit is None else _present(self._chosen[name], shard)
            for name, commit in commits.items()
        }
        any_C, all_C = np.logical_or.reduce(list(present_C.values())), np.logical_and.reduce(list(present_C.values()))
        for name, commit in commits.items():
            # Where no teacher has a row, what they say of it themselves counts.
            refused = [(commit.status or {}).get(why, 0) for why in (*STATUS_NAMES[3:], BEYOND_RANGE)] if commit else []
            samples = index.rows if index else 0
            lacking = max(sum(refused), int((any_C & ~present_C[name]).sum())) if commit else samples
            if lacking and self._missing == "error":
                raise AbsentRow(self._why(shard, name, commit, lacking))
            self.lacking[name] += lacking
        used_C = any_C if self._missing == "mask" else all_C
        self.looked_at[shard] = np.flatnonzero(used_C)
        return int(used_C.sum())

    def _why(self, shard: int, teacher: str, commit: Commit | None, count: int) -> str:
        index = self._store.ledger.read("index", shard)
        what = f"dataset shard {shard} ({index.name if index else 'not indexed'})"
        ways = "missing='skip' leaves such rows out, missing='mask' keeps what other teachers have"
        if commit is None:
            return (
                f"{what} is not cached for teacher {teacher} in {_set(self._chosen[teacher])}; run the plan to its "
                f"end, or choose other dataset shards with only=...; {ways}"
            )
        reasons = [f"{f.key!r} at position {f.position} ({f.reason})" for f in commit.failed[:SHOWN]]
        return f"teacher {teacher} has no target of {count} rows of {what}: {', '.join(reasons)}; {ways}"


def _is_plain(commit: Commit, other: Commit) -> bool:
    """Whether all that two teachers lack is what the images lack, so that they have the same rows."""
    return commit.status == other.status and set(commit.status or {}) <= set(OF_IMAGES)


def _present(outputs: Mapping[str, Targets], shard: int) -> NDArray[np.bool_]:
    present_C: NDArray[np.bool_] = next(iter(outputs.values())).present(shard)  # all outputs have the same rows
    return present_C


def _set(outputs: Mapping[str, Targets]) -> str:
    return next(iter(outputs.values())).set
