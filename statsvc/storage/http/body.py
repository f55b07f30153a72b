"""Reading an object of a service, on from where a connection was lost."""

from __future__ import annotations

import re

from statsvc.errors import StoreError
from statsvc.storage.http.connections import Answer, Lost
from statsvc.storage.http.service import PATIENT, Attempts, Replaced, Service

WHOLE_NBYTES = 512 << 20  # the largest object that is read whole: a transform of 5000 channels has 400 MB
SKIP_NBYTES = 256 << 10  # read at once where an answer begins too early


class Body:
    """Bytes begin to end of one object, asked for again from where the connection was lost.

    etag    of the object; None: that of the first answer. No byte of another object is ever given.
    size    bytes of the whole object; None: the first answer says it
    """

    def __init__(
        self, service: Service, path: str, begin: int = 0, end: int | None = None, etag: str | None = None,
        size: int | None = None, waits: tuple[float, ...] = PATIENT,
    ) -> None:  # fmt: skip
        self._service, self._path, self._etag, self._size = service, path, etag, size
        self._position, self._end = begin, end
        self._attempts = Attempts(service, path, waits)
        self._answer: Answer | None = None

    def length(self) -> int:
        """Bytes left to read."""
        if self._end is None:
            self._answer = self._open()
        return (self._end or 0) - self._position

    def fill(self, out: memoryview) -> None:
        """Raises Replaced, FileNotFoundError or StoreError."""
        if len(out) > self.length():
            raise ValueError(f"{self._path}: {len(out)} bytes, of which {self.length()} were asked for")
        filled = 0
        while filled < len(out):
            try:
                self._answer = self._answer or self._open()
                count = self._answer.readinto(out[filled:])
            except Lost as error:
                self.close()
                self._attempts.failed(str(error), slow=error.slow)
            else:
                filled += count
                self._position += count
                self._attempts.progress()

    def close(self) -> None:
        if self._answer:
            self._answer.close()
            self._answer = None

    def _open(self) -> Answer:
        """Ask for what is left."""
        headers = {}
        if self._end is not None:
            if not self._etag:
                raise Replaced(self._path, "the connection was lost, and without an ETag it cannot be resumed")
            headers["Range"] = f"bytes={self._position}-{self._end - 1}"
        answer = self._service.send("GET", self._path, headers, self._attempts)
        if answer.status not in (200, 206):
            raise self._service.refusal(self._path, answer)
        try:
            (self._begin if self._end is None else self._resume)(answer)
        except BaseException:
            answer.close()
            raise
        return answer

    def _begin(self, answer: Answer) -> None:
        """Learn from the first answer what the object is."""
        length, etag = answer.header("Content-Length"), answer.header("ETag") or ""
        size = number(length)
        if answer.status != 200 or not 0 <= size <= WHOLE_NBYTES or _encoded(answer):
            raise self._odd(answer, f"{length} bytes, where 0 to {WHOLE_NBYTES} are expected")
        self._size = self._end = size
        self._etag = etag if etag.startswith('"') else None  # a weak one does not vouch for bytes

    def _resume(self, answer: Answer) -> None:
        """Check that the answer goes on where the last one ended."""
        # Compared here, not asked for with If-Match: a proxy that sends the bytes itself does not know our ETag when it
        # is asked, and only passes it on. Without one, sound rows of another fit would pass for those committed.
        etag = (answer.header("ETag") or "").removeprefix("W/")
        if not etag:
            raise self._odd(answer, "it names no ETag, so it may be of another object")
        if etag != self._etag:
            raise Replaced(self._path)
        length = answer.header("Content-Length")
        if answer.status == 200:  # of something between that knows no ranges
            if length is not None and number(length) != self._size:
                raise Replaced(self._path)
            left = self._position
        else:
            expected = f"bytes {self._position}-{(self._end or 0) - 1}/{self._size}"
            if answer.header("Content-Range") != expected:
                raise self._odd(answer, f"{answer.header('Content-Range')}, not {expected}")
            if length is not None and number(length) != self.length():
                raise self._odd(answer, f"{length} bytes for {expected}")
            left = 0
        if _encoded(answer):
            raise self._odd(answer, "compressed, which was not asked for")
        while left:
            skipped = len(answer.read(min(left, SKIP_NBYTES)))
            if not skipped:
                raise Lost("the answer broke off")
            left -= skipped

    def _odd(self, answer: Answer, what: str) -> StoreError:
        return StoreError(
            f"{self._service.url}: {self._path}: a wrong answer ({answer.status}): {self._service.clean(what)}; does a "
            "proxy change it?"
        )


def _encoded(answer: Answer) -> bool:
    return answer.header("Content-Encoding") not in (None, "identity")


def number(digits: str | None) -> int:
    """-1 for what is none."""
    return int(digits) if digits and re.fullmatch("[0-9]{1,18}", digits) else -1
