"""Objects that are open already go out before a route is looked for, which takes longer than a short range itself.

The routes /zarr and /objects answer everything else, and would give the same answer to this.
"""

from __future__ import annotations

from types import SimpleNamespace

from starlette.types import ASGIApp, Receive, Scope, Send

from api.objects import is_zarr
from api.service import Service

# By the prefix of the request's path: the route that would have answered, which is what metrics count.
ROUTES = {prefix: SimpleNamespace(path=f"{prefix}{{path:path}}") for prefix in ("/zarr/", "/objects/")}


class Shortcut:
    """GET and HEAD of kept objects."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Whether an object is still the one that was kept, storage elsewhere would have to be asked: not from here.
        if scope["method"] in ("GET", "HEAD") and not self._service.live.is_remote:
            for prefix, route in ROUTES.items():
                path = scope["path"].removeprefix(prefix)
                if path is not scope["path"] and (prefix != "/zarr/" or is_zarr(path)):
                    readable = self._service.objects.kept(path)
                    if readable is not None:
                        scope["route"] = route
                        await self._service.sender.send(readable, scope, receive, send)
                        return
        await self._app(scope, receive, send)
