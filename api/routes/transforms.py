"""Fitted transforms: PHI-S and every other method, current by name and immutable by digest."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response

from api.errors import NotFitted, TooMuch
from api.models import DIGEST, TransformCard
from api.openapi import problems
from api.routes.negotiate import MEDIA_TYPES, VARY, DType, Format, choose, is_known, not_modified
from api.service import Service, ServiceDep, TeacherName
from statsvc.errors import NotFound
from statsvc.numerics.transform import TENSORS
from statsvc.numerics.transform_files import ENCODE
from statsvc.store.paths import transform_path
from statsvc.store.reader import Store, Teacher

router = APIRouter(tags=["transforms"])

IMMUTABLE = {"Cache-Control": "max-age=31536000, immutable"}
CURRENT = {"Cache-Control": "no-cache"}
FORMATS = ("json", "safetensors", "npz")

Output = Annotated[
    str, Query(description="which output of the teacher", pattern=r"^[a-z]{1,32}$", examples=["patches"])
]
FormatQuery = Annotated[
    Format | None, Query(alias="format", description="instead of an Accept header", examples=["npz"])
]
DTypeQuery = Annotated[DType, Query(description="of the numbers; the artifact itself is float64", examples=["float32"])]
Method = Annotated[
    str, Path(pattern=r"^[a-z0-9-]{1,32}$", description="phi-s, global, standardize, ...", examples=["phi-s"])
]
Digest = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="of the transform", examples=[DIGEST])]

RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": TransformCard,
        "content": {
            MEDIA_TYPES["safetensors"]: {"schema": {"type": "string", "format": "binary"}},
            MEDIA_TYPES["npz"]: {"schema": {"type": "string", "format": "binary"}},
        },
    },
    304: {"description": "The client has it already (If-None-Match)"},
    **problems(404, 406, 409, 422),
}


@router.get("/teachers/{name}/phis", response_model=None, responses=RESPONSES)
def read_phis(
    request: Request,
    service: ServiceDep,
    name: TeacherName,
    output: Output = "patches",
    format_: FormatQuery = None,
    dtype: DTypeQuery = "float64",
) -> Response:
    """The PHI-S transform of a teacher. Before the fit: 404 with the progress and Retry-After."""
    return current(request, service, name, "phi-s", output, format_, dtype)


@router.get("/teachers/{name}/transforms/{method}", response_model=None, responses=RESPONSES)
def read_transform(
    request: Request,
    service: ServiceDep,
    name: TeacherName,
    method: Method,
    output: Output = "patches",
    format_: FormatQuery = None,
    dtype: DTypeQuery = "float64",
) -> Response:
    """The transform of any fitted method."""
    return current(request, service, name, method, output, format_, dtype)


@router.get("/transforms/{digest}", response_model=None, responses=RESPONSES)
def read_by_digest(
    request: Request, service: ServiceDep, digest: Digest, format_: FormatQuery = None, dtype: DTypeQuery = "float64"
) -> Response:
    """A transform by its digest, whether or not it is a current fit: it never changes."""
    if service.live.current().backend.size(transform_path(digest)) is None:
        raise NotFound(f"no transform {digest}; /teachers lists the current ones")
    return represent(request, service, digest, format_, dtype, IMMUTABLE)


def current(
    request: Request, service: Service, name: str, method: str, output: str, asked: str | None, dtype: str
) -> Response:
    """The current fit of a method."""
    teacher = planned_teacher(service, name)
    teacher.output(output)
    fits = service.live.fits(teacher)
    if not fits:
        raise NotFitted(
            f"teacher {name} is not fitted yet: the measure phase is going on; ask again later",
            service.counts.progress(),
        )
    found = fits.get(output, {}).get(method)
    if found is None:
        raise NotFound(f"teacher {name} has no fitted {method!r} for {output}; there are {', '.join(fits[output])}")
    if isinstance(found, dict):
        raise NotFound(f"{method} was refused for {name} {output}: {found['refused']}")
    return represent(request, service, found, asked, dtype, CURRENT)


def planned_teacher(service: Service, name: str) -> Teacher:
    """A teacher of the store. Raises NotFitted for one that the run has not come to yet."""
    try:
        return service.live.teacher(name)
    except NotFound:
        progress = service.counts.progress()
        if name in progress["teachers"]:
            raise NotFitted(f"teacher {name} is planned, and not measured yet; ask again later", progress) from None
        raise


def represent(
    request: Request,
    service: Service,
    digest: str,
    asked: str | None,
    dtype: str,
    caching: dict[str, str],
) -> Response:
    """The transform in the form that was asked for, or 304."""
    chosen = choose(request, asked, FORMATS)
    etag = f'"{digest}"' if (chosen, dtype) == ("json", "float64") else f'"{digest}-{chosen}-{dtype}"'
    headers = {**caching, **VARY, "Statsvc-Transform": digest}
    if is_known(request, etag):
        return not_modified(etag, headers)
    headers["ETag"] = etag
    store = service.live.current()
    if chosen != "json":
        transform = store.transform(digest)
        refuse_if_large(service, sum(getattr(transform, name).size for name in TENSORS) * np.dtype(dtype).itemsize)
        content = ENCODE[chosen](transform, dtype, False)
        headers["Content-Disposition"] = f'attachment; filename="{digest[:12]}.{chosen}"'
        return Response(content, headers=headers, media_type=MEDIA_TYPES[chosen])
    return JSONResponse(described(store, digest, dtype), headers=headers)


@lru_cache(maxsize=256)
def described(store: Store, digest: str, dtype: str) -> dict[str, Any]:
    """A transform without its matrix; kept, as it never changes and its artifact may be large."""
    transform, report = store.transform(digest), store.report(digest)
    links = {"teacher": f"/teachers/{report['teacher']}",
             "immutable": f"/transforms/{transform.digest}",
             "safetensors": f"/transforms/{transform.digest}?format=safetensors",
             "npz": f"/transforms/{transform.digest}?format=npz"}  # fmt: skip
    card = TransformCard(
        teacher=report["teacher"],
        output=transform.output,
        method=transform.method,
        digest=transform.digest,
        alpha=transform.alpha,
        count=transform.count,
        images=report["images"],
        dim=len(transform.mean),
        rank=transform.rank,
        mean=transform.mean.astype(dtype).tolist(),
        rotation=transform.rotation,
        hadamard=transform.hadamard,
        fingerprint=transform.fingerprint,
        converged=report["converged"],
        links=links,
    )
    return card.model_dump()


def refuse_if_large(service: Service, nbytes: int) -> None:
    """Raises TooMuch."""
    most = service.settings.max_answer_bytes
    if nbytes > most:
        raise TooMuch(f"{nbytes} bytes; an answer that is computed holds {most} (STATSVC_MAX_ANSWER_BYTES)")
