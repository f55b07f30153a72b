"""What the routes say in OpenAPI beside their own models."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from api.models import Problem

Responses = dict[int | str, dict[str, Any]]

DETAILS = {
    400: "this is no HTTP/1.1, or an address of more than 65535 bytes",
    401: "this service asks for a bearer token: send Authorization: Bearer <token>",
    404: "no teacher 'sam' in this store; there are dino, siglip",
    406: "Accept: text/html matches none of application/json; or use ?format=",
    409: "teachers/dino/...: 0 bytes where the commit says 2621640004; `statsvc verify --repair` removes it",
    412: "the object is another one than If-Match says",
    413: "1000 rows; one answer holds 256: ask for fewer at a time",
    414: "a path of at most 4096 bytes and a query of 16384 are taken",
    416: "the range begins after the end",
    422: "query.rows: rows are numbers with commas between them; /docs says what is taken",
    431: "headers of 70000 bytes; 32768 are taken",
    503: "too many requests are being answered; try again",
}


HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}, "example": "Bearer"}},
    503: {"Retry-After": {"schema": {"type": "string"}, "description": "seconds", "example": "2"}},
}


def problems(*statuses: int) -> Responses:
    """Responses with a problem document, besides those that every route has."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {
                "application/problem+json": {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "example": {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status,
                                "detail": DETAILS[status]},
                }
            },
            **({"headers": HEADERS[status]} if status in HEADERS else {}),
        }
        for status in statuses
    }  # fmt: skip


EVERYWHERE = problems(400, 401, 409, 414, 422, 431, 503)
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
ANY_OBJECT: dict[str, Any] = {"application/octet-stream": BINARY, "application/json": {}}
OBJECT: Responses = {
    200: {"description": "The whole object", "content": ANY_OBJECT,
          "headers": {"ETag": {"schema": {"type": "string"}, "description": "content_crc32c of the commit"},
                      "Accept-Ranges": {"schema": {"type": "string"}}}},
    206: {"description": "The bytes that were asked for", "content": ANY_OBJECT,
          "headers": {"Content-Range": {"schema": {"type": "string"}}}},
    304: {"description": "The client has it already (If-None-Match)"},
    412: {"description": "Another object than If-Match says"},
    416: {"description": "Nothing in that range", "headers": {"Content-Range": {"schema": {"type": "string"}}}},
    **problems(404, 409),
}  # fmt: skip
RANGE_HEADERS: dict[str, Any] = {
    "parameters": [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": text,
         "example": example}
        for name, example, text in (
            ("Range", "bytes=0-99", "one range of bytes: bytes=0-99, bytes=100-, bytes=-50"),
            ("If-Range", '"1c291ca3"', "an ETag: the whole object comes if it changed"),
            ("If-None-Match", '"1c291ca3"', "ETags: 304 for one of them"),
            ("If-Match", '"1c291ca3"', "ETags: 412 for none of them"),
        )
    ]
}  # fmt: skip


def with_problem_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the model that all problem documents refer to."""
    schema.setdefault("components", {}).setdefault("schemas", {})["Problem"] = Problem.model_json_schema()
    return schema
