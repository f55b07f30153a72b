"""Where the objects of a store lie. A new kind of storage is one new file and one line in BACKENDS."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, BinaryIO, Protocol

from statsvc.backends.http import HttpBackend
from statsvc.backends.local import LocalBackend
from statsvc.errors import PlanError

if TYPE_CHECKING:
    from statsvc.ledger import ObjectRecord


Fill = Callable[[memoryview], None]


class Upload(Protocol):
    """An object that is being streamed."""

    @property
    def file(self) -> BinaryIO:
        """Where its bytes go."""

    def publish(self) -> None:
        """Make the object visible, whole and durable."""

    def discard(self) -> None:
        """Leave no trace, unless it was published."""


class Backend(Protocol):
    """Objects by relative path with forward slashes; written whole or not at all, durable when the call returns.

    concurrency  requests that are worth sending at a time: 1 where an answer takes no time to come
    """

    @property
    def concurrency(self) -> int: ...

    def read(self, path: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""

    def view(self, path: str, record: ObjectRecord | None = None) -> memoryview | None:
        """The whole object without a copy; None: this storage cannot, use `fetch`. Raises FileNotFoundError.

        record  of an object that is committed: only such are kept in a cache
        """

    def forget(self, record: ObjectRecord) -> bool:
        """Forget a copy of an object that turned out to be damaged; whether to read it again may bring other bytes."""

    def fetch(self, record: ObjectRecord, begin: int, end: int) -> AbstractContextManager[Fill]:
        """Bytes `begin` to `end` of a committed object, as a function that fills one buffer after the other with them.

        Raises FileNotFoundError, and DamagedObject where an object of another size lies there or the storage knows it
        to be another one: when it is opened or later. Whether the bytes are right is for the reader to check.
        """

    def version(self, path: str) -> str | None:
        """Another one whenever the object at the path was replaced; None where there is none."""

    def size(self, path: str) -> int | None:
        """Bytes of the object; None where there is none."""

    def list(self, folder: str) -> list[str]:
        """Sorted names of the objects and folders directly below a folder; empty where there is none."""

    def write(self, path: str, data: bytes) -> None:
        """Publish an object, replacing one of that path."""

    def create(self, path: str) -> Upload:
        """Begin to stream an object."""

    def remove(self, path: str) -> None:
        """Remove an object; no error where there is none."""

    def swap(self, path: str, expected: bytes | None, data: bytes | None) -> bool:
        """Replace an object (None: no object) if it still is `expected`; False where it is not. Atomic."""

    def sweep(self) -> int:
        """Remove what writers that died left behind; how many objects that were."""

    def free_bytes(self) -> int | None:
        """Space left for new objects; None where there is no limit to speak of."""

    def check(self) -> None:
        """Raises PlanError where nothing can ever be written at this location."""

    def exists(self) -> bool:
        """Whether anything was ever written here."""


def _object_backend(location: str, token: str | None) -> Backend:
    from statsvc.backends.objectstore import ObjectBackend  # here: whoever works on local files need not load obstore

    return ObjectBackend(location, token)


# From a location and a token.
BACKENDS: dict[str, Callable[[str, str | None], Backend]] = {
    "file": lambda location, _: LocalBackend(location.removeprefix("file://")),
    "http": HttpBackend,
    "https": HttpBackend,
    "s3": _object_backend,
    "gs": _object_backend,
    "az": _object_backend,
}


def backend(location: str, token: str | None = None) -> Backend:
    """The backend of a store location; `token` is for those that ask for one.

    Raises PlanError for a kind of storage that is not in BACKENDS, and for a URL that is none.
    """
    if (typed := location.partition(":/")[0].lower()) in BACKENDS and "://" not in location:
        raise PlanError(f"store {location!r}: one slash is missing, it looks like {typed}://...")
    scheme, separator, _ = location.partition("://")
    kind = scheme.lower() if separator else "file"
    if kind not in BACKENDS:
        raise PlanError(
            f"store {location!r}: no storage is named {scheme!r}; give a plain path, s3://bucket/prefix or "
            "http://host:8000"
        )
    return BACKENDS[kind](location, token)
