"""RFC 9457 problem details: the one place where domain errors meet HTTP status codes."""

from collections.abc import Iterator, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route

from app.errors import (
    Conflict,
    Forbidden,
    Invalid,
    KindredError,
    NotFound,
    StorageFull,
    TooLarge,
    TooMany,
    Unauthenticated,
)
from app.headers import HEADERS

log = structlog.get_logger(__name__)

STATUS_BY_ERROR: dict[type[KindredError], int] = {
    Unauthenticated: 401,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    Invalid: 422,
    TooMany: 429,
    StorageFull: 507,
}
TITLES = {
    400: "Bad request",
    401: "Key needed",
    403: "Forbidden",
    404: "Not found",
    405: "Method not allowed",
    409: "Conflict",
    413: "Too large",
    415: "Unsupported media type",
    422: "Invalid input",
    429: "Too many",
    500: "Internal error",
    503: "Not available",
    507: "Storage full",
}
MEDIA_TYPE = "application/problem+json"

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "examples": ["/problems/too-few-images"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}


def responses(*statuses: int, guarded: bool = True) -> dict[int | str, dict[str, Any]]:
    """The problem answers of a route, for OpenAPI; every route may answer 503, and every guarded one ask for a key."""
    return {
        status: {"description": TITLES[status], "content": {MEDIA_TYPE: {"schema": SCHEMA}}}
        for status in sorted({*statuses, 503, *((401, 403, 429) if guarded else ())})
    }


def problem(
    status: int,
    code: str,
    detail: str,
    *,
    errors: list[dict[str, str]] | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    body: dict[str, Any] = {
        "type": f"/problems/{code}",
        "title": TITLES.get(status, "Error"),
        "status": status,
        "detail": detail,
    }
    if errors:
        body["errors"] = errors
    return JSONResponse(body, status_code=status, headers={**HEADERS, **(headers or {})}, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    app.add_exception_handler(KindredError, _domain)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(OperationalError, _database_away)
    app.add_exception_handler(PoolTimeout, _database_away)
    app.add_exception_handler(DBAPIError, _database)
    app.add_exception_handler(Exception, _unexpected)


def _domain(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, KindredError)  # noqa: S101 - registered for it
    return from_error(error)


def from_error(error: KindredError) -> JSONResponse:
    errors = [{"field": field, "message": message} for field, message in error.fields.items()]
    headers = {}
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = 'Bearer realm="kindred"'
    if isinstance(error, TooMany):
        headers["Retry-After"] = str(error.retry_after_s)
    return problem(STATUS_BY_ERROR[type(error)], error.code, error.detail, errors=errors, headers=headers)


def _validation(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it
    return invalid_input([dict(item) for item in error.errors()])


def invalid_input(found: list[dict[str, Any]]) -> JSONResponse:
    """Pydantic's findings as a problem: each field, what is wrong and the limit."""
    errors = []
    for item in found:
        if item["type"] == "json_invalid":
            said = f"is not JSON: {item['ctx']['error']}, at character {item['loc'][-1]}"
            errors.append({"field": "body", "message": said})
            continue
        where = [str(part) for part in item["loc"] if part not in ("body", "query", "path", "header")]
        errors.append({"field": ".".join(where) or "body", "message": str(item["msg"])})
    detail = "; ".join(f"{item['field']}: {item['message']}" for item in errors)
    return problem(422, "invalid-input", detail, errors=errors)


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    status = error.status_code
    code = {404: "no-such-page", 405: "method-not-allowed", 413: "body-too-large"}.get(status, "bad-request")
    detail = str(error.detail)
    if status == 404:
        detail = f"There is nothing at {request.url.path}."
    if status == 400:  # FastAPI's own, when a body's bytes, digits or depth are beyond its parser
        code, detail = "unreadable-body", "The request's body is not JSON that can be read."
    headers = dict(error.headers or {})
    if status == 405:
        headers["Allow"] = ", ".join(_methods(request))
        detail = f"{request.url.path} answers to {headers['Allow']} alone, not to {request.method}."
    return problem(status, code, detail, headers=headers)


def _methods(request: Request) -> list[str]:
    """What a path answers to; Starlette names only the methods of the first route that has it (RFC 9110, 10.2.1)."""
    found: set[str] = set()
    for route in _flat(request.app.routes):
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return sorted(found | ({"HEAD"} if "GET" in found else set()))


def _flat(routes: Sequence[BaseRoute]) -> Iterator[Route]:
    """FastAPI keeps the routes of an included router behind an object of its own."""
    for route in routes:
        if isinstance(route, Route):
            yield route
        elif (router := getattr(route, "original_router", None)) is not None:
            yield from _flat(router.routes)


def _database_away(_request: Request, error: Exception) -> JSONResponse:
    log.warning("database_away", error=type(error).__name__)
    return problem(503, "database-away", "The database cannot be reached at this moment.", headers={"Retry-After": "5"})


def _database(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return _database_away(request, error)
    return _unexpected(request, error)


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("unexpected_error", path=request.url.path, exc_info=error)
    return problem(500, "internal-error", "Something went wrong here; the log of the service says what.")
