"""The statistics that the fits were made from."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from api.errors import NotFitted
from api.models import MomentsCard
from api.openapi import BINARY, problems
from api.routes.negotiate import MEDIA_TYPES, VARY, choose, is_known, not_modified
from api.routes.transforms import CURRENT, DTypeQuery, Output, planned_teacher, refuse_if_large
from api.service import ServiceDep, TeacherName
from statsvc.numerics.moments import Moments
from statsvc.numerics.transform_files import npz
from statsvc.store.reader import Teacher

router = APIRouter(tags=["statistics"])

MomentsFormat = Annotated[
    Literal["json", "npz"] | None, Query(alias="format", description="instead of an Accept header", examples=["npz"])
]


@router.get(
    "/teachers/{name}/moments",
    response_model=None,
    responses={
        200: {"model": MomentsCard, "content": {MEDIA_TYPES["npz"]: BINARY}},
        304: {"description": "The client has it already (If-None-Match)"},
        **problems(404, 406, 409),
    },
)
def read_moments(
    request: Request,
    service: ServiceDep,
    name: TeacherName,
    output: Output = "patches",
    format_: MomentsFormat = None,
    dtype: DTypeQuery = "float64",
) -> Response:
    """Count, mean and covariance of the pilot; the covariance with format=npz."""
    teacher = planned_teacher(service, name)
    teacher.output(output)
    fits = [digest for digest in service.live.fits(teacher).get(output, {}).values() if isinstance(digest, str)]
    if not fits:
        raise NotFitted(f"teacher {name} is being measured; ask again later", service.counts.progress())
    digest = service.live.moments_digest(fits[0])
    chosen = choose(request, format_, ("json", "npz"))
    etag = f'"{digest}-{chosen}-{dtype}"'
    headers = {**CURRENT, **VARY}
    if is_known(request, etag):
        return not_modified(etag, headers)
    headers["ETag"] = etag
    if chosen == "npz":
        refuse_if_large(service, teacher.output(output).dim ** 2 * np.dtype(dtype).itemsize)
    moments = merged(teacher, output, digest)
    if chosen == "npz":
        arrays = {"count": np.array(moments.count), "mean": moments.mean.astype(dtype),
                  "covariance": moments.covariance().astype(dtype)}  # fmt: skip
        return Response(npz(arrays), headers=headers, media_type=MEDIA_TYPES["npz"])
    card = MomentsCard(
        teacher=name,
        output=output,
        count=moments.count,
        dim=len(moments.mean),
        mean=moments.mean.astype(dtype).tolist(),
        variance=np.diagonal(moments.covariance()).astype(dtype).tolist(),
        digest=digest,
        fingerprint=teacher.fingerprint,
        links={"npz": f"/teachers/{name}/moments?output={output}&format=npz", "teacher": f"/teachers/{name}"},
    )
    return JSONResponse(card.model_dump(), headers=headers)


@lru_cache(maxsize=8)
def merged(teacher: Teacher, output: str, digest: str) -> Moments[Any]:
    """The pilot's moments, kept: merging those of a large pilot takes seconds."""
    del digest
    return teacher.moments(output)
