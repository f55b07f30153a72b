"""HEAD where the answer is computed: it is made as for GET, and the server sends its head alone."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

# Routes of objects take HEAD themselves, so that no byte is read for it; /events has no end.
NOT_HERE = ("/zarr/", "/objects/", "/events")


class HeadAsGet:
    """FastAPI's routes know GET alone, and RFC 9110 (9.1) asks for both."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if scope["method"] != "HEAD" or path.startswith(NOT_HERE) or "/shards/" in path:
            await self._app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}  # a copy: the server goes by its own what to send
        await self._app(as_get, receive, send)
        scope["route"] = as_get.get("route")
