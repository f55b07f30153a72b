"""Decoded targets for thin clients: readers that stay open between requests."""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np

from api.live import LiveStore
from statsvc.store import Teacher
from statsvc.targets import Targets

KEPT = 64


class TargetReader:
    """The targets of every teacher, output and cache set, opened at first use."""

    def __init__(self, live: LiveStore) -> None:
        self._live = live
        self._opened = lru_cache(KEPT)(self._open)

    def targets(self, teacher: Teacher, output: str, cache_set: str | None) -> Targets:
        """Raises NotFound naming those there are."""
        return self._opened(teacher, output, cache_set, tuple(teacher.cache_sets()))[0]

    def read(self, teacher: Teacher, output: str, cache_set: str | None, rows: list[int], space: str) -> np.ndarray:
        """float32 [N, T, k], or [N, T, D] in the teacher's space."""
        targets, lock = self._opened(teacher, output, cache_set, tuple(teacher.cache_sets()))
        with lock:  # a reader opens shards as it goes, one request at a time
            return targets.read(rows, space)

    def _open(
        self, teacher: Teacher, output: str, cache_set: str | None, sets: tuple[str, ...]
    ) -> tuple[Targets, threading.Lock]:
        del sets  # part of what is kept: with other sets, another one may be meant
        return teacher.targets(output, cache_set), threading.Lock()
