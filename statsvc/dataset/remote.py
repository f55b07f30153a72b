"""The bytes of a URL in order. HTTPS_PROXY and its kin are obeyed, SSL_CERT_FILE too."""

from __future__ import annotations

import logging
import re
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from statsvc.dataset.urls import SCHEMES, shown
from statsvc.errors import PlanError, UnreadableShard
from statsvc.storage.http.connections import Answer, ConnectionLost, Connections, Unreachable
from statsvc.storage.http.proxy import basic, origin
from statsvc.storage.http.resuming import Attempts, ResumingReader, clean, number, seconds

log = logging.getLogger("statsvc")

PATIENT = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # seconds before each further attempt
QUICK = PATIENT[:1]
RETRY_AFTER_SECONDS = 30.0  # the most that is waited because a server asks for it
RETRIED = (408, 425, 429, 500, 502, 503, 504)
REDIRECTED = (301, 302, 303, 307, 308)
REDIRECTS = 10
READ_NBYTES = 64 << 10


class RemoteFile(ResumingReader):
    """size: of the whole file. Raises UnreadableShard for a file that cannot be had, or changes while it is read."""

    exact = False  # servers differ in what they say of a file, and the tar has a checksum of its own

    def __init__(self, url: str, waits: tuple[float, ...] | None = None) -> None:
        super().__init__(Attempts(shown(url), PATIENT if waits is None else waits, _given_up))
        self._url = url
        self._connections = dict[tuple[str, str, int], Connections]()
        self._buffer = memoryview(bytearray(READ_NBYTES))
        self.size = self.length()

    def read(self, _size: int, /) -> bytes:
        """The next bytes: at most 64 KiB."""
        return bytes(self._buffer[: self.readinto(self._buffer)])

    def close(self) -> None:
        super().close()
        for connections in self._connections.values():
            connections.close()

    def ask(self, headers: dict[str, str]) -> Answer:
        """The answer after redirects."""
        headers = {"User-Agent": "statsvc", "Accept-Encoding": "identity", **headers}
        etag = self._version.get("ETag", "")
        if "Range" in headers and etag.startswith('"') and etag.isprintable():  # a weak one never matches
            headers["If-Match"] = etag
        try:
            answer = self._redirected(headers)
        except Unreachable as error:
            raise UnreadableShard(str(error)) from error
        if answer.status not in (200, 206):
            answer.close()
            raise self._refusal(answer, "Range" in headers)
        return answer

    def learn(self, answer: Answer) -> tuple[int, dict[str, str]]:
        size = number(answer.header("Content-Length"))
        if answer.status != 200 or size < 0:
            raise UnreadableShard(
                f"a wrong answer ({answer.status}): it does not say how many bytes the file has; serve it as a file "
                "with a Content-Length"
            )
        return size, {name: value for name in ("ETag", "Last-Modified") if (value := answer.header(name))}

    def changed(self, how: str) -> Exception:
        return UnreadableShard(f"it changed while it was read: {how}; read it again once it is there as a whole")

    def wrong(self, answer: Answer, what: str) -> Exception:
        del answer
        return UnreadableShard(f"a wrong answer: {what}; does a proxy change it?")

    def _redirected(self, headers: dict[str, str]) -> Answer:
        url = _split(self._url)
        authorization = basic("Authorization", url)
        for _ in range(REDIRECTS + 1):
            answer = self._connected(url).request("GET", _target(url), headers | authorization)
            place = answer.header("Location")
            if answer.status not in REDIRECTED or place is None:
                return answer
            answer.close()
            # As bytes it is UTF-8 where it is not ASCII; http.client reads it as Latin-1.
            before, url = url, _split(place.encode("latin-1").decode("utf-8", "surrogateescape"), url)
            to = clean(shown(url.geturl()).partition("?")[0])
            if url.scheme not in SCHEMES or (before.scheme, url.scheme) == ("https", "http"):
                raise UnreadableShard(
                    f"the server sends us on to {to}: from https only https is followed, from http also http; "
                    "put the URL of the file itself into data.shards"
                )
            authorization = basic("Authorization", url) or (authorization if _is_same_host(before, url) else {})
        raise UnreadableShard(f"the server sends us on more than {REDIRECTS} times, at last to {to}; check the URL")

    def _connected(self, url: SplitResult) -> Connections:
        key = origin(url)
        if key not in self._connections:
            try:
                self._connections[key] = Connections(*key)
            except PlanError as error:
                raise UnreadableShard(str(error)) from error
        return self._connections[key]

    def _refusal(self, answer: Answer, resumed: bool) -> Exception:
        """What to raise for an answer that is not the file."""
        status = answer.status
        match status:
            case _ if status in RETRIED:
                after = seconds(answer.header("Retry-After"), RETRY_AFTER_SECONDS)
                return ConnectionLost(f"the server answers {status}", after)
            case 412 | 416 if resumed:
                return self.changed(f"the server answers {status} to a request for the rest")
            case 404 | 410:
                return UnreadableShard(f"the server has no such file ({status}); check the URL in data.shards")
            case 401 | 403 | 407:
                return UnreadableShard(
                    f"the server refuses it ({status}); where it asks for a password write https://user:password@host/"
                    "..., and make a signed URL anew, it may have expired"
                )
        return UnreadableShard(f"the server answers {status}; is this the URL of a file?")


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


def _given_up(why: str, attempts: int) -> Exception:
    return UnreadableShard(f"{why}, after {attempts} attempts; see whether the server can be reached")


def _split(url: str, base: SplitResult | None = None) -> SplitResult:
    try:
        parts = urlsplit(urljoin(base.geturl(), url) if base else url)
        if parts.scheme in SCHEMES:
            origin(parts)
    except ValueError as error:
        raise UnreadableShard("the URL, or one that the server sends us on to, is none; check it") from error
    return parts


def _is_same_host(one: SplitResult, other: SplitResult) -> bool:
    """Whether a password for one is for the other too: of one origin, or the same host now by https."""
    (scheme, host, port), there = origin(one), origin(other)
    return there == (scheme, host, port) or ((scheme, port), there) == (("http", 80), ("https", host, 443))


def _target(url: SplitResult) -> str:
    """Path and query as a request has them: what no URL may hold is encoded, codes stay as they are."""
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    target = re.sub("%(?![0-9A-Fa-f]{2})", "%25", target)
    return quote(target, "%/?:@!$&'()*+,;=", errors="surrogateescape")
