"""What storage a store can lie on: the protocol of a backend, and what is known of one object."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple, Protocol

from statsvc.errors import StoreError

Fill = Callable[[memoryview], None]


class ObjectRecord(NamedTuple):
    """An object that a commit vouches for.

    crc32c          of all its bytes. Chunks and shards end with checksums of their own, which makes this one the same
                    number for all objects of one layout: it finds flipped bits, never a wrong object
    content_crc32c  without those checksums (of a shard: over its rows' checksums and its index): tells objects apart
    """

    path: str
    bytes: int
    crc32c: str
    content_crc32c: str


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

        record  of a committed object: only these are kept in a cache
        """

    def forget(self, record: ObjectRecord) -> bool:
        """Drop a cached copy found to be damaged. Returns True if reading it again may give different bytes."""

    def fetch(self, record: ObjectRecord, begin: int, end: int) -> AbstractContextManager[Fill]:
        """Bytes `begin` to `end` of a committed object, as a function that fills one buffer after the other with them.

        Raises FileNotFoundError, and DamagedObject if the object has another size or the storage knows it to be another
        one: when it is opened or later. Whether the bytes are right is for the reader to check.
        """

    def version(self, path: str) -> str | None:
        """A token that changes whenever the object is replaced; None if there is no object."""

    def size(self, path: str) -> int | None:
        """Bytes of the object; None if there is no object."""

    def list(self, folder: str) -> list[str]:
        """Sorted names of the objects and folders directly below a folder; empty if there is no folder."""

    def write(self, path: str, data: bytes) -> None:
        """Publish an object, replacing one of that path."""

    def create(self, path: str) -> Upload:
        """Begin to stream an object."""

    def remove(self, path: str) -> None:
        """Remove an object; no error if there is none."""

    def swap(self, path: str, expected: bytes | None, data: bytes) -> bool:
        """Replace an object if it still is `expected` (None: no object yet); False if it is not. Atomic."""

    def sweep(self) -> int:
        """Remove what writers that died left behind. Returns the number of objects."""

    def free_bytes(self) -> int | None:
        """Space left for new objects; None if effectively unlimited."""

    def check(self) -> None:
        """Raises PlanError if nothing can ever be written at this location."""

    def exists(self) -> bool:
        """Whether anything was ever written here."""


def check_path(path: str) -> None:
    """Raises StoreError for a path that could lead out of the store; \"\" is its root."""
    if path and ("\\" in path or "\0" in path or {"", ".", ".."} & set(path.split("/"))):
        raise StoreError(f"a path of the store is relative and stays inside it; got {path!r}")
    if not path.isascii() and any("\ud800" <= letter <= "\udfff" for letter in path):
        raise StoreError(f"a path of the store is UTF-8; got {path!r}")
