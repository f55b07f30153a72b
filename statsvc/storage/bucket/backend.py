"""Objects in a bucket: s3://bucket/prefix, gs:// and az://.

Every object appears whole, by one PUT or by the end of a multipart upload; the latter sends its parts while the object
is being produced. Storages of these kinds show an object to everyone once its writer was told that it is there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from statsvc.errors import DamagedObject, PlanError, StoreError
from statsvc.storage.backend import Fill, ObjectRecord, check_path
from statsvc.storage.bucket.client import Changed, Client, Meta, StorageLost, split
from statsvc.storage.bucket.forked import connect
from statsvc.storage.bucket.transfers import ObjectUpload, Ranges
from statsvc.storage.per_process import PerProcess

CHECKS = 4  # of a storage that does not answer, before the plan is to blame
SWAP_SECONDS = 45.0  # in which a swap is tried again: after one stall, and before a lease would expire


class ObjectBackend:
    """Objects below one prefix of a bucket. Threads may share it; a forked process asks through a helper process."""

    concurrency = 16
    retry_seconds: float | None = None  # of one request, in place of RETRY_SECONDS; set before the first one

    def __init__(self, location: str, _token: str | None = None) -> None:
        """Raises PlanError for an invalid location. Credentials and endpoint are those of the environment."""
        split(location)
        self._location = location.rstrip("/")
        self._clients = PerProcess[tuple[Client, Client]]()

    def __repr__(self) -> str:
        return f"ObjectBackend({self._location!r})"

    def __reduce__(self) -> tuple[type[ObjectBackend], tuple[str]]:
        return ObjectBackend, (self._location,)

    def read(self, path: str) -> bytes:
        check_path(path)
        if not path:
            raise FileNotFoundError(2, "no such object", path)
        return self._patient.get(path)[0]

    def view(self, path: str, record: ObjectRecord | None = None) -> None:
        del record
        check_path(path)

    def forget(self, record: ObjectRecord) -> bool:
        del record
        return False

    @contextmanager
    def fetch(self, record: ObjectRecord, begin: int, end: int) -> Iterator[Fill]:
        check_path(record.path)
        with _damage(record):
            ranges = Ranges(self._patient, record.path, record.bytes, begin, end)

        def fill(out: memoryview) -> None:
            with _damage(record):
                ranges.fill(out)

        try:
            yield fill
        finally:
            ranges.close()

    def version(self, path: str) -> str | None:
        meta = _head(self._patient, path)
        return meta.name if meta else None

    def size(self, path: str) -> int | None:
        meta = _head(self._patient, path)
        return meta.size if meta else None

    def list(self, folder: str) -> list[str]:
        check_path(folder)
        folders, objects = self._patient.list(folder)
        return sorted({*folders, *(name for name, _ in objects)})

    def write(self, path: str, data: bytes) -> None:
        _check_object(path)
        self._patient.put(path, data)

    def create(self, path: str) -> ObjectUpload:
        _check_object(path)
        return ObjectUpload(self._patient, path)

    def remove(self, path: str) -> None:
        _check_object(path)
        with suppress(FileNotFoundError):
            self._patient.delete(path)

    def swap(self, path: str, expected: bytes | None, data: bytes) -> bool:
        """If a response is lost, the object itself tells whether it was swapped.

        It cannot tell once somebody who saw our bytes swapped it again: then the answer is False.
        """
        _check_object(path)
        end, pause, unsure = time.monotonic() + SWAP_SECONDS, 0.1, False
        while True:
            try:
                now, meta = _current(self._quick, path)
                if now != expected:
                    return unsure and now == data
                self._quick.replace(path, data, meta)
                return True
            except Changed:  # by another one, so it is looked at again
                pass
            except StorageLost:
                unsure = True
                if time.monotonic() + pause > end:
                    raise
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, 2.0) if unsure else pause

    def sweep(self) -> int:
        """Nothing to find: what a writer that died had sent is no object, and the library lists no parts.

        They cost money until they are removed: give the bucket a lifecycle rule (AbortIncompleteMultipartUpload, 7
        days). Azure and Google remove them by themselves.
        """
        return 0

    def free_bytes(self) -> None:
        """There is no limit to speak of."""

    def check(self) -> None:
        path = ".statsvc/probe"
        for attempt in range(1, CHECKS + 1):
            try:
                self._quick.list("")
                # Changes nothing, but is refused to whom writing is refused.
                self._quick.replace(path, b"", Meta(0, '"00000000000000000000000000000000"', "1"))
                break
            except (Changed, FileNotFoundError):
                return
            except StoreError as error:
                if not isinstance(error, StorageLost) or attempt == CHECKS:
                    raise PlanError(f"store: {error}") from None
                time.sleep(0.5)
        self.remove(path)
        raise PlanError(
            f"store: {self._location}: the storage ignores If-Match, so that two drivers could write there at the same "
            "time; use one that knows conditional PUTs"
        )

    def exists(self) -> bool:
        try:
            return _head(self._quick, "zarr.json") is not None
        except StorageLost:  # once more, and no longer: somebody may wait who mistyped an address
            time.sleep(0.5)
            return _head(self._quick, "zarr.json") is not None

    def _connect(self) -> tuple[Client, Client]:
        return connect(self._location, self.retry_seconds), connect(self._location, 0.0)

    @property
    def _patient(self) -> Client:
        return self._clients.get(self._connect)[0]

    @property
    def _quick(self) -> Client:
        """Sends every request once: of one that is sent twice, the answer does not tell who changed the object."""
        return self._clients.get(self._connect)[1]


def _current(client: Client, path: str) -> tuple[bytes | None, Meta | None]:
    """The object at a path and its version; None for no object."""
    try:
        return client.get(path)
    except FileNotFoundError:
        return None, None


def _head(client: Client, path: str) -> Meta | None:
    check_path(path)
    try:
        return client.head(path) if path else None
    except FileNotFoundError:
        return None


@contextmanager
def _damage(record: ObjectRecord) -> Iterator[None]:
    try:
        yield
    except Changed as error:
        raise DamagedObject(
            f"{record.path}: {error}; `statsvc verify --repair` removes the damage, the next run restores it"
        ) from None


def _check_object(path: str) -> None:
    check_path(path or ".")  # the root is no object
