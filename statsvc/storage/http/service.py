"""Requests to a statsvc service: its address, its token, and patience when it stumbles."""

from __future__ import annotations

import json
import os
import re
from http import HTTPStatus
from urllib.parse import quote, urljoin, urlsplit

from statsvc.errors import DamagedObject, PlanError, StoreError
from statsvc.storage.http.connections import Answer, ConnectionLost, Connections, Unreachable
from statsvc.storage.http.proxy import origin
from statsvc.storage.http.resuming import Attempts, clean, seconds

TOKEN = "STATSVC_TOKEN"  # the environment variable
# Seconds before each further attempt. A restart of the service passes unnoticed.
PATIENT = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0)
QUICK = PATIENT[:3]  # to open a store: the address may be wrong
RETRY_AFTER_SECONDS = 10.0  # the most that is waited because a service asks for it
RETRIED = (429, 502, 503, 504)
DETAIL_NBYTES = 1 << 16  # of an error's own words


class ServiceClient:
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

    def __reduce__(self) -> tuple[type[ServiceClient], tuple[str, str]]:
        return ServiceClient, (self.url, self.token)  # connections stay in their process

    def attempts(self, path: str, waits: tuple[float, ...] = PATIENT) -> Attempts:
        where = f"{self.url}: {path}"
        return Attempts(
            where,
            waits,
            lambda why, _: StoreError(
                f"{where}: {why}, again and again; see whether `statsvc serve` runs there and can be reached"
            ),
        )

    def request(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """The answer to one request, its body unread. Raises ConnectionLost if a retry may help, else StoreError."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "statsvc", **headers}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            answer = self._connections.request(method, self._target(path), headers)
        except Unreachable as error:
            raise StoreError(f"{self.url}: {error}") from error
        if answer.status in RETRIED:
            raise ConnectionLost(self._says(answer), after=seconds(answer.header("Retry-After"), RETRY_AFTER_SECONDS))
        return answer

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
        return clean(words.replace(self.token, "...") if self.token else words)

    def _says(self, answer: Answer) -> str:
        """What an error says about itself; the answer is closed."""
        words = f"it answers {answer.status}"
        try:
            words += f" ({self.clean(json.loads(answer.read(DETAIL_NBYTES))['detail'])})"
        except (ConnectionLost, ValueError, LookupError, TypeError, AttributeError, RecursionError):
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
        port, (_, host, _) = parts.port, origin(parts)
    except ValueError as error:
        raise PlanError(f"the URL of the store is none, or names no host; {example}") from error
    if "@" in parts.netloc:
        raise PlanError(f"a user and password in the URL of a store are not used; set {TOKEN} or give token=...")
    if not re.fullmatch("[!-~]+", location):
        raise PlanError(f"the URL of the store has spaces or letters beyond ASCII; {example}")
    if "?" in location or "#" in location:
        raise PlanError(f"store {parts.scheme}://{parts.netloc}: leave out what follows '?' or '#'; {example}")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"
