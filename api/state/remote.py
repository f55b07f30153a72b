"""A store on storage that answers over a network: what is asked for every request, asked once a second.

Its errors name buckets and addresses, which are the operator's business: they go to the log, and clients are told
what they can do.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cachetools import TTLCache

from api.errors import StorageFailed, StorageRefused
from statsvc.errors import AbsentRow, DamagedObject, NotAStore, PlanError, StoreError, WrongRows
from statsvc.storage.backend import Backend, Fill, ObjectRecord
from statsvc.storage.forwarding import UnmappedBackend

FRESH_SECONDS = 1.0  # how old a version may be
KEPT_VERSIONS = 8192
RETRY_SECONDS = 5.0  # somebody waits, and may ask again
OURS = (NotAStore, DamagedObject, AbsentRow, WrongRows)  # which mean the store, not the storage

log = logging.getLogger("statsvc.api")


class RemoteBackend(UnmappedBackend):
    """Errors of what the service calls, which only reads, are those that clients may see. Threads share it."""

    def __init__(self, backend: Backend) -> None:
        from statsvc.storage.bucket.backend import ObjectBackend  # here: stores of files do not need the library

        if isinstance(backend, ObjectBackend):
            backend.retry_seconds = RETRY_SECONDS
        super().__init__(backend)
        self._lock = threading.Lock()
        self._versions: TTLCache[str, str | None] = TTLCache(KEPT_VERSIONS, FRESH_SECONDS)

    def version(self, path: str) -> str | None:
        with self._lock, suppress(KeyError):
            return self._versions[path]
        version = self.version_now(path)
        with self._lock:
            self._versions[path] = version
        return version

    def version_now(self, path: str) -> str | None:
        """The version as it is now."""
        with _presentable():
            return self._backend.version(path)

    def read(self, path: str) -> bytes:
        with _presentable():
            return self._backend.read(path)

    @contextmanager
    def fetch(self, record: ObjectRecord, begin: int, end: int) -> Iterator[Fill]:
        with _presentable(), self._backend.fetch(record, begin, end) as fill:
            yield fill

    def size(self, path: str) -> int | None:
        with _presentable():
            return self._backend.size(path)

    def list(self, folder: str) -> list[str]:
        with _presentable():
            return self._backend.list(folder)


@contextmanager
def _presentable() -> Iterator[None]:
    """Errors of the storage as those that clients may see."""
    try:
        yield
    except OURS:
        raise
    except (StoreError, PlanError) as error:
        log.warning("%s", error)
        if type(error) in (StoreError, PlanError):  # for good: no bucket, or credentials that it does not take
            raise StorageRefused(
                "the storage behind this service refuses it; its operator finds the reason in the log"
            ) from None
        raise StorageFailed("the storage behind this service cannot be reached at the moment; try again") from None
