"""How much there is of everything, counted from commits: each is read once, new ones when somebody asks."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import Any, NamedTuple

from api.state.live_store import LiveStore
from statsvc.errors import DamagedObject, NotAStore
from statsvc.storage.backend import Backend
from statsvc.storage.lease import driven_since
from statsvc.storage.read_ahead import map_ahead
from statsvc.store.commits import Commit
from statsvc.store.index import read_summary
from statsvc.store.paths import RUN, commit_path
from statsvc.store.reader import Store
from statsvc.store.records import RunRecord, read_run

REFRESH_SECONDS = 1.0  # how old an answer may be
SHARE = 0.05  # of the time that may go into counting, once the store is so large that listing it takes long
RATE_SECONDS = 60.0  # over which a rate is taken
NOTHING_YET: dict[str, Any] = {
    "state": "waiting",
    "dataset_shards": {"planned": None, "indexed": 0, "quarantined": 0},
    "samples": 0,
    "rows_per_second": 0.0,
    "teachers": {},
}


class Figures(NamedTuple):
    """What one commit counts."""

    samples: int
    rows: int
    nbytes: int
    status: tuple[tuple[str, int], ...]


class Tally:
    """The commits of one phase, teacher and cache set, and their sums."""

    def __init__(self) -> None:
        self.counted: dict[int, Figures] = {}  # by dataset shard
        self.samples = self.rows = self.nbytes = self.damaged = 0
        self.status: Counter[str] = Counter()
        self._known: dict[Figures, Figures] = {}  # most dataset shards count alike: one object for all of those

    def refresh(self, store: Store, phase: str, teacher: str | None = None, set_: str | None = None) -> None:
        """Count the commits that are new, and no longer those that are gone."""
        present = store.ledger.shards(phase, teacher, set_)
        for shard in self.counted.keys() - set(present):
            self._add(self.counted.pop(shard), -1)
        new = [shard for shard in present if shard not in self.counted]
        known = _summary(store) if phase == "index" and len(new) == len(present) else {}
        self.damaged = 0

        def read(shard: int) -> Figures | DamagedObject | None:
            if shard in known:
                return known[shard]
            try:
                commit = store.ledger.load(commit_path(phase, shard, teacher, set_))
            except DamagedObject as error:
                return error
            return _figures(commit) if commit else None

        for shard, figures in zip(new, map_ahead(read, new, store.backend.concurrency), strict=True):
            if isinstance(figures, DamagedObject):
                self.damaged += 1
            elif figures is not None:
                self.counted[shard] = self._known.setdefault(figures, figures)
                self._add(self.counted[shard], 1)

    def shards(self, start: int = 0) -> list[int]:
        """The dataset shards that were counted, from `start` on, in order."""
        return sorted(shard for shard in list(self.counted) if shard >= start)

    def describe(self) -> dict[str, Any]:
        """The sums, as they are told."""
        status = {name: count for name, count in self.status.items() if count}
        return {"dataset_shards": len(self.counted), "rows": self.rows, "bytes": self.nbytes, "status": status,
                "damaged_commits": self.damaged}  # fmt: skip

    def _add(self, figures: Figures, sign: int) -> None:
        self.samples += sign * figures.samples
        self.rows += sign * figures.rows
        self.nbytes += sign * figures.nbytes
        for name, count in figures.status:
            self.status[name] += sign * count


def _figures(commit: Commit) -> Figures:
    nbytes = sum(record.bytes for record in commit.objects)
    return Figures(commit.samples or 0, commit.rows, nbytes, tuple((commit.status or {}).items()))


def _summary(store: Store) -> dict[int, Figures]:
    """What is told of the index as one object, instead of a commit for every dataset shard."""
    return {shard: Figures(entry.samples, 0, 0, ()) for shard, entry in read_summary(store.backend).items()}


class Counts:
    """Counts of the store, at most REFRESH_SECONDS old."""

    def __init__(self, live: LiveStore) -> None:
        self._live = live
        self._record: tuple[str | None, tuple[int | None, int, list[str]]] | None = None  # with its version
        self._lock = threading.Lock()  # of whoever counts; the others take the counts of the last time
        self._begin(None)

    def _begin(self, store: Store | None) -> None:
        self._store, self._taken, self._took = store, 0.0, 0.0
        self._index = Tally()
        self._measured: dict[str, Tally] = {}
        self._cached: dict[str, dict[str, Tally]] = {}
        self._fingerprints: dict[str, str] = {}
        self._history: deque[tuple[float, int]] = deque()
        self._counts: dict[str, Any] | None = None

    def now(self) -> dict[str, Any]:
        """Indexed dataset shards, samples, rate, and what is measured, fitted and cached of each teacher.

        Raises NotAStore.
        """
        store = self._live.current()
        known = self._counts if store is self._store else None
        if self._lock.acquire(blocking=known is None):
            try:
                if store is not self._store:
                    self._begin(store)
                begun = time.monotonic()
                if self._counts is None or begun - self._taken >= max(REFRESH_SECONDS, self._took / SHARE):
                    self._counts = self._count(store)
                    self._taken = time.monotonic()
                    self._took = self._taken - begun
                known = self._counts
            finally:
                self._lock.release()
        assert known is not None  # else the lock was waited for
        return known

    def sets(self, teacher: str) -> list[str]:
        """The cache sets that have a commit: the folder of one is there before anything is in it."""
        counts = self.now()["teachers"].get(teacher)
        if counts is None:
            return []
        return [name for name, found in counts["cached"].items() if found["dataset_shards"] or found["damaged_commits"]]

    def shards(self, teacher: str, cache_set: str, start: int = 0) -> list[int]:
        """The dataset shards that are cached, from `start` on, in order."""
        self.now()
        tally = self._cached.get(teacher, {}).get(cache_set)
        return tally.shards(start) if tally else []

    def indexed(self) -> list[int]:
        """The dataset shards that are indexed, in order."""
        self.now()
        return self._index.shards()

    def _count(self, store: Store) -> dict[str, Any]:
        self._index.refresh(store, "index")
        teachers = {}
        for name in store.teachers():
            teacher = self._live.teacher(name)
            if self._fingerprints.get(name) != teacher.fingerprint:  # a new one, or another one of that name
                self._fingerprints[name] = teacher.fingerprint
                self._measured[name], self._cached[name] = Tally(), {}
            measured = self._measured[name]
            measured.refresh(store, "measure", name)
            self._cached[name] = {set_: self._cached[name].get(set_, Tally()) for set_ in teacher.cache_sets()}
            for set_, tally in self._cached[name].items():
                tally.refresh(store, "cache", name, set_)
            teachers[name] = {
                "measured": {"dataset_shards": len(measured.counted), "rows": measured.rows},
                "fitted": bool(self._live.fits(teacher)),
                "cached": {set_: tally.describe() for set_, tally in self._cached[name].items()},
            }
        for name in self._fingerprints.keys() - teachers.keys():
            del self._fingerprints[name], self._measured[name], self._cached[name]
        return {
            "indexed": len(self._index.counted),
            "samples": self._index.samples,
            "rows_per_second": round(self._rate(), 2),
            "teachers": teachers,
        }

    def _rate(self) -> float:
        """Rows a second that were measured or cached over the last minute, for all teachers together."""
        rows = sum(tally.rows for tally in self._measured.values())
        rows += sum(tally.rows for sets in self._cached.values() for tally in sets.values())
        self._history.append((time.monotonic(), rows))
        while self._history[0][0] < time.monotonic() - RATE_SECONDS:
            self._history.popleft()
        (begun, before), (ended, now) = self._history[0], self._history[-1]
        return max(now - before, 0) / (ended - begun) if ended > begun else 0.0

    def progress(self) -> dict[str, Any]:
        """How far the run is; `state` is waiting (no store yet), running, stopped or finished."""
        try:
            counts = self.now()
        except NotAStore:
            return {**NOTHING_YET}
        planned, quarantined, names = self._run_record()
        not_begun = {"measured": {"dataset_shards": 0, "rows": 0}, "fitted": False, "cached": {}}
        teachers = {name: counts["teachers"].get(name, not_begun) for name in sorted({*names, *counts["teachers"]})}
        due = max(counts["indexed"], planned or 0) - quarantined
        cached = [
            max((tally["dataset_shards"] for tally in teachers[name]["cached"].values()), default=0)
            for name in names or teachers
        ]
        state = "finished" if due > 0 and cached and min(cached) >= due else "stopped"
        return {
            "state": "running" if self._has_driver() else state,
            "dataset_shards": {"planned": planned, "indexed": counts["indexed"], "quarantined": quarantined},
            "samples": counts["samples"],
            "rows_per_second": counts["rows_per_second"],
            "teachers": teachers,
        }

    def _has_driver(self) -> bool:
        return driven_since(self._live.backend) is not None

    def _run_record(self) -> tuple[int | None, int, list[str]]:
        """Planned and quarantined dataset shards and the teachers of the run's record, which itself is never served."""
        version = self._live.backend.version(RUN)
        if self._record is None or self._record[0] != version:
            self._record = version, _read_record(self._live.backend)
        return self._record[1]


def _read_record(backend: Backend) -> tuple[int | None, int, list[str]]:
    try:
        record = read_run(backend)
    except DamagedObject:
        record = RunRecord()
    quarantined = {name for shards in record.quarantine.values() for name in shards}
    return len(record.locations) or None, len(quarantined), list(record.plan.teachers)
