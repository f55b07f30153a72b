"""Errors as HTTP: one table of statuses, one form of answer (RFC 9457, application/problem+json)."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from statsvc.errors import (
    AbsentRow,
    DamagedObject,
    MomentsError,
    NoHadamardMatrix,
    NotAStore,
    NotFound,
    PlanError,
    StatsvcError,
    StoreError,
    TransformError,
    WrongRows,
)


class NotFitted(NotFound):
    """The fit is still to come."""

    def __init__(self, message: str, progress: dict[str, Any]) -> None:
        super().__init__(message)
        self.progress = progress


class TooMuch(StatsvcError):
    """More than one answer may hold."""


class NotAcceptable(StatsvcError):
    """No representation of that kind."""


class BadRequest(StatsvcError):
    """A parameter that cannot be."""


class Busy(StatsvcError):
    """As many requests as the service takes are being answered."""


class StorageFailed(StoreError):
    """The storage behind the service gives no answer, or that of a server in trouble."""


class StorageRefused(StoreError):
    """The storage behind the service does not let it read."""


# The most specific class counts. Everything else that is raised is a defect: 500.
STATUS: dict[type[Exception], int] = {
    BadRequest: 422,
    NotAcceptable: 406,
    NotFound: 404,
    AbsentRow: 404,
    FileNotFoundError: 404,
    WrongRows: 422,
    PlanError: 422,
    NoHadamardMatrix: 422,
    TransformError: 422,
    MomentsError: 422,
    TooMuch: 413,
    DamagedObject: 409,
    Busy: 503,
    NotAStore: 503,
    StorageRefused: 502,
    StoreError: 503,
    OSError: 503,
}
RETRY_SECONDS = {502: 30, 503: 2}
NOT_YET_SECONDS = 10


def problem(status: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    """An answer that says in a sentence what to do."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    headers = {"Cache-Control": "no-store", **(headers or {})}
    if status in RETRY_SECONDS:
        headers.setdefault("Retry-After", str(RETRY_SECONDS[status]))
    return JSONResponse(content, status, headers, media_type="application/problem+json")


def status_of(error: Exception) -> int:
    """The status of an error by its most specific class; 500 for one that is not in the table."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def answer(error: Exception) -> JSONResponse:
    """The answer to a request that ended with an error of ours."""
    if isinstance(error, OSError):
        # Its text names folders of this host.
        found = isinstance(error, FileNotFoundError)
        detail = "no such object" if found else "the store cannot be read at the moment; try again"
        return problem(status_of(error), detail)
    if isinstance(error, NotFitted):
        headers = {"Retry-After": str(NOT_YET_SECONDS)}
        return problem(404, str(error), headers, progress=error.progress)
    return problem(status_of(error), str(error))


def unexpected(error: Exception, request_id: str) -> JSONResponse:
    """The answer where a defect of ours showed."""
    return problem(500, f"unexpected {type(error).__name__}; the log has it under request id {request_id}")


def install(app: FastAPI) -> None:
    """Let every error become a problem document."""

    def on_ours(_: Request, error: Exception) -> JSONResponse:
        return answer(error)

    def on_invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = [{"where": ".".join(map(str, e["loc"])), "problem": e["msg"]} for e in error.errors()]
        text = "; ".join(f"{e['where']}: {e['problem']}" for e in found)
        return problem(422, f"{text}; /docs says what is taken", errors=found)

    def on_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        details = {
            404: "no such route; /docs lists those there are",
            405: "this service is read only: GET and HEAD",
        }
        return problem(error.status_code, details.get(error.status_code, error.detail), dict(error.headers or {}))

    def on_defect(request: Request, error: Exception) -> JSONResponse:
        return unexpected(error, request.scope.get("request_id", "none"))

    app.add_exception_handler(Exception, on_defect)
    app.add_exception_handler(StatsvcError, on_ours)
    app.add_exception_handler(OSError, on_ours)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
