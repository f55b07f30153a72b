"""Where the objects of a store lie. A new kind of storage is one new file and one line in BACKENDS."""

from collections.abc import Callable
from typing import BinaryIO, Protocol

from statsvc.backends.local import LocalBackend
from statsvc.errors import PlanError


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
    """Objects by relative path with forward slashes; written whole or not at all, durable when the call returns."""

    def read(self, path: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""

    def view(self, path: str) -> memoryview:
        """The whole object without a copy where the storage can. Raises FileNotFoundError."""

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


BACKENDS: dict[str, Callable[[str], Backend]] = {
    "file": LocalBackend,
}


def backend(location: str) -> Backend:
    """The backend of a store location. Raises PlanError for a kind of storage that is not in BACKENDS."""
    scheme, separator, rest = location.partition("://")
    if not separator:
        scheme, rest = "file", location
    if scheme not in BACKENDS:
        raise PlanError(f"store {location!r}: no storage is named {scheme!r}; give a plain path")
    return BACKENDS[scheme](rest)
