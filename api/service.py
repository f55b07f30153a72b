"""What the routes share: one store, what is kept open of it, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Path, Request

from api.census import Census
from api.files import Sender
from api.live import LiveStore
from api.metrics import Metrics
from api.objects import Objects
from api.reader import TargetReader
from api.settings import Settings


class Service:
    """One app's state. `stopping` says whether the server is about to end."""

    def __init__(self, settings: Settings, live: LiveStore, stopping: Callable[[], bool]) -> None:
        self.settings, self.live, self.stopping = settings, live, stopping
        self.objects = Objects(live)
        self.sender = Sender(settings.accel_prefix)
        self.census = Census(live)
        self.reader = TargetReader(live)
        self.metrics = Metrics(self.census)


def service_of(request: Request) -> Service:
    """The service that answers a request."""
    found: Service = request.app.state.service
    return found


async def _dependency(request: Request) -> Service:
    return service_of(request)  # async: FastAPI would run a plain function in a thread, which takes longer than this


ServiceDep = Annotated[Service, Depends(_dependency)]
NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
TeacherName = Annotated[str, Path(pattern=NAME, description="name of a teacher", examples=["dino"])]
