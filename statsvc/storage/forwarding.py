"""Backends that change some of what another backend does and pass the rest on."""

from __future__ import annotations

from contextlib import AbstractContextManager

from statsvc.storage.backend import Backend, Fill, ObjectRecord, Upload


class ForwardingBackend:
    """Passes everything on: subclass it and override what is to be different."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def concurrency(self) -> int:
        return self._backend.concurrency

    def read(self, path: str) -> bytes:
        return self._backend.read(path)

    def view(self, path: str, record: ObjectRecord | None = None) -> memoryview | None:
        return self._backend.view(path, record)

    def forget(self, record: ObjectRecord) -> bool:
        return self._backend.forget(record)

    def fetch(self, record: ObjectRecord, begin: int, end: int) -> AbstractContextManager[Fill]:
        return self._backend.fetch(record, begin, end)

    def version(self, path: str) -> str | None:
        return self._backend.version(path)

    def size(self, path: str) -> int | None:
        return self._backend.size(path)

    def list(self, folder: str) -> list[str]:
        return self._backend.list(folder)

    def write(self, path: str, data: bytes) -> None:
        self._backend.write(path, data)

    def create(self, path: str) -> Upload:
        return self._backend.create(path)

    def remove(self, path: str) -> None:
        self._backend.remove(path)

    def swap(self, path: str, expected: bytes | None, data: bytes) -> bool:
        return self._backend.swap(path, expected, data)

    def sweep(self) -> int:
        return self._backend.sweep()

    def free_bytes(self) -> int | None:
        return self._backend.free_bytes()

    def check(self) -> None:
        self._backend.check()

    def exists(self) -> bool:
        return self._backend.exists()


class UnmappedBackend(ForwardingBackend):
    """Objects are never mapped: a file that somebody cuts short under a map ends the process."""

    def view(self, path: str, record: ObjectRecord | None = None) -> None:
        """Nothing is mapped."""
