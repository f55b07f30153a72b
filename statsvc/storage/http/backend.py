"""Objects behind a statsvc service: read only, over kept connections, resumed where they break."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Never

from statsvc.errors import PlanError, StoreError
from statsvc.storage.backend import Fill, ObjectRecord, Upload, check_path
from statsvc.storage.http.body import Body
from statsvc.storage.http.resuming import number
from statsvc.storage.http.service import PATIENT, QUICK, Replaced, ServiceClient

RESTARTS = 3  # of an object that is replaced again and again, or cannot be resumed


class HttpBackend:
    """The objects of one service. Rows and chunks are of the committed object or none: the ETag is its checksum."""

    concurrency = 8

    def __init__(self, location: str, token: str | None = None) -> None:
        """`token` is that of the service; without it, the environment variable STATSVC_TOKEN."""
        self._service = ServiceClient(location, token)

    def __repr__(self) -> str:
        return f"HttpBackend({self._service.url!r})"

    def read(self, path: str) -> bytes:
        check_path(path)
        if not path:
            raise FileNotFoundError("the root of a store is no object")
        return self._whole(path, PATIENT)

    def view(self, path: str, record: ObjectRecord | None = None) -> None:
        del record
        check_path(path)

    def forget(self, record: ObjectRecord) -> bool:
        del record
        return False

    @contextmanager
    def fetch(self, record: ObjectRecord, begin: int, end: int) -> Iterator[Fill]:
        check_path(record.path)
        body = Body(self._service, record.path, begin, end, f'"{record.content_crc32c}"', record.bytes)
        try:
            yield body.fill
        finally:
            body.close()

    def version(self, path: str) -> str | None:
        return self._header(path, "ETag")

    def size(self, path: str) -> int | None:
        length = self._header(path, "Content-Length")
        return None if length is None else number(length)

    def list(self, folder: str) -> list[str]:
        check_path(folder)
        try:
            listed = self._whole(f"{folder}/".lstrip("/"), PATIENT)
        except FileNotFoundError:
            return []
        try:
            names: list[str] = json.loads(listed)["names"]
            for name in names:
                check_path(name)
                if not name or "/" in name:
                    raise ValueError("a name is that of an object or folder directly below")
        except (ValueError, LookupError, TypeError, RecursionError, StoreError) as error:
            raise StoreError(f"{self._service.url}: no list of {folder!r}; is this `statsvc serve`?") from error
        return sorted(names)

    def exists(self) -> bool:
        try:
            self._whole("zarr.json", QUICK)
        except FileNotFoundError:
            return False
        return True

    def free_bytes(self) -> None:
        """Nothing is written here."""

    def check(self) -> None:
        raise PlanError(self._read_only())

    def write(self, path: str, data: bytes) -> None:
        self._refuse(path, data)

    def create(self, path: str) -> Upload:
        self._refuse(path)

    def remove(self, path: str) -> None:
        self._refuse(path)

    def swap(self, path: str, expected: bytes | None, data: bytes) -> bool:
        self._refuse(path, expected, data)

    def sweep(self) -> int:
        self._refuse()

    def _refuse(self, *_: object) -> Never:
        raise StoreError(self._read_only())

    def _read_only(self) -> str:
        return f"{self._service.url}: a service is read only; write to the store it serves, by its own location"

    def _header(self, path: str, name: str) -> str | None:
        """Of the answer to HEAD; None where there is no object."""
        check_path(path)
        if not path:
            return None
        answer = self._service.attempts(path).repeat(lambda: self._service.request("HEAD", path, {}))
        if answer.status == 404:
            answer.close()
            return None
        if answer.status != 200:
            raise self._service.refusal(path, answer)
        answer.close()
        value = answer.header(name)
        if value is None:
            raise StoreError(f"{self._service.url}: {path}: an answer without {name}; does a proxy take it away?")
        return value

    def _whole(self, path: str, waits: tuple[float, ...]) -> bytes:
        for restart in range(RESTARTS + 1):
            body = Body(self._service, path, waits=waits)
            try:
                data = bytearray(body.length())
                body.fill(memoryview(data))
                return bytes(data)
            except Replaced:
                if restart == RESTARTS:
                    raise
            finally:
                body.close()
        raise AssertionError("the last restart returns or raises")
