"""Requests to a statsvc service: its address, its token, and patience when it stumbles."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import ssl
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import quote, urljoin, urlsplit

from statsvc.errors import DamagedObject, PlanError, StoreError
from statsvc.storage.http.connections import Answer, Connections, Lost

log = logging.getLogger("statsvc")

TOKEN = "STATSVC_TOKEN"  # the environment variable
# Seconds before each further attempt, and up to a quarter more so that workers do not come back all at once. A restart
# of the service passes unnoticed.
PATIENT = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0)
QUICK = PATIENT[:3]  # to open a store: the address may be wrong
RETRY_AFTER_SECONDS = 10.0  # the most that is waited because a service asks for it
SLOW = 3  # attempts that one counts for which took all the time there is
RETRIED = (429, 502, 503, 504)
DETAIL_NBYTES, DETAIL_CHARACTERS = 1 << 16, 300  # of an error's own words


class Attempts:
    """Failures since bytes last came; waits after each, and ends with a StoreError."""

    def __init__(self, service: Service, path: str, waits: tuple[float, ...] = PATIENT) -> None:
        self._service, self._path, self._waits, self._failures = service, path, waits, 0

    def progress(self) -> None:
        """Bytes came: the next failure is the first."""
        self._failures = 0

    def failed(self, why: str, after: float = 0, slow: bool = False) -> None:
        """Wait before the next attempt, at least `after` seconds. Raises StoreError where there is to be none."""
        wait = self._waits[self._failures] if self._failures < len(self._waits) else 0
        self._failures += SLOW if slow else 1
        why = f"{self._service.url}: {self._path}: {self._service.clean(why)}"
        if self._failures > len(self._waits):
            raise StoreError(f"{why}, again and again; see whether `statsvc serve` runs there and can be reached")
        log.info("%s; trying again", why)
        time.sleep(max(wait * random.uniform(1, 1.25), after))


class Service:
    """One service. Never says its token.

    url  without a slash at its end
    """

    def __init__(self, location: str, token: str | None) -> None:
        """Raises PlanError for an address or token that cannot be used."""
        self.url = _address(location)
        self.token = (os.environ.get(TOKEN, "") if token is None else token).strip()
        if not re.fullmatch("[!-~]*", self.token):
            raise PlanError(f"the token for {self.url} (token= or {TOKEN}) has spaces or letters beyond ASCII")
        parts = urlsplit(self.url)
        self._prefix = parts.path
        self._connections = Connections(parts.scheme, parts.hostname or "", parts.port)

    def __reduce__(self) -> tuple[type[Service], tuple[str, str]]:
        return Service, (self.url, self.token)  # connections stay in their process

    def send(self, method: str, path: str, headers: dict[str, str], attempts: Attempts) -> Answer:
        """The answer to a request for an object, its body unread. Raises StoreError for none."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "statsvc", **headers}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        while True:
            try:
                answer = self._connections.request(method, self._target(path), headers)
            except Lost as error:
                attempts.failed(str(error), slow=error.slow)
            except ssl.SSLCertVerificationError as error:
                raise StoreError(f"{self.url}: its certificate is not trusted: {error.verify_message}") from error
            else:
                if answer.status not in RETRIED:
                    return answer
                after = _seconds(answer.header("Retry-After"))
                attempts.failed(self._says(answer), after)

    def refusal(self, path: str, answer: Answer) -> Exception:
        """What to raise for an answer that is not the object; the answer is closed."""
        where, said = answer.header("Location"), self._says(answer)
        match answer.status:
            case HTTPStatus.NOT_FOUND:
                return FileNotFoundError(f"{self.url} has no object {path}")
            case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
                wrong = "the token given is not the one" if self.token else "it asks for a token"
                return StoreError(f"{self.url}: {said}; {wrong}: set {TOKEN} or give token=... to statsvc.open")
            case HTTPStatus.CONFLICT:
                return DamagedObject(f"{path}: {said}; run `statsvc verify --repair` where the store lies")
            case HTTPStatus.PRECONDITION_FAILED | HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return Replaced(path)
            case _ if where is not None:
                to = urljoin(self.url + self._target(path), where).partition("?")[0]
                to = self.clean(re.sub("//[^/]*@", "//", to).removesuffix(f"/objects/{quote(path)}"))
                return StoreError(
                    f"{self.url} sends us on to {to}; a token is not carried elsewhere: open that instead"
                )
        return StoreError(f"{self.url}: {path}: {said}; is this the address of `statsvc serve`?")

    def clean(self, words: str) -> str:
        """Words of an unknown source for a message: short, printable, without the token."""
        words = words.replace(self.token, "...") if self.token else words
        return "".join(c if c.isprintable() else "?" for c in words[:DETAIL_CHARACTERS])

    def _says(self, answer: Answer) -> str:
        """What an error says about itself; the answer is closed."""
        words = f"it answers {answer.status}"
        try:
            words += f" ({self.clean(json.loads(answer.read(DETAIL_NBYTES))['detail'])})"
        except (Lost, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass  # a proxy's page, or nothing
        finally:
            answer.close()
        return words

    def _target(self, path: str) -> str:
        return f"{self._prefix}/objects/{quote(path)}"


class Replaced(DamagedObject):
    """The service has another object at this path than the one that is being read."""

    def __init__(self, path: str, why: str = "the service has another object there now") -> None:
        super().__init__(f"{path}: {why}; open the store again")


def _address(location: str) -> str:
    """Raises PlanError; what may be a secret is not repeated."""
    example = "it looks like http://host:8000"
    try:
        parts = urlsplit(location)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise PlanError(f"the URL of the store is none; {example}") from error
    if "@" in parts.netloc:
        raise PlanError(f"a user and password in the URL of a store are not used; set {TOKEN} or give token=...")
    if not host or not re.fullmatch("[!-~]+", location):
        raise PlanError(f"the URL of the store names no host, or has spaces or letters beyond ASCII; {example}")
    if "?" in location or "#" in location:
        raise PlanError(f"store {parts.scheme}://{parts.netloc}: leave out what follows '?' or '#'; {example}")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header: a number of seconds or a date. 0 for none, and never long."""
    seconds: float = 0
    try:
        seconds = int(retry_after or 0)
    except ValueError:
        with suppress(ValueError, TypeError, OverflowError):
            seconds = parsedate_to_datetime(retry_after or "").timestamp() - time.time()
    return min(max(seconds, 0), RETRY_AFTER_SECONDS)
