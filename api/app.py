"""The app: settings in, routes and limits out. An app is a value; several may live in one process."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from api import errors
from api.middleware.guard import Guard
from api.middleware.head import HeadAsGet
from api.middleware.observe import Observe
from api.openapi import EVERYWHERE, with_problem_schema
from api.routes import ROUTERS
from api.service import Service
from api.serving.send import Shortcut
from api.settings import Settings
from api.state.live_store import LiveStore
from statsvc.storage import open_backend

DESCRIPTION = """Fitted normalizations (PHI-S and others) and cached, normalized teacher features for student training.

Read only. Errors are problem documents whose `detail` says what to do. `/zarr` opens with any Zarr v3 client."""


class _LayeredApp(FastAPI):
    """Our layers come before FastAPI's own, which take as long as a short range does."""

    layers: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self.layers(scope, receive, send)
        else:
            await self.answer(scope, receive, send)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The routes."""
        await super().__call__(scope, receive, send)


def create_app(settings: Settings, stopping: Callable[[], bool] = lambda: False) -> FastAPI:
    """The service of one store, which may appear later. `stopping` ends endless answers when the server is to end.

    Raises PlanError for a store location that can never be one.
    """
    service = Service(settings, LiveStore(open_backend(settings.store)), stopping)
    app = _LayeredApp(
        title="statsvc",
        description=DESCRIPTION,
        version=version("statsvc"),
        responses=EVERYWHERE,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's pages load scripts from the internet; ours in api/routes/docs.py does not
        redoc_url=None,
    )
    app.state.service = service
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    layers: ASGIApp = Guard(Shortcut(HeadAsGet(app.answer), service.objects, service.sender), settings, service.metrics)
    if settings.cors_origins:  # outside the guard, as a browser asks for leave without a token
        layers = CORSMiddleware(
            layers,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "HEAD"],
            allow_headers=["Authorization", "Range", "If-Range", "If-Match", "If-None-Match", "X-Request-ID"],
            expose_headers=[
                "ETag",
                "Content-Range",
                "Accept-Ranges",
                "Retry-After",
                "Statsvc-Transform",
                "Statsvc-Set",
                "X-Request-ID",
            ],
        )
    app.layers = Observe(layers, service.metrics)
    _document(app, needs_token=settings.token is not None)
    return app


def _document(app: FastAPI, needs_token: bool) -> None:
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = with_problem_schema(generate())
            if needs_token:
                schema["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"bearer": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
