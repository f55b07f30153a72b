"""The store as it stands at this moment: it may appear, grow or be repaired while it is served.

Nothing is scanned for a request. What was parsed is kept for as long as the object it came from stands there
unreplaced, which one look at the storage tells.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

from api.state.remote import RemoteBackend
from statsvc.errors import NotAStore
from statsvc.storage.backend import Backend
from statsvc.storage.forwarding import UnmappedBackend
from statsvc.store.commits import Commit, Ledger
from statsvc.store.paths import ROOT, commit_path, fit_path, metadata_path, teacher_group
from statsvc.store.reader import Store, Teacher

KEPT_COMMITS = 4096
KEPT_TEACHERS = 256


class LiveLedger(Ledger):
    """Commits as they are now; a bounded number of them is kept in memory."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._parsed = lru_cache(KEPT_COMMITS)(self._parse)

    def read(self, phase: str, shard: int, teacher: str | None = None, set_: str | None = None) -> Commit | None:
        path = commit_path(phase, shard, teacher, set_)
        version = self._backend.version(path)
        if version is None:
            return None
        try:
            return self._parsed(path, version)
        except FileNotFoundError:  # removed in between
            return None

    def _parse(self, path: str, version: str) -> Commit:
        del version  # part of what is kept: a commit that was replaced is read again
        return Commit.from_bytes(path, self._backend.read(path))


class LiveStore:
    """One store for all requests.

    remote  its backend, if that answers over a network; a local one is asked again for every request
    """

    def __init__(self, backend: Backend) -> None:
        self.remote = RemoteBackend(backend) if backend.concurrency > 1 else None
        self.backend = self.remote or backend
        self._lock = threading.Lock()
        self._opened: tuple[str, Store] | None = None
        self._teacher = lru_cache(KEPT_TEACHERS)(self._open_teacher)
        self._fits = lru_cache(KEPT_TEACHERS)(self._read_fits)
        self.moments_digest = lru_cache(KEPT_TEACHERS)(self._read_moments_digest)

    def current(self) -> Store:
        """Raises NotAStore while there is none."""
        version = self.backend.version(ROOT)
        if version is None:
            raise NotAStore("there is no store yet: `statsvc run PLAN` makes it; this service will find it by itself")
        with self._lock:
            if self._opened is None or self._opened[0] != version:
                unmapped = UnmappedBackend(self.backend)
                self._opened = version, Store(unmapped, LiveLedger(unmapped))
            return self._opened[1]

    def teacher(self, name: str) -> Teacher:
        """Raises NotFound naming those there are."""
        store = self.current()
        version = self.backend.version(metadata_path(teacher_group(name)))
        if version is None:
            return store.teacher(name)  # which says what there is
        return self._teacher(store, name, version)

    def fits(self, teacher: Teacher) -> dict[str, dict[str, Any]]:
        """{output: {method: digest | {"refused": reason}}}; empty before the fit."""
        version = self.backend.version(fit_path(teacher.name))
        return {} if version is None else self._fits(teacher, version)

    def _open_teacher(self, store: Store, name: str, version: str) -> Teacher:
        del version
        return store.teacher(name)

    def _read_fits(self, teacher: Teacher, version: str) -> dict[str, dict[str, Any]]:
        del version
        return teacher.fits()

    def _read_moments_digest(self, digest: str) -> str:
        """What a transform was fitted to; kept, as it never changes and its artifact may be large."""
        return self.current().transform(digest).moments_digest
