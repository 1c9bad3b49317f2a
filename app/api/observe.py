"""An id for each request, a line in the log and a place in the metrics."""

import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.metrics import REQUEST_SECONDS, REQUESTS

log = structlog.get_logger(__name__)

HEADER = "X-Request-ID"
_SANE = re.compile(r"[A-Za-z0-9._-]{1,64}")
# What machines ask every few seconds, and files of our own.
_QUIET = ("/healthz", "/readyz", "/metrics", "/static/")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Observe:
    """The outermost layer, so that it sees every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER.lower(), "")
        request_id = given if _SANE.fullmatch(given) else uuid.uuid4().hex
        started, status, location = time.perf_counter(), 500, None

        async def answer(message: Message) -> None:
            nonlocal status, location
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[HEADER] = request_id
                location = headers.get("location")
            await send(message)

        with structlog.contextvars.bound_contextvars(request=request_id):
            try:
                await self._app(scope, receive, answer)
            finally:
                seconds = time.perf_counter() - started
                method = scope["method"] if scope["method"] in _METHODS else "other"
                route = _template(scope)
                REQUESTS.labels(method, route, str(status)).inc()
                REQUEST_SECONDS.labels(method, route).observe(seconds)
                if not scope["path"].startswith(_QUIET):
                    made = {} if location is None else {"location": location}
                    log.info(
                        "request", method=method, path=scope["path"], status=status, ms=round(seconds * 1000, 1), **made
                    )


def _template(scope: Scope) -> str:
    """The route's path with its parameters unfilled: ids as labels would be a series for each."""
    found = scope.get("route")
    path = getattr(found, "path_format", None) or getattr(found, "path", None)
    return path if isinstance(path, str) and path else "unmatched"
