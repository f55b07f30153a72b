"""A page for people: what this is, how far it is, where everything is found."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

router = APIRouter(tags=["progress"])

PAGE = files("api").joinpath("status.html").read_text("utf-8")
# The page brings its own script and style, and may reach nothing but this service.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@router.get("/", response_class=HTMLResponse)
async def read_page() -> HTMLResponse:
    """The status page."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})
