"""Decoded targets for thin clients: a few rows as a numpy array, for those who read no Zarr."""

from __future__ import annotations

import io
import re
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Query
from fastapi.responses import Response

from api.errors import BadRequest, TooMuch
from api.openapi import BINARY, problems
from api.routes.shards import SetQuery, choose_set
from api.routes.transforms import Output
from api.service import ServiceDep, TeacherName

router = APIRouter(tags=["targets"])

MEDIA_TYPE = "application/x-npy"
ROWS = re.compile(r"(?:0|[1-9]\d{0,17})(?:,(?:0|[1-9]\d{0,17}))*", re.ASCII)


@router.get(
    "/teachers/{name}/targets",
    response_model=None,
    response_class=Response,
    responses={
        200: {
            "description": "float32 [rows, tokens, channels], with the transform's digest in Statsvc-Transform",
            "content": {MEDIA_TYPE: BINARY},
        },
        **problems(404, 409, 413, 422),
    },
)
def read_targets(
    service: ServiceDep,
    name: TeacherName,
    rows: Annotated[
        str,
        Query(
            max_length=8192,
            description="row numbers with commas between them",
            examples=["0,5,9"],
            json_schema_extra={"pattern": f"^{ROWS.pattern}$".replace(r"\d", "[0-9]")},
        ),
    ],
    output: Output = "patches",
    set_: SetQuery = None,
    space: Annotated[
        Literal["normalized", "teacher"], Query(description="teacher: the transform is undone", examples=["teacher"])
    ] = "normalized",
) -> Response:
    """Targets of some rows; a row without one is 404, never zeros."""
    teacher = service.live.teacher(name)
    shape = teacher.output(output)
    if not ROWS.fullmatch(rows):
        raise BadRequest(f"rows are numbers with commas between them, such as 0,5,9; got {rows[:50]!r}")
    numbers = [int(row) for row in rows.split(",")]
    nbytes = len(numbers) * shape.tokens * shape.dim * 4
    if len(numbers) > service.settings.max_rows or nbytes > service.settings.max_answer_bytes:
        fits = min(service.settings.max_rows, service.settings.max_answer_bytes // (shape.tokens * shape.dim * 4))
        raise TooMuch(f"{len(numbers)} rows; one answer holds {fits}: ask for fewer at a time, or read /zarr")
    chosen = choose_set(service, teacher, set_)
    # Opened anew for every request, which costs little: what was repaired or removed since is read as it is.
    targets = teacher.targets(output, chosen)
    y_NTk = targets.read(numbers, space)
    headers = {"Statsvc-Set": chosen, "Cache-Control": "no-cache"}
    if not targets.is_raw or space == "normalized":
        headers["Statsvc-Transform"] = targets.transform_digest or targets.transform.digest
    return Response(npy(y_NTk.astype("<f4", copy=False)), headers=headers, media_type=MEDIA_TYPE)


def npy(array: np.ndarray) -> bytes:
    """numpy's file of one array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
