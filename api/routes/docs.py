"""A page for people: every route with its parameters and answers, by our own copy of swagger-ui."""

from __future__ import annotations

import re
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from api.routes.negotiate import is_known, not_modified
from statsvc.digests import sha256
from statsvc.errors import NotFound

router = APIRouter(include_in_schema=False)

STATIC = files("api") / "static"
# Every file that /docs/static/ serves. An exact name: no other path leads to a file.
MEDIA_TYPES = {
    "docs.js": "text/javascript",
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
FILES = {
    name: (STATIC / name if name == "docs.js" else STATIC / "swagger-ui" / name).read_bytes() for name in MEDIA_TYPES
}
DIGESTS = {name: sha256(content) for name, content in FILES.items()}
# The digest in the query lets browsers keep a file for good and still take the next version's.
PAGE = re.sub(
    r'(?<="docs/static/)[^"]+',
    lambda name: f"{name[0]}?{DIGESTS[name[0]][:16]}",
    (STATIC / "docs.html").read_text("utf-8"),
)
# swagger-ui sets styles and shows images in data: URLs. The page may reach nothing but this service.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"


@router.get("/docs")
async def read_docs() -> HTMLResponse:
    """The page."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})


@router.get("/docs/static/{name}")
async def read_static(request: Request, name: str) -> Response:
    """A script, a style or an image of the page."""
    if name not in FILES:
        raise NotFound("no such file; /docs names all of them")
    etag, caching = f'"{DIGESTS[name]}"', {"Cache-Control": "max-age=31536000, immutable"}
    if is_known(request, etag):
        return not_modified(etag, caching)
    return Response(FILES[name], headers={"ETag": etag, **caching}, media_type=MEDIA_TYPES[name])
