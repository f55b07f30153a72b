"""An object of the store as the answer of a route."""

from __future__ import annotations

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from api.objects import Readable, Remote
from api.service import Service


class ObjectResponse(Response):
    """An object, sent as it lies there, with ranges and conditions."""

    def __init__(self, readable: Readable | Remote, service: Service) -> None:
        super().__init__()
        self._readable, self._sender = readable, service.sender

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._sender.send(self._readable, scope, receive, send)


async def object_response(service: Service, path: str) -> ObjectResponse:
    """Raises NotFound where nothing may be read, DamagedObject where a commit vouches for other bytes."""
    return ObjectResponse(await service.sender.in_thread(service.objects.open, path), service)
