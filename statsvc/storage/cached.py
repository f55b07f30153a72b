"""A storage whose committed objects are kept on the local disk: whole, checked as they arrive, and fetched ahead."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO

import numpy as np

from statsvc.digests import crc32c, crc32c_hex
from statsvc.errors import DamagedObject
from statsvc.storage.backend import Backend, Fill, ObjectRecord
from statsvc.storage.disk_cache import DiskCache
from statsvc.storage.forwarding import ForwardingBackend
from statsvc.storage.per_process import PerProcess

log = logging.getLogger("statsvc")

BLOCK_NBYTES = 256 << 10  # received, summed and written while it is in the processor's cache
THREADS = 2  # that fetch ahead


class _Queue:
    """What is to be fetched ahead, and the number of threads that do so."""

    def __init__(self) -> None:
        self.lock, self.threads, self.next = threading.Lock(), 0, deque[ObjectRecord]()


class CachedBackend(ForwardingBackend):
    """Objects with a record come from the cache, where they are whole; all else is asked of the backend.

    A range of an object is asked of the backend too: whoever reads whole shards maps them.

    location  of the backend: two stores have objects of the same path
    """

    def __init__(self, backend: Backend, cache: DiskCache, location: str) -> None:
        super().__init__(backend)
        self._cache, self._location, self._queue = cache, location, PerProcess[_Queue]()

    def __reduce__(self) -> tuple[type[CachedBackend], tuple[Backend, DiskCache, str]]:
        return CachedBackend, (self._backend, self._cache, self._location)

    def __repr__(self) -> str:
        return f"CachedBackend({self._backend!r}, {self._cache!r})"

    def prefetch(self, records: Iterable[ObjectRecord]) -> None:
        """Get objects in the background, in this order, in place of those that were named before and still wait.

        Of their sum, half the cache at most: more would push out what is not read yet. Never raises: what goes wrong
        here goes wrong again, and is raised, where the object is read.
        """
        room, queue = self._cache.limit_nbytes // 2, self._queue.get(_Queue)
        with queue.lock:
            queue.next.clear()
            for record in records:
                room -= record.bytes
                if room < 0:
                    break
                queue.next.append(record)
            for _ in range(min(THREADS - queue.threads, len(queue.next))):
                threading.Thread(target=self._work, args=(queue,), name="statsvc-prefetch", daemon=True).start()
                queue.threads += 1

    def view(self, path: str, record: ObjectRecord | None = None) -> memoryview | None:
        if record is None:
            return self._backend.view(path)
        return self._cache.get(self._name(record), record.bytes, partial(self._download, record))

    @contextmanager
    def fetch(self, record: ObjectRecord, begin: int, end: int) -> Iterator[Fill]:
        if (begin, end) != (0, record.bytes):
            with self._backend.fetch(record, begin, end) as fill:
                yield fill
            return
        left = self.view(record.path, record) or memoryview(b"")

        def copy(out: memoryview) -> None:
            nonlocal left
            if len(out) > len(left):
                raise ValueError(f"{record.path}: more than bytes {begin} to {end}, which were asked for")
            out[:], left = left[: len(out)], left[len(out) :]

        yield copy

    def forget(self, record: ObjectRecord) -> bool:
        log.warning("%s: the copy in %s is damaged; fetching it again", record.path, self._cache.folder)
        self._cache.discard(self._name(record))
        return True

    def _work(self, queue: _Queue) -> None:
        while True:
            with queue.lock:
                if not queue.next:
                    queue.threads -= 1
                    return
                record = queue.next.popleft()
            try:
                self.view(record.path, record)
            except Exception as error:
                log.info("%s could not be fetched ahead: %s", record.path, error)

    def _name(self, record: ObjectRecord) -> str:
        return "\n".join([self._location, record.path, str(record.bytes), record.crc32c, record.content_crc32c])

    def _download(self, record: ObjectRecord, file: BinaryIO) -> None:
        block_B, crc = np.empty(min(BLOCK_NBYTES, record.bytes), np.uint8), 0
        with self._backend.fetch(record, 0, record.bytes) as fill:
            for position in range(0, record.bytes, BLOCK_NBYTES):
                part_B = block_B[: record.bytes - position]
                fill(part_B.data)
                crc = crc32c(part_B, crc)
                file.write(part_B.data)
        if crc32c_hex(crc) != record.crc32c:
            raise DamagedObject(
                f"{record.path}: {self._location} sent crc32c {crc32c_hex(crc)}, expected {record.crc32c}; run "
                "`statsvc verify --repair` where the store is"
            )
