"""How far the run is: once, or as it goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from api.errors import answer
from api.models import Progress
from api.service import Service, ServiceDep
from statsvc.errors import StatsvcError

router = APIRouter(tags=["progress"])

LOOK_SECONDS = 1.0
REPEAT_SECONDS = 15.0  # also when nothing changes: a proxy in between would close a silent connection


@router.get("/progress")
def read_progress(service: ServiceDep) -> Progress:
    """Dataset shards, rows and bytes by teacher, and the rate of the last minute."""
    return Progress(**service.counts.progress())


@router.get("/events", response_class=EventSourceResponse)
async def stream_progress(service: ServiceDep) -> AsyncIterator[ServerSentEvent]:
    """The same as server-sent events named `progress`, whenever it changes; `problem` where it cannot be told."""
    before, waited = None, 0.0
    while not service.stopping():
        name, now = await run_in_threadpool(look, service)
        if now != before or waited >= REPEAT_SECONDS:
            yield ServerSentEvent(event=name, data=now, retry=3000)
            before, waited = now, 0.0
        await asyncio.sleep(LOOK_SECONDS)
        waited += LOOK_SECONDS


def look(service: Service) -> tuple[str, dict[str, Any]]:
    """Name and data of the next event."""
    try:
        return "progress", service.counts.progress()
    except (StatsvcError, OSError) as error:
        found: dict[str, Any] = json.loads(bytes(answer(error).body))
        return "problem", found
