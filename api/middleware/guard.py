"""Who may ask, how much, and how many at a time."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import Busy, answer, problem
from api.settings import Settings
from api.state.metrics import Metrics

MAX_HEADER_NBYTES = 32 << 10
MAX_PATH_NBYTES = 4 << 10
MAX_QUERY_NBYTES = 16 << 10
WATCHED_PATH = "/metrics"  # which has to tell of the overload
OPEN_PATH = "/healthz"  # for whoever keeps the process alive, also under overload and without a token


class Guard:
    """The limits and the token, before anything else is done for a request."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        token = settings.token
        self._expected = f"bearer {token.get_secret_value()}".encode() if token else None
        self._max_requests = settings.max_requests
        self._answering = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == OPEN_PATH:
            await self._app(scope, receive, send)
            return
        if self._answering >= self._max_requests and scope["path"] != WATCHED_PATH:
            self._metrics.refused.inc()
            refusal = answer(
                Busy(f"{self._answering} requests are being answered, as many as this service takes; try again")
            )
            await refusal(scope, receive, send)
            return
        self._answering += 1
        try:
            refused = _limit(scope) or self._unauthorized(scope)
            await (refused or self._app)(scope, receive, send)
        finally:
            self._answering -= 1

    def _unauthorized(self, scope: Scope) -> ASGIApp | None:
        if self._expected is None:
            return None
        given = b"".join(value for name, value in scope["headers"] if name == b"authorization")
        scheme, _, token = given.partition(b" ")
        # Compared as a whole, in a time that does not tell how much of it was right.
        if hmac.compare_digest(scheme.lower() + b" " + token.strip(), self._expected):
            return None
        detail = "this service asks for a bearer token: send Authorization: Bearer <token>"
        return problem(401, detail, {"WWW-Authenticate": "Bearer"})


def _limit(scope: Scope) -> ASGIApp | None:
    """The answer to a request that is too large by itself."""
    nbytes = sum(len(name) + len(value) for name, value in scope["headers"])
    if nbytes > MAX_HEADER_NBYTES:
        return problem(431, f"headers of {nbytes} bytes; {MAX_HEADER_NBYTES} are taken")
    if len(scope["raw_path"]) > MAX_PATH_NBYTES or len(scope["query_string"]) > MAX_QUERY_NBYTES:
        return problem(414, f"a path of at most {MAX_PATH_NBYTES} bytes and a query of {MAX_QUERY_NBYTES} are taken")
    return None
