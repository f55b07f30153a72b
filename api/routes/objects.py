"""The store as statsvc's own readers open it: arrays, and the ledger beside them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import Response

from api.models import Names
from api.openapi import OBJECT, RANGE_HEADERS, problems
from api.service import ServiceDep

router = APIRouter(tags=["arrays"])

StorePath = Annotated[str, Path(description="store-relative path", examples=[".statsvc/commits/index/000000.json"])]
Folder = Annotated[str, Path(description="store-relative path of a folder", examples=[".statsvc/commits/index"])]


@router.get("/objects/{folder:path}/", responses=problems(404))
def list_objects(service: ServiceDep, folder: Folder) -> Names:
    """Sorted names of what lies directly below a folder: `teachers`, their `cache`, `.statsvc/commits` and below."""
    return Names(names=service.objects.names(folder))


@router.head("/objects/{path:path}", include_in_schema=False, response_model=None)
@router.get("/objects/{path:path}", response_model=None, responses=OBJECT, openapi_extra=RANGE_HEADERS)
async def read_object(service: ServiceDep, path: StorePath) -> Response:
    """What /zarr has, and commits, transforms and reports: what `statsvc.open("http://...")` reads."""
    return await service.sender.response(path)
