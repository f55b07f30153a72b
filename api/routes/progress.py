"""How far the run is: once, or as it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastapi import APIRouter
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from api.models import Progress
from api.service import ServiceDep

router = APIRouter(tags=["progress"])

LOOK_SECONDS = 1.0
REPEAT_SECONDS = 15.0  # also when nothing changes: a proxy in between would close a silent connection


@router.get("/progress")
def read_progress(service: ServiceDep) -> Progress:
    """Dataset shards, rows and bytes by teacher, and the rate of the last minute."""
    return Progress(**service.census.progress())


@router.get("/events", response_class=EventSourceResponse)
async def stream_progress(service: ServiceDep) -> AsyncIterator[ServerSentEvent]:
    """The same as server-sent events named `progress`, whenever it changes."""
    before, waited = None, 0.0
    while not service.stopping():
        now = await run_in_threadpool(service.census.progress)
        if now != before or waited >= REPEAT_SECONDS:
            yield ServerSentEvent(event="progress", data=now, retry=3000)
            before, waited = now, 0.0
        await asyncio.sleep(LOOK_SECONDS)
        waited += LOOK_SECONDS
