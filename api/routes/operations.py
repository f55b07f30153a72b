"""For those who keep the service running."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from api.models import Health
from api.openapi import problems
from api.service import ServiceDep

router = APIRouter(tags=["operations"])


@router.get("/healthz", openapi_extra={"security": []})
async def is_alive() -> Health:
    """The process answers. Needs no token and no store, and is answered under any load."""
    return Health(status="ok")


@router.get("/readyz", responses=problems(503))
def is_ready(service: ServiceDep) -> Health:
    """The store can be read."""
    store = service.live.current()
    for name in store.teachers():
        service.live.teacher(name)
    return Health(status="ready")


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "content": {"text/plain": {"schema": {"type": "string"}, "example": 'statsvc_fitted{teacher="dino"} 1.0'}}
        }
    },
)
def read_metrics(service: ServiceDep) -> Response:
    """Prometheus: requests, bytes, latencies, the store's gauges and the run's progress."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
