"""Requests to a statsvc service: its address, its token, kept connections, and patience when it stumbles."""

from __future__ import annotations

import json
import logging
import os
import re
from http import HTTPStatus
from urllib.parse import quote, urljoin

from urllib3 import BaseHTTPResponse, HTTPConnectionPool, Retry, Timeout, connection_from_url
from urllib3.exceptions import HTTPError, InvalidHeader, LocationParseError
from urllib3.util import parse_url

from statsvc.errors import DamagedObject, PlanError, StoreError

log = logging.getLogger("statsvc")

TOKEN = "STATSVC_TOKEN"  # the environment variable
TIMEOUT = Timeout(connect=5, read=60)  # seconds without a byte
CONNECTIONS = 16  # that are kept; more threads than that get one each, which is closed after use
RETRY_AFTER_SECONDS = 10.0  # the most that is waited because a service asks for it
DETAIL_NBYTES, DETAIL_CHARACTERS = 1 << 16, 300  # of an error's own words
RETRIED = {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE,
           HTTPStatus.GATEWAY_TIMEOUT}  # fmt: skip


class _Patience(Retry):
    """Retry, but whatever a Retry-After header holds, the wait is short."""

    def parse_retry_after(self, retry_after: str) -> float:
        try:
            return min(super().parse_retry_after(retry_after), RETRY_AFTER_SECONDS)
        except InvalidHeader:
            return 0


# Waits 0, 0.5, 1, 2, 4, 8, 10 and 10 s, each up to a quarter longer so that workers do not come back all at once: a
# restart of the service passes unnoticed. A service that accepts and then says nothing is given up sooner.
PATIENT = _Patience(total=8, read=3, other=1, backoff_factor=0.25, backoff_max=10, backoff_jitter=0.25)
QUICK = PATIENT.new(total=3)  # to open a store: the address may be wrong


class Attempts:
    """Failures since bytes last came; waits after each, and ends with a StoreError."""

    def __init__(self, service: Service, path: str, patience: Retry = PATIENT) -> None:
        self._service, self._path, self._patience = service, path, patience
        self.progress()

    def progress(self) -> None:
        """Bytes came: the next failure is the first."""
        self._retry = self._patience

    def failed(self, why: HTTPError | BaseHTTPResponse) -> None:
        """Wait before the next attempt. Raises StoreError where there is to be none."""
        response = why if isinstance(why, BaseHTTPResponse) else None
        error = why if isinstance(why, HTTPError) else None
        reason = self._service.says(response) if response else self._service.clean(str(error))
        try:
            self._retry = self._retry.increment("GET", self._path, response=response, error=error)
        except HTTPError as end:
            raise StoreError(
                f"{self._service.url}: {self._path}: {reason}, {len(self._retry.history) + 1} times running; see "
                "whether `statsvc serve` runs there and can be reached, then try again"
            ) from end
        log.info("%s: %s: %s; trying again", self._service.url, self._path, reason)
        self._retry.sleep(response)


class Service:
    """One service. Never says its token.

    url    without a slash at its end
    """

    def __init__(self, location: str, token: str | None) -> None:
        """Raises PlanError for an address or token that cannot be used."""
        self.url = _address(location)
        self.token = (token if token is not None else os.environ.get(TOKEN, "")).strip()
        if not re.fullmatch(r"[!-~]*", self.token):
            raise PlanError(f"the token for {self.url} (token= or {TOKEN}) has spaces or letters beyond ASCII")
        self._prefix = parse_url(self.url).path or ""
        self._pools: dict[int, HTTPConnectionPool] = {}

    def __reduce__(self) -> tuple[type[Service], tuple[str, str]]:
        return Service, (self.url, self.token)

    def send(self, method: str, path: str, headers: dict[str, str], attempts: Attempts) -> BaseHTTPResponse:
        """The answer, its body unread, to a request for `path` below the address. Raises StoreError for none."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "statsvc", **headers}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        while True:
            try:
                response = self._pool().urlopen(
                    method, self._target(path), headers=headers, timeout=TIMEOUT, retries=False, redirect=False,
                    preload_content=False, decode_content=False,
                )  # fmt: skip
            except HTTPError as error:
                attempts.failed(error)
                continue
            if response.status not in RETRIED:
                return response
            attempts.failed(response)

    def refusal(self, path: str, response: BaseHTTPResponse) -> Exception:
        """What to raise for an answer that is not the object."""
        said = self.says(response)
        match response.status:
            case HTTPStatus.NOT_FOUND:
                return FileNotFoundError(f"{self.url} has no object {path}")
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                wrong = "the token given is not the one" if self.token else "it needs a token"
                return StoreError(f"{self.url}: {said}; {wrong}: set {TOKEN} or give token=... to statsvc.open")
            case HTTPStatus.CONFLICT:
                return DamagedObject(f"{path}: {said}; run `statsvc verify --repair` where the store lies")
            case HTTPStatus.PRECONDITION_FAILED | HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return Replaced(path)
            case status if 300 <= status < 400:
                to = urljoin(self.url + self._target(path), response.headers.get("Location", ""))
                to = self.clean(to.partition("?")[0].removesuffix(self._target(path)).removesuffix("/objects/" + path))
                return StoreError(
                    f"{self.url} sends us on to {re.sub('//[^/]*@', '//', to)}; a token is not carried elsewhere: give "
                    "the address at which the service itself answers"
                )
        return StoreError(f"{self.url}: {path}: {said}; is this the address of `statsvc serve`?")

    def says(self, response: BaseHTTPResponse) -> str:
        """What an answer that is an error says about itself. Its connection is free afterwards."""
        words = f"it answers {response.status}"
        try:
            problem = json.loads(response.read(DETAIL_NBYTES))
            words += f" ({self.clean(problem['detail'])})"
        except (HTTPError, ValueError, LookupError, TypeError, RecursionError):
            pass  # a proxy's page, or no body
        done(response)
        return words

    def clean(self, words: str) -> str:
        """Of an unknown source, for a message: short, printable, without the token."""
        words = re.sub(r"^\w+(Pool)?\([^)]*\): ", "", words)  # how urllib3 names its connections
        if self.token:
            words = words.replace(self.token, "...")
        return "".join(c if c.isprintable() else "?" for c in words[:DETAIL_CHARACTERS])

    def _target(self, path: str) -> str:
        return f"{self._prefix}/objects/{quote(path)}"

    def _pool(self) -> HTTPConnectionPool:
        """The connections of this process: a forked child must not share its parent's.

        The child keeps its parent's pool, unused: to drop it means to take its lock, which may have been held.
        """
        process = os.getpid()
        if process not in self._pools:
            self._pools.setdefault(process, connection_from_url(self.url, maxsize=CONNECTIONS))
        return self._pools[process]


class Replaced(DamagedObject):
    """The service has another object at this path than the one that is being read."""

    def __init__(self, path: str, why: str = "the service has another object there now") -> None:
        super().__init__(f"{path}: {why}; open the store again")


def done(response: BaseHTTPResponse) -> None:
    """Keep the connection if the answer was read to its end."""
    if response.length_remaining == 0:
        response.drain_conn()
    else:
        response.close()


def _address(location: str) -> str:
    """Raises PlanError. What may be a secret is not repeated."""
    try:
        url = parse_url(location)
    except LocationParseError as error:
        raise PlanError("the URL of the store is none; it looks like http://host:8000") from error
    where = f"store {url.scheme}://{url.netloc}"
    if not url.host:
        raise PlanError("the URL of the store names no host; it looks like http://host:8000")
    if url.auth is not None:
        raise PlanError(f"{where}: a user and password in the URL are not used; set {TOKEN} or give token=...")
    if url.query is not None or url.fragment is not None:
        raise PlanError(f"{where}: the URL of a store ends with its path; leave out what follows '?' or '#'")
    return f"{url.scheme}://{url.netloc}{(url.path or '').rstrip('/')}"
