"""Reading an object of a service."""

from __future__ import annotations

from statsvc.errors import StoreError
from statsvc.storage.http.connections import Answer
from statsvc.storage.http.resuming import ResumingReader, clean, number
from statsvc.storage.http.service import PATIENT, Replaced, ServiceClient

WHOLE_NBYTES = 512 << 20  # the largest object that is read whole: a transform of 5000 channels has 400 MB


class Body(ResumingReader):
    """Bytes begin to end of one object. Raises Replaced, FileNotFoundError or StoreError.

    etag  of the object; None: that of the first answer
    """

    exact = True

    def __init__(
        self, service: ServiceClient, path: str, begin: int = 0, end: int | None = None, etag: str | None = None,
        size: int | None = None, waits: tuple[float, ...] = PATIENT,
    ) -> None:  # fmt: skip
        super().__init__(service.attempts(path, waits), begin, end, {"ETag": etag} if etag else None, size)
        self._service, self._path = service, path

    def fill(self, out: memoryview) -> None:
        """The next bytes."""
        if len(out) > self.length():
            raise ValueError(f"{self._path}: {len(out)} bytes, of which {self.length()} were asked for")
        while out:
            out = out[self.readinto(out) :]

    def ask(self, headers: dict[str, str]) -> Answer:
        if headers and not self._version:
            raise Replaced(self._path, "the connection was lost, and without an ETag it cannot be resumed")
        answer = self._service.request("GET", self._path, headers)
        if answer.status not in (200, 206):
            raise self._service.refusal(self._path, answer)
        return answer

    def learn(self, answer: Answer) -> tuple[int, dict[str, str]]:
        length, etag = answer.header("Content-Length"), answer.header("ETag") or ""
        if answer.status != 200 or not 0 <= number(length) <= WHOLE_NBYTES:
            raise self.wrong(answer, f"{clean(str(length))} bytes, where 0 to {WHOLE_NBYTES} are expected")
        return number(length), {"ETag": etag} if etag.startswith('"') else {}  # a weak one does not vouch for bytes

    def changed(self, how: str) -> Exception:
        del how
        return Replaced(self._path)

    def wrong(self, answer: Answer, what: str) -> Exception:
        return StoreError(
            f"{self._service.url}: {self._path}: a wrong answer ({answer.status}): {self._service.clean(what)}; does a "
            "proxy change it?"
        )
