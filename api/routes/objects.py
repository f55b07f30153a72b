"""The store as statsvc's own readers open it: arrays, and the ledger beside them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from api.byteroute import ByteRoute
from api.models import Names
from api.openapi import OBJECT, RANGE_HEADERS, problems
from api.service import ServiceDep

router = APIRouter(tags=["arrays"])
byte_router = APIRouter(tags=["arrays"], route_class=ByteRoute)

StorePath = Annotated[str, Path(description="store-relative path", examples=[".statsvc/commits/index/000000.json"])]
Folder = Annotated[str, Path(description="store-relative path of a folder", examples=[".statsvc/commits/index"])]


@router.get("/objects/{folder:path}/", responses=problems(404))
def list_objects(service: ServiceDep, folder: Folder) -> Names:
    """Sorted names of what lies directly below a folder: `teachers`, their `cache`, `.statsvc/commits` and below."""
    return Names(names=service.objects.names(folder))


@byte_router.head("/objects/{path:path}", include_in_schema=False)
@byte_router.get(
    "/objects/{path:path}",
    response_model=None,
    responses=OBJECT,
    openapi_extra=RANGE_HEADERS,
)
def read_object(path: StorePath) -> str:
    """What /zarr has, and commits, transforms and reports: what `statsvc.open("http://...")` reads."""
    return path


router.include_router(byte_router)
