"""The store as any Zarr client opens it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import Response

from api.openapi import OBJECT, RANGE_HEADERS
from api.service import ServiceDep
from api.serving.objects import absent, is_zarr

router = APIRouter(tags=["arrays"])

ZarrPath = Annotated[str, Path(description="path below the store's root", examples=["teachers/dino/status/zarr.json"])]


@router.head("/zarr/{path:path}", include_in_schema=False, response_model=None)
@router.get("/zarr/{path:path}", response_model=None, responses=OBJECT, openapi_extra=RANGE_HEADERS)
async def read_zarr(service: ServiceDep, path: ZarrPath) -> Response:
    """Every zarr.json, and committed chunks byte for byte: open http://host:port/zarr with any Zarr v3 client.

    An uncommitted chunk is 404, which the Zarr specification calls absent.
    """
    if not is_zarr(path):
        raise absent(path)
    return await service.sender.response(path)
