"""Routes whose answer is an object of the store."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

from api.objects import Readable
from api.service import Service, service_of


class ObjectResponse(Response):
    """An object, sent as it lies there."""

    def __init__(self, readable: Readable, service: Service) -> None:
        super().__init__()
        self._readable, self._sender = readable, service.sender

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._sender.send(self._readable, scope, receive, send)


class ByteRoute(APIRoute):
    """A documented route whose endpoint turns the `path` of the request into that of an object.

    It passes by what FastAPI does for an endpoint otherwise, which for short ranges takes longer than the bytes do.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[str], str] = self.endpoint

        async def handle(request: Request) -> Response:
            service = service_of(request)
            path = endpoint(request.path_params["path"])
            readable = service.objects.kept(path)
            if readable is None:
                readable = await service.sender.in_thread(service.objects.open, path)
            return ObjectResponse(readable, service)

        return handle
