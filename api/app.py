"""The app: settings in, routes and limits out. An app is a value; several may live in one process."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from api import errors
from api.guard import Guard
from api.live import LiveStore
from api.observe import Observe
from api.openapi import EVERYWHERE, with_problem_schema
from api.routes import ROUTERS
from api.service import Service
from api.settings import Settings
from api.shortcut import Shortcut
from statsvc.backends import backend

DESCRIPTION = """Fitted normalizations (PHI-S and others) and cached, normalized teacher features for student training.

Read only. Errors are problem documents whose `detail` says what to do. `/zarr` opens with any Zarr v3 client."""


def create_app(settings: Settings, stopping: Callable[[], bool] = lambda: False) -> FastAPI:
    """The service of one store, which may appear later. `stopping` ends endless answers when the server is to end.

    Raises PlanError for a store location that can never be one.
    """
    service = Service(settings, LiveStore(backend(settings.store)), stopping)
    app = FastAPI(
        title="statsvc",
        description=DESCRIPTION,
        version=version("statsvc"),
        responses=EVERYWHERE,
        redirect_slashes=False,
    )
    app.state.service = service
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.add_middleware(Shortcut, service=service)
    app.add_middleware(Guard, service=service)
    if settings.cors_origins:  # outside the guard, as a browser asks for leave without a token
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "HEAD"],
            allow_headers=["Authorization", "Range", "If-Range", "If-Match", "If-None-Match"],
            expose_headers=[
                "ETag",
                "Content-Range",
                "Accept-Ranges",
                "Retry-After",
                "Statsvc-Transform",
                "X-Request-ID",
            ],
        )
    app.add_middleware(Observe, service=service)
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
