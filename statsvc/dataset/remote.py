"""The bytes of a URL in order: asked for again, from where it was lost, when a connection breaks off.

httpx makes the connections; it obeys HTTPS_PROXY and SSL_CERT_FILE.
"""

from __future__ import annotations

import functools
import itertools
import logging
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import httpx

from statsvc.dataset.urls import SCHEMES, shown
from statsvc.errors import UnreadableShard
from statsvc.storage.http.body import number

log = logging.getLogger("statsvc")
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)  # below that they write whole URLs, secrets included

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0  # without a sign of life
# Seconds before each further attempt, and up to a quarter more, so that workers do not come back all at once. They
# begin anew whenever bytes come.
PATIENT = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
QUICK = PATIENT[:1]
RETRY_AFTER_SECONDS = 30.0  # the most that is waited because a server asks for it
RETRIED = (408, 425, 429, 500, 502, 503, 504)
REDIRECTS = 10

T = TypeVar("T")


class _Lost(Exception):
    """No answer, or one that broke off, but another attempt may do; not before `after` seconds."""

    def __init__(self, what: str, after: float = 0) -> None:
        super().__init__(what)
        self.after = after


class RemoteFile:
    """size: of the whole file. Raises UnreadableShard for a file that cannot be had, or changes while it is read."""

    def __init__(self, url: str, waits: tuple[float, ...] | None = None) -> None:
        self.size = -1
        self._url, self._waits, self._failures = url, PATIENT if waits is None else waits, 0
        self._position, self._version = 0, dict[str, str]()
        self._answer: httpx.Response | None = None
        self._blocks: Iterator[bytes] = iter(())
        self._client = httpx.Client(
            verify=_trust(),
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            headers={"User-Agent": "statsvc", "Accept-Encoding": "identity"},
        )
        try:
            self._patiently(self._open)
        except BaseException:
            self.close()
            raise

    def read(self, _size: int, /) -> bytes:
        """The next bytes, as many as came at once: at most 64 KiB."""
        block = self._patiently(self._next) if self._position < self.size else b""
        self._position += len(block)
        return block

    def close(self) -> None:
        self._hang_up()
        self._client.close()

    def _hang_up(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _patiently(self, step: Callable[[], T]) -> T:
        while True:
            try:
                return step()
            except (httpx.HTTPError, httpx.InvalidURL, _Lost) as error:
                self._hang_up()
                self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Wait before the next attempt. Raises UnreadableShard where there is to be none."""
        why = str(error) or type(error).__name__
        if isinstance(error, httpx.InvalidURL):
            raise UnreadableShard(f"the URL, or one that the server sends us on to, is none: {why}; check it")
        if isinstance(error, httpx.TimeoutException):
            why = "no answer in time"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise UnreadableShard(
                    f"its certificate is not trusted: {cause.verify_message}; name a file with the authority's own "
                    "in SSL_CERT_FILE"
                ) from error
            cause = cause.__cause__ or cause.__context__
        if self._failures >= len(self._waits):
            raise UnreadableShard(f"{why}, after {self._failures + 1} attempts; see whether the server can be reached")
        log.info("%s: %s at byte %d; trying again", shown(self._url), why, self._position)
        wait = self._waits[self._failures] * random.uniform(1, 1.25)
        self._failures += 1
        time.sleep(max(wait, error.after if isinstance(error, _Lost) else 0))

    def _next(self) -> bytes:
        if self._answer is None:
            self._open()
        block = next(self._blocks, b"")
        if not block:
            raise _Lost("the answer broke off")
        self._failures = 0
        return block[: self.size - self._position]

    def _open(self) -> None:
        """Ask for the file, or for what is left of it."""
        headers = {}
        if self.size >= 0:
            headers["Range"] = f"bytes={self._position}-{self.size - 1}"
            if self._version.get("ETag", "").startswith('"'):  # a weak one never matches
                headers["If-Match"] = self._version["ETag"]
        self._answer = answer = self._ask(headers)
        if answer.status_code in (412, 416) and headers:
            raise _changed(f"the server answers {answer.status_code} to a request for the rest")
        if answer.status_code not in (200, 206):
            raise _refusal(answer)
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise UnreadableShard(
                f"the server sends it compressed ({answer.headers['Content-Encoding']}), which was not asked for; "
                "have it send the file as it is"
            )
        length = number(answer.headers.get("Content-Length"))
        self._blocks = (block for block in answer.iter_raw() if block)
        if self.size < 0:
            if answer.status_code != 200 or length < 0:
                raise UnreadableShard(
                    f"a wrong answer ({answer.status_code}): it does not say how many bytes the file has; serve it "
                    "as a file with a Content-Length"
                )
            self.size = length
        else:
            self._skip(self._begin(answer, length))
        self._version = {name: answer.headers[name] for name in ("ETag", "Last-Modified") if name in answer.headers}

    def _begin(self, answer: httpx.Response, length: int) -> int:
        """Check that the answer is of the same file; how many of its bytes are known already."""
        for name, before in self._version.items():
            now = answer.headers.get(name, before)
            if now.removeprefix("W/") != before.removeprefix("W/"):
                raise _changed(f"its {name} was {before}, and is {now}")
        if answer.status_code == 200:  # it knows no ranges
            begin, size = 0, length
        else:
            described = answer.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", described)
            begin, size = (int(match[1]), number(match[2])) if match else (-1, -1)
            size = self.size if match and match[2] == "*" else size
            if begin != self._position:
                raise UnreadableShard(
                    f"a wrong answer: {described[:80]!r} to a request for the bytes from {self._position}; does a "
                    "proxy change it?"
                )
        if size != self.size:
            raise _changed(f"it had {self.size} bytes, and has {size}")
        return self._position - begin

    def _skip(self, left: int) -> None:
        while left:
            block = next(self._blocks, b"")
            if not block:
                raise _Lost("the answer broke off")
            if len(block) > left:
                self._blocks = itertools.chain([block[left:]], self._blocks)
            left -= min(left, len(block))

    def _ask(self, headers: dict[str, str]) -> httpx.Response:
        """The answer to a request, after redirects; its body unread."""
        request = self._client.build_request("GET", self._url, headers=headers)
        for _ in range(REDIRECTS + 1):
            answer = self._client.send(request, stream=True)
            if answer.next_request is None:
                return answer
            answer.close()
            before, request = request, answer.next_request
            to = shown(str(request.url))
            if request.url.scheme not in SCHEMES or (before.url.scheme, request.url.scheme) == ("https", "http"):
                raise UnreadableShard(
                    f"the server sends us on to {to}: from https only https is followed, from http also http; "
                    "put the URL of the file itself into data.shards"
                )
        raise UnreadableShard(f"the server sends us on more than {REDIRECTS} times, at last to {to}; check the URL")


def read_small(url: str, limit: int) -> bytes | None:
    """A whole file of at most so many bytes; None where it cannot be had."""
    try:
        file = RemoteFile(url, QUICK)
        try:
            if file.size > limit:
                return None
            return b"".join(iter(lambda: file.read(limit), b""))
        finally:
            file.close()
    except UnreadableShard as error:
        log.debug("%s is not used: %s", shown(url), error)
        return None


def _refusal(answer: httpx.Response) -> Exception:
    """What to raise for an answer that is not the file."""
    status = answer.status_code
    match status:
        case _ if status in RETRIED:
            after = answer.headers.get("Retry-After")
            return _Lost(f"the server answers {status}", min(max(number(after), 0), RETRY_AFTER_SECONDS))
        case 404 | 410:
            return UnreadableShard(f"the server has no such file ({status}); check the URL in data.shards")
        case 401 | 403 | 407:
            return UnreadableShard(
                f"the server refuses it ({status}); where it asks for a password write https://user:password@host/..., "
                "and make a signed URL anew, it may have expired"
            )
    return UnreadableShard(f"the server answers {status}; is this the URL of a file?")


def _changed(how: str) -> UnreadableShard:
    return UnreadableShard(f"it changed while it was read: {how}; read it again once it is there as a whole")


@functools.cache
def _trust() -> ssl.SSLContext:
    return ssl.create_default_context()
