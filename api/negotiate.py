"""Which representation a client wants, and whether it has it already."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from fastapi import Request
from fastapi.responses import Response

from api.errors import NotAcceptable
from api.ranges import matches

Format = Literal["json", "safetensors", "npz"]
DType = Literal["float32", "float64"]

MEDIA_TYPES: dict[str, str] = {
    "json": "application/json",
    "safetensors": "application/vnd.safetensors",
    "npz": "application/x-npz",
}
VARY = {"Vary": "Accept"}


def choose(request: Request, asked: str | None, available: tuple[str, ...]) -> str:
    """`?format=` decides, else the Accept header's best, else the first. Raises NotAcceptable."""
    if asked is not None:
        if asked not in available:
            raise NotAcceptable(f"no format {asked!r} here; there are {', '.join(available)}")
        return asked
    accept = request.headers.get("accept", "*/*")
    best, best_quality = None, 0.0
    for name in available:
        quality = max((_quality(item, MEDIA_TYPES[name]) for item in accept.split(",")), default=0.0)
        if quality > best_quality:
            best, best_quality = name, quality
    if best is None:
        offered = ", ".join(MEDIA_TYPES[name] for name in available)
        raise NotAcceptable(f"Accept: {accept[:200]} matches none of {offered}; or use ?format=")
    return best


def _quality(item: str, media_type: str) -> float:
    """q of one item of an Accept header for a media type; 0 where it does not match."""
    wanted, *parameters = (part.strip().lower() for part in item.split(";"))
    family = media_type.partition("/")[0]
    if wanted not in (media_type, f"{family}/*", "*/*", ""):
        return 0.0
    quality = 1.0
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                quality = float(parameter[2:])
            except ValueError:
                quality = 0.0
    # A type that is named counts before a family, and that before anything.
    return quality - (0.0 if wanted == media_type else 1e-4 if wanted == f"{family}/*" else 2e-4)


def is_known(request: Request, etag: str) -> bool:
    """Whether the client holds the representation of that ETag."""
    header = request.headers.get("if-none-match")
    return header is not None and matches(header.encode("latin-1"), etag, weak=True)


def not_modified(etag: str, headers: dict[str, str]) -> Response:
    """304."""
    return Response(status_code=304, headers={"ETag": etag, **headers})


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    """numpy's archive, the same bytes for the same arrays; loads without pickle."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
