"""Which objects of the store may leave it, and what is known of each: an allow-list, by the shape of the path.

- every zarr.json;
- chunks and shards of the arrays that a commit vouches for (anything else is absent, as the Zarr specification has it);
- for statsvc's own readers: commits, transforms and reports.

`.statsvc/run.json`, the lease, partial files and everything else match nothing here, and so do not exist.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from cachetools import LRUCache

from api.state.live_store import LiveStore
from api.state.remote import RemoteBackend
from statsvc.digests import crc32c, crc32c_hex
from statsvc.errors import DamagedObject, NotFound
from statsvc.storage.backend import Backend, ObjectRecord
from statsvc.store.commits import Commit
from statsvc.store.paths import NAME, ObjectPath, parse
from statsvc.store.reader import Store

# What may leave the store, by kind; of a chunk only what a commit lists. Folders are for statsvc's own readers.
SERVED = ("metadata", "commit", "fit", "pilot", "transform", "report")
FOLDER = re.compile(rf"teachers(?:/{NAME}/cache)?|\.statsvc/commits(?:/[a-z0-9][a-z0-9_.-]{{0,127}}){{0,3}}")

KEPT = 256  # objects that are kept open between requests
HELD_NBYTES = 1 << 20  # documents up to this size are held in memory, larger ones mapped
REGION_NBYTES = 1 << 20
SCRATCH_NBYTES = 256 << 10
WARM_SECONDS = 60.0


def is_zarr(path: str) -> bool:
    """Whether it belongs to the arrays: the ledger beside them is for statsvc's own readers."""
    return not path.startswith(".")


class Readable:
    """An object that may be read: its bytes, mapped or held, and what identifies them.

    load  brings bytes [begin, end) from disk into the page cache; None: they are in memory
    """

    def __init__(
        self,
        path: str,
        view: memoryview,
        etag: str,
        media_type: str = "application/octet-stream",
        load: Callable[[int, int], None] | None = None,
    ) -> None:
        self.path, self.view, self.etag, self.media_type, self._load = path, view, etag, media_type, load
        self.size = len(view)
        self._loaded = [-math.inf] * (len(view) // REGION_NBYTES + 1)  # when, by region

    def is_cold(self, begin: int, end: int) -> bool:
        """Whether bytes [begin, end) may have to come from disk: nobody read them within the last minute."""
        if self._load is None:
            return False
        oldest = min(self._loaded[begin // REGION_NBYTES : (end - 1) // REGION_NBYTES + 1])
        return oldest < time.monotonic() - WARM_SECONDS

    def warm_up(self, begin: int, end: int) -> None:
        """Wait for the disk, in a thread. Raises DamagedObject where the object was cut under us."""
        assert self._load is not None  # else it is never cold
        first, last = begin // REGION_NBYTES, (end - 1) // REGION_NBYTES
        self._load(first * REGION_NBYTES, min((last + 1) * REGION_NBYTES, len(self.view)))
        self._loaded[first : last + 1] = [time.monotonic()] * (last + 1 - first)


class Remote:
    """An object on storage that cannot be mapped: its bytes are fetched as they are sent, and none is held."""

    media_type = "application/octet-stream"

    def __init__(self, backend: RemoteBackend, record: ObjectRecord, version: str | None) -> None:
        self.path, self.size, self.etag = record.path, record.bytes, f'"{record.content_crc32c}"'
        self._backend, self._record, self._version = backend, record, version

    def read(self, begin: int, end: int, *, whole: bool) -> memoryview:
        """Bytes [begin, end), for which it waits. Raises DamagedObject for another object.

        whole  the answer is more than these bytes: the others must be of the same version
        """
        bytes_ = memoryview(bytearray(end - begin))
        try:
            with self._backend.fetch(self._record, begin, end) as fill:
                fill(bytes_)
        except FileNotFoundError as error:
            raise missing(self.path) from error
        if whole and self._backend.version_now(self.path) != self._version:
            raise DamagedObject(f"{self.path}: replaced while it was read; ask again")
        return bytes_


class _Kept(NamedTuple):
    readable: Readable | Remote
    versions: tuple[tuple[str, str | None], ...]  # of everything that was looked at


class Objects:
    """Opens what may be read, and keeps it open: a file that is mapped anew for every range costs twice the time."""

    def __init__(self, live: LiveStore) -> None:
        self._live = live
        self._lock = threading.Lock()
        self._kept: LRUCache[str, _Kept] = LRUCache(KEPT)

    @property
    def is_remote(self) -> bool:
        """Whether the store is on storage that cannot be mapped."""
        return self._live.remote is not None

    def kept(self, path: str) -> Readable | Remote | None:
        """An object that was opened before and still is the one that lies there.

        Only looks, and so does not block where the storage is local.
        """
        with self._lock:
            found = self._kept.get(path)
        if found is None:
            return None
        changed = any(self._live.backend.version(seen) != version for seen, version in found.versions)
        if not changed:
            return found.readable
        with self._lock:
            if self._kept.get(path) is found:
                del self._kept[path]
        return None

    def open(self, path: str) -> Readable | Remote:
        """An object, kept or opened now.

        Raises NotFound where nothing may be read, DamagedObject where a commit vouches for other bytes.
        """
        kept = self.kept(path)
        if kept is not None:
            return kept
        backend = self._live.backend
        found = parse(path)
        if found is None or found.is_copy or found.kind not in (*SERVED, "chunk"):
            raise absent(path)
        version = backend.version(path)
        if found.kind != "chunk":
            if version is None:
                raise absent(path)
            try:
                content = backend.view(path) if (backend.size(path) or 0) > HELD_NBYTES else None
                content = memoryview(backend.read(path)) if content is None else content
            except FileNotFoundError as error:
                raise absent(path) from error
            media_type = "application/octet-stream" if path.endswith(".safetensors") else "application/json"
            readable = Readable(path, content, f'"{crc32c_hex(crc32c(content))}"', media_type)
            if self.is_remote and len(content) > HELD_NBYTES:
                return readable  # which is not mapped, and so is not held either
            return self._keep(_Kept(readable, ((path, version),)))
        for commit in listing(self._live.current(), found):
            for record in commit.objects:
                if record.path == path:
                    versions = ((path, version), (commit.path, backend.version(commit.path)))
                    if self._live.remote:
                        return self._keep(_Kept(_remote(self._live.remote, record, version), versions))
                    view = self._view(path, record.bytes)
                    load = partial(load_pages, backend, record)
                    return self._keep(_Kept(Readable(path, view, f'"{record.content_crc32c}"', load=load), versions))
        raise absent(path)

    def names(self, folder: str) -> list[str]:
        """What lies directly below a folder. Raises NotFound for a folder that may not be listed."""
        if not FOLDER.fullmatch(folder):
            raise absent(folder)
        return self._live.backend.list(folder)

    def _view(self, path: str, nbytes: int) -> memoryview:
        try:
            view = self._live.backend.view(path)
            if view is None:
                view = memoryview(self._live.backend.read(path))
        except FileNotFoundError as error:
            raise missing(path) from error
        if len(view) != nbytes:
            raise wrong_size(path, len(view), nbytes)
        return view

    def _keep(self, kept: _Kept) -> Readable | Remote:
        with self._lock:
            self._kept[kept.readable.path] = kept
        return kept.readable


def _remote(backend: RemoteBackend, record: ObjectRecord, version: str | None) -> Remote:
    size = backend.size(record.path)
    if size is None:
        raise missing(record.path)
    if size != record.bytes:
        raise wrong_size(record.path, size, record.bytes)
    return Remote(backend, record, version)


def load_pages(backend: Backend, record: ObjectRecord, begin: int, end: int) -> None:
    """Read bytes that are mapped elsewhere, and forget them.

    By system calls: touching the map itself would hold up all threads while the disk is slow, and where somebody cut
    the file short it would end the process.
    """
    scratch = memoryview(bytearray(SCRATCH_NBYTES))
    with backend.fetch(record, begin, end) as fill:
        for position in range(begin, end, SCRATCH_NBYTES):
            fill(scratch[: end - position])


def listing(store: Store, chunk: ObjectPath) -> Iterator[Commit]:
    """The commits that may list a chunk."""
    assert chunk.phase is not None
    assert chunk.shard is not None
    units = [(chunk.teacher, chunk.cache_set)]
    if chunk.phase == "cache" and chunk.cache_set is None:
        teachers = store.teachers() if chunk.teacher is None else [chunk.teacher]
        units = [(name, set_) for name in teachers for set_ in store.teacher(name).cache_sets()]
    for teacher, cache_set in units:
        if commit := store.ledger.read(chunk.phase, chunk.shard, teacher, cache_set):
            yield commit


def missing(path: str) -> DamagedObject:
    """What a commit vouches for does not lie there."""
    return DamagedObject(f"{path}: committed but missing; `statsvc verify --repair` and the next run restore it")


def wrong_size(path: str, nbytes: int, due: int) -> DamagedObject:
    """What lies there is not what a commit vouches for."""
    return DamagedObject(
        f"{path}: {nbytes} bytes where the commit says {due}; `statsvc verify --repair` removes it, and the next run "
        "restores it"
    )


def absent(path: str) -> NotFound:
    """Says no more than that: whether something lies there is nobody's business."""
    del path
    return NotFound("no such object: not committed (yet), or nothing that is served")
