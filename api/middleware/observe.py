"""One line and a few counters for every request, and an id by which it can be asked about.

A pure ASGI layer, outermost but for the server's own: what it costs, every range of every training job pays.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import answer, status_of, unexpected
from api.state.metrics import Metrics

access = logging.getLogger("statsvc.access")
log = logging.getLogger("statsvc.api")

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
LOGGED_PATH = 300


class Observe:
    """Request ids, the access log, metrics; and a problem document where an answer failed unexpectedly."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, nbytes = time.perf_counter(), 0, 0
        request_id = _request_id(scope)
        scope["request_id"] = request_id.decode()

        async def observed(message: Message) -> None:
            nonlocal status, nbytes
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            else:
                nbytes += len(message.get("body", b""))
            await send(message)

        metrics = self._metrics
        metrics.in_progress.inc()
        try:
            await self._app(scope, receive, observed)
        except Exception as error:
            if not status and status_of(error) != 500:
                await answer(error)(scope, receive, observed)
                return
            # The text of an unexpected error may name folders or values; where it was raised is for the debug log.
            log.error("unexpected %s in request %s", type(error).__name__, request_id.decode())
            log.debug("request %s", request_id.decode(), exc_info=True)
            if status:
                return  # too late for another answer: the server closes the connection, and the client notices
            await unexpected(error, request_id.decode())(scope, receive, observed)
        finally:
            seconds = time.perf_counter() - begun
            metrics.in_progress.dec()
            method = scope["method"] if scope["method"] in METHODS else "other"
            metrics.count(method, _route(scope), status, 0 if method == "HEAD" else nbytes, seconds)
            if access.isEnabledFor(logging.INFO):
                access.info(_line(scope, request_id, status, nbytes, seconds))


METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})


def _request_id(scope: Scope) -> bytes:
    """The client's own, where it is harmless; else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            given: bytes = value
            return given
    return os.urandom(16).hex().encode()


def _route(scope: Scope) -> str:
    """The path as the routes have it: as many values as there are routes, whatever clients ask for."""
    route = scope.get("route")
    return getattr(route, "path", "none")


def _line(scope: Scope, request_id: bytes, status: int, nbytes: int, seconds: float) -> str:
    """JSON. Without the query and the headers, which may hold secrets."""
    client = scope.get("client")
    return json.dumps({
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": request_id.decode(),
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"][:LOGGED_PATH],
        "status": status,
        "bytes": nbytes,
        "seconds": round(seconds, 6),
    })  # fmt: skip
