"""What the routes share: one store, what is kept open of it, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

from fastapi import Depends, Path, Request

from api.census import Census
from api.live import LiveStore
from api.metrics import Metrics
from api.objects import Objects
from api.reader import TargetReader
from api.settings import Settings


@dataclass
class Service:
    """One app's state."""

    settings: Settings
    live: LiveStore
    stopping: Callable[[], bool] = field(default=lambda: False)  # whether the server is about to end

    @cached_property
    def objects(self) -> Objects:
        return Objects(self.live)

    @cached_property
    def census(self) -> Census:
        return Census(self.live)

    @cached_property
    def reader(self) -> TargetReader:
        return TargetReader(self.live)

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics(self.census)


def service_of(request: Request) -> Service:
    """The service that answers a request."""
    found: Service = request.app.state.service
    return found


ServiceDep = Annotated[Service, Depends(service_of)]
NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
TeacherName = Annotated[str, Path(pattern=NAME, description="name of a teacher", examples=["dino"])]
