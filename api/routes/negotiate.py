"""Which representation a client wants, and whether it has it already."""

from __future__ import annotations

from typing import Literal

from fastapi import Request
from fastapi.responses import Response

from api.errors import NotAcceptable
from api.serving.ranges import matches

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
    quality = {name: _quality(accept, MEDIA_TYPES[name]) for name in available}
    best = max(available, key=lambda name: quality[name])  # the first of equals
    if not quality[best]:
        offered = ", ".join(MEDIA_TYPES[name] for name in available)
        raise NotAcceptable(f"Accept: {accept[:200]} matches none of {offered}; or use ?format=")
    return best


def _quality(accept: str, media_type: str) -> float:
    """q of the item of an Accept header that names a media type most closely; 0 where none does."""
    closeness = ("*/*", f"{media_type.partition('/')[0]}/*", media_type)
    closest, quality = -1, 0.0
    for item in accept.split(","):
        wanted, *parameters = (part.strip().lower() for part in item.split(";"))
        if wanted in closeness and closeness.index(wanted) > closest:
            closest, quality = closeness.index(wanted), _q(parameters)
    return quality


def _q(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return min(max(float(parameter[2:]), 0.0), 1.0)
            except ValueError:
                return 0.0
    return 1.0


def is_known(request: Request, etag: str) -> bool:
    """Whether the client holds the representation of that ETag."""
    lines = request.headers.getlist("if-none-match")
    return bool(lines) and matches(", ".join(lines).encode("latin-1"), etag, weak=True)


def not_modified(etag: str, headers: dict[str, str]) -> Response:
    """304."""
    return Response(status_code=304, headers={"ETag": etag, **headers})
