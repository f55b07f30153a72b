"""How much there is of everything, counted from commits: each is read once, new ones when somebody asks."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from api.live import LiveStore
from statsvc.errors import DamagedObject, NotAStore
from statsvc.layout import LEASE, LEASE_SECONDS, RUN
from statsvc.ledger import Commit
from statsvc.store import Store

REFRESH_SECONDS = 1.0  # how old an answer may be
RATE_SECONDS = 60.0  # over which a rate is taken


@dataclass
class Tally:
    """The commits of one phase, teacher and cache set, and their sums."""

    counted: dict[int, tuple[int, int, int, Counter[str]]] = field(default_factory=dict)  # by dataset shard
    samples: int = 0
    rows: int = 0
    nbytes: int = 0
    failed: int = 0
    status: Counter[str] = field(default_factory=Counter)
    damaged: int = 0

    def refresh(self, store: Store, phase: str, teacher: str | None = None, set_: str | None = None) -> None:
        """Count the commits that are new, and no longer those that are gone."""
        present = store.ledger.shards(phase, teacher, set_)
        if gone := self.counted.keys() - set(present):
            for shard in gone:
                self._add(*self.counted.pop(shard), sign=-1)
        self.damaged = 0
        for shard in present:
            if shard not in self.counted:
                try:
                    commit = store.ledger.read(phase, shard, teacher, set_)
                except DamagedObject:
                    self.damaged += 1
                    continue
                if commit is not None:
                    self.counted[shard] = _figures(commit)
                    self._add(*self.counted[shard])

    def _add(self, samples: int, rows: int, nbytes: int, status: Counter[str], sign: int = 1) -> None:
        self.samples += sign * samples
        self.rows += sign * rows
        self.nbytes += sign * nbytes
        for name, count in status.items():
            self.status[name] += sign * count


def _figures(commit: Commit) -> tuple[int, int, int, Counter[str]]:
    nbytes = sum(record.bytes for record in commit.objects)
    return commit.samples or 0, commit.rows, nbytes, Counter(commit.status or {})


class Census:
    """Tallies of the store, at most REFRESH_SECONDS old."""

    def __init__(self, live: LiveStore) -> None:
        self._live = live
        self._lock = threading.Lock()
        self._taken = 0.0
        self._store: Store | None = None
        self._clear()

    def _clear(self) -> None:
        self.index = Tally()
        self.measured: dict[str, Tally] = {}
        self.cached: dict[str, dict[str, Tally]] = {}
        self.fingerprints: dict[str, str] = {}
        self.fitted: dict[str, bool] = {}
        self._history: deque[tuple[float, int]] = deque()

    def take(self) -> Census:
        """Bring everything up to date, unless somebody just did. Raises NotAStore."""
        store = self._live.current()
        with self._lock:
            if store is not self._store:
                self._clear()  # another store than before
                self._store, self._taken = store, 0.0
            if time.monotonic() - self._taken >= REFRESH_SECONDS:
                self._refresh(store)
                self._taken = time.monotonic()
        return self

    def _refresh(self, store: Store) -> None:
        self.index.refresh(store, "index")
        names = store.teachers()
        for name in names:
            teacher = self._live.teacher(name)
            if self.fingerprints.get(name) != teacher.fingerprint:
                self.measured[name], self.cached[name] = Tally(), {}
                self.fingerprints[name] = teacher.fingerprint
            self.measured[name].refresh(store, "measure", name)
            sets = teacher.cache_sets()
            self.cached[name] = {set_: self.cached[name].get(set_, Tally()) for set_ in sets}
            for set_, tally in self.cached[name].items():
                tally.refresh(store, "cache", name, set_)
            self.fitted[name] = bool(self._live.fits(teacher))
        for name in self.fingerprints.keys() - set(names):
            for known in (self.measured, self.cached, self.fingerprints, self.fitted):
                known.pop(name)
        self._history.append((time.monotonic(), self.rows()))
        while self._history[0][0] < time.monotonic() - RATE_SECONDS:
            self._history.popleft()

    def rows(self) -> int:
        """Rows that were measured or cached, for all teachers together."""
        measured = sum(tally.rows for tally in self.measured.values())
        return measured + sum(tally.rows for sets in self.cached.values() for tally in sets.values())

    def rate(self) -> float:
        """Rows a second over the last minute, for all teachers together."""
        if len(self._history) < 2:
            return 0.0
        (begun, first), (ended, last) = self._history[0], self._history[-1]
        return max(last - first, 0) / (ended - begun) if ended > begun else 0.0

    def progress(self) -> dict[str, Any]:
        """How far the run is; `state` is waiting (no store yet), running, stopped or finished."""
        try:
            self.take()
        except NotAStore:
            return {"state": "waiting", "dataset_shards": {"planned": None, "indexed": 0, "quarantined": 0},
                    "samples": 0, "rows_per_second": 0.0, "teachers": {}}  # fmt: skip
        planned, quarantined, names = self._run_record()
        teachers = {}
        for name in sorted({*names, *self.fingerprints}):
            sets, measured = self.cached.get(name, {}), self.measured.get(name, Tally())
            teachers[name] = {
                "measured": {"dataset_shards": len(measured.counted), "rows": measured.rows},
                "fitted": self.fitted.get(name, False),
                "cached": {
                    set_: {"dataset_shards": len(tally.counted), "rows": tally.rows, "bytes": tally.nbytes,
                           "status": {name: count for name, count in tally.status.items() if count}}
                    for set_, tally in sets.items()
                },
            }  # fmt: skip
        return {
            "state": self._state(planned, quarantined, names),
            "dataset_shards": {
                "planned": planned, "indexed": len(self.index.counted), "quarantined": quarantined,
            },
            "samples": self.index.samples,
            "rows_per_second": round(self.rate(), 2),
            "teachers": teachers,
        }  # fmt: skip

    def _state(self, planned: int | None, quarantined: int, names: list[str]) -> str:
        try:
            heartbeat = json.loads(self._live.backend.read(LEASE))["heartbeat"]
            if time.time() - heartbeat <= LEASE_SECONDS:
                return "running"
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            pass
        due = max(len(self.index.counted), (planned or 0)) - quarantined
        done = [max((len(tally.counted) for tally in self.cached.get(name, {}).values()), default=0) for name in names]
        return "finished" if due > 0 and done and min(done) >= due else "stopped"

    def _run_record(self) -> tuple[int | None, int, list[str]]:
        """Numbers and names out of the run's record, which itself is never served: planned and quarantined shards."""
        try:
            found = json.loads(self._live.backend.read(RUN))
            quarantined = {name for shards in found.get("quarantine", {}).values() for name in shards}
            return len(found["locations"]), len(quarantined), list(found["plan"]["teachers"])
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            return None, 0, list(self.fingerprints)
