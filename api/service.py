"""What the routes share: one store, what is kept open of it, and how far it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends, Path, Request

from api.errors import Busy
from api.serving.objects import Objects
from api.serving.send import Sender
from api.settings import Settings
from api.state.counts import Counts
from api.state.live_store import LiveStore
from api.state.metrics import Metrics

FEW = 4


class Service:
    """One app's state. `stopping` says whether the server is about to end."""

    def __init__(self, settings: Settings, live: LiveStore, stopping: Callable[[], bool]) -> None:
        self.settings, self.live, self.stopping = settings, live, stopping
        self.objects = Objects(live)
        self.sender = Sender(self.objects, settings.accel_prefix)
        self.counts = Counts(live)
        self._few = threading.BoundedSemaphore(FEW)
        self.metrics = Metrics(self.counts)

    @contextmanager
    def one_of_few(self) -> Iterator[None]:
        """For answers that take long: so many at a time, so that threads are left for the others. Raises Busy."""
        if not self._few.acquire(blocking=False):
            raise Busy(f"{FEW} requests of this kind are being answered, as many as this service takes; try again")
        try:
            yield
        finally:
            self._few.release()


def service_of(request: Request) -> Service:
    """The service that answers a request."""
    found: Service = request.app.state.service
    return found


async def _dependency(request: Request) -> Service:
    return service_of(request)  # async: FastAPI would run a plain function in a thread, which takes longer than this


ServiceDep = Annotated[Service, Depends(_dependency)]
NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
TeacherName = Annotated[str, Path(pattern=NAME, description="name of a teacher", examples=["dino"])]
