"""Objects behind a statsvc service: read only, over kept connections, resumed where they break."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Never

from urllib3 import BaseHTTPResponse, Retry
from urllib3.exceptions import HTTPError, ProtocolError

from statsvc.backends.paths import check_path
from statsvc.backends.service import PATIENT, QUICK, Attempts, Replaced, Service, done
from statsvc.errors import PlanError, StoreError

if TYPE_CHECKING:
    from statsvc.backends import Fill, Upload
    from statsvc.ledger import ObjectRecord

# Per call of urllib3, which copies once more: the copy stays in the cache. Measured: as fast as without it.
PIECE_NBYTES = 256 << 10
WHOLE_NBYTES = 512 << 20  # the largest object that is read whole: a transform of 5000 channels has 400 MB
RESTARTS = 3  # of an object that is replaced again and again, or cannot be resumed


class HttpBackend:
    """The objects of one service. Rows and chunks are of the committed object or none: the ETag is its checksum."""

    def __init__(self, location: str, token: str | None = None) -> None:
        """`token` is that of the service; without it, the environment variable STATSVC_TOKEN."""
        self._service = Service(location, token)

    def __repr__(self) -> str:
        return f"HttpBackend({self._service.url!r})"

    def read(self, path: str) -> bytes:
        check_path(path)
        return self._whole(path, PATIENT)

    def view(self, path: str) -> None:
        check_path(path)

    @contextmanager
    def fetch(self, record: ObjectRecord, begin: int, end: int) -> Iterator[Fill]:
        check_path(record.path)
        body = _Body(self._service, record.path, begin, end, f'"{record.content_crc32c}"', record.bytes)
        try:
            yield body.fill
        finally:
            body.close()

    def version(self, path: str) -> str | None:
        return self._header(path, "ETag")

    def size(self, path: str) -> int | None:
        length = self._header(path, "Content-Length")
        return None if length is None else _number(length)

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

    def swap(self, path: str, expected: bytes | None, data: bytes | None) -> bool:
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
        response = self._service.send("HEAD", path, {}, Attempts(self._service, path))
        done(response)
        if response.status == 404:
            return None
        if response.status != 200:
            raise self._service.refusal(path, response)
        if name not in response.headers:
            raise StoreError(f"{self._service.url}: {path}: an answer without {name}; is a proxy taking it away?")
        return response.headers[name]

    def _whole(self, path: str, patience: Retry) -> bytes:
        if not path:
            raise FileNotFoundError("the root of a store is no object")
        for restart in range(RESTARTS + 1):
            body = _Body(self._service, path, patience=patience)
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


class _Body:
    """Bytes begin to end of one object, asked for again from where the connection was lost.

    etag    of the object; None: that of the first answer. No byte of another object is ever given.
    size    bytes of the whole object; None: the first answer says it
    """

    def __init__(
        self, service: Service, path: str, begin: int = 0, end: int | None = None, etag: str | None = None,
        size: int | None = None, patience: Retry = PATIENT,
    ) -> None:  # fmt: skip
        self._service, self._path, self._etag, self._size = service, path, etag, size
        self._position, self._end, self._committed = begin, end, size is not None
        self._attempts = Attempts(service, path, patience)
        self._response: BaseHTTPResponse | None = None

    def length(self) -> int:
        """Bytes left to read."""
        while self._end is None:
            try:
                self._open()
            except HTTPError as error:
                self._lost(error)
        return self._end - self._position

    def fill(self, out: memoryview) -> None:
        """Raises Replaced, FileNotFoundError or StoreError."""
        if len(out) > self.length():
            raise ValueError(f"{self._path}: {len(out)} bytes, of which {self.length()} were asked for")
        filled = 0
        while filled < len(out):
            try:
                response = self._response or self._open()
                count = response.readinto(out[filled : filled + PIECE_NBYTES])
                if not count:
                    raise ProtocolError("the answer ended early")
            except HTTPError as error:
                self._lost(error)
                continue
            filled += count
            self._position += count
            self._attempts.progress()

    def close(self) -> None:
        """The connection is kept if nothing of the answer is left."""
        if self._response:
            done(self._response)
            self._response = None

    def _lost(self, error: HTTPError) -> None:
        self.close()
        self._attempts.failed(error)

    def _open(self) -> BaseHTTPResponse:
        """Ask for what is left. Raises HTTPError where the answer breaks off, else as fill."""
        headers = {"If-Match": self._etag} if self._etag else {}
        if self._end is not None:
            if not self._etag:
                raise Replaced(self._path, "the connection was lost, and without an ETag it cannot be resumed")
            headers["Range"] = f"bytes={self._position}-{self._end - 1}"
        self._response = response = self._service.send("GET", self._path, headers, self._attempts)
        if response.status not in (200, 206):
            raise self._service.refusal(self._path, response)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._odd("it is compressed, though the request forbids that")
        etag, length = response.headers.get("ETag", ""), response.headers.get("Content-Length")
        if self._end is None:
            self._etag = etag if etag.startswith('"') else None  # a weak one does not vouch for bytes
            self._size = self._end = _number(length)
            if response.status != 200 or not 0 <= self._size <= WHOLE_NBYTES:
                raise self._odd(f"{length} bytes with status {response.status}, not 200 and at most {WHOLE_NBYTES}")
            return response
        # The service refuses If-Match by itself; whatever stands between may not. Rows have checksums besides.
        if etag.removeprefix("W/") != self._etag and (etag or not self._committed):
            raise Replaced(self._path)
        if response.status == 200:  # something between cannot give ranges
            if length is not None and _number(length) != self._size:
                raise Replaced(self._path)
            self._skip(response, self._position)
        elif response.headers.get("Content-Range") != f"bytes {self._position}-{self._end - 1}/{self._size}":
            raise self._odd(f"{response.headers.get('Content-Range')} for {headers['Range']} of {self._size}")
        elif length is not None and _number(length) != self._end - self._position:
            raise self._odd(f"{length} bytes for {headers['Range']}")
        return response

    def _skip(self, response: BaseHTTPResponse, count: int) -> None:
        while count:
            skipped = len(response.read(min(count, PIECE_NBYTES)))
            if not skipped:
                raise ProtocolError("the answer ended early")
            count -= skipped

    def _odd(self, what: str) -> StoreError:
        return StoreError(
            f"{self._service.url}: {self._path}: a wrong answer: {self._service.clean(what)}; what is it?"
        )


def _number(digits: str | None) -> int:
    """-1 for what is none."""
    return int(digits) if digits and re.fullmatch("[0-9]{1,18}", digits) else -1
