"""The store as any Zarr client opens it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from api.byteroute import ByteRoute
from api.objects import absent
from api.openapi import OBJECT, RANGE_HEADERS

router = APIRouter(tags=["arrays"], route_class=ByteRoute)

ZarrPath = Annotated[str, Path(description="path below the store's root", examples=["teachers/dino/status/zarr.json"])]


@router.head("/zarr/{path:path}", include_in_schema=False)
@router.get("/zarr/{path:path}", response_model=None, responses=OBJECT, openapi_extra=RANGE_HEADERS)
def read_zarr(path: ZarrPath) -> str:
    """Every zarr.json, and committed chunks byte for byte: open http://host:port/zarr with any Zarr v3 client.

    An uncommitted chunk is 404, which the Zarr specification calls absent.
    """
    if path.startswith("."):
        raise absent(path)
    return path
