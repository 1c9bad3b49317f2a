"""Refuses writes that another site's page makes a browser send.

A page anywhere may post a multipart form to `http://127.0.0.1:8000/v1/cluster`, and a browser delivers it. The
browser says where a request comes from, in headers that scripts cannot set; clients other than browsers send
neither header and pass. The order of the checks is that of Go's `http.CrossOriginProtection`
(https://pkg.go.dev/net/http#CrossOriginProtection).
"""

import json

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.headers import HEADERS

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class CrossSiteGuard:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _SAFE_METHODS or comes_from_here(Headers(scope=scope)):
            await self._app(scope, receive, send)
        else:
            await _refusal()(scope, receive, send)


def comes_from_here(headers: Headers) -> bool:
    """Whether a request was sent by one of our own pages, or by no web page at all."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        # Another port of this machine is `same-site`, and yet another's page.
        return site in ("same-origin", "none")
    # Browsers leave `Sec-Fetch-Site` out over plain HTTP unless the address is this machine's own.
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower() != ""


def _refusal() -> Response:
    problem = {
        "type": "/problems/cross-site-request",
        "title": "Forbidden",
        "status": 403,
        "detail": "This request was sent by a page of another site; only Kindred's own pages may change anything.",
    }
    return Response(json.dumps(problem), status_code=403, media_type="application/problem+json", headers=HEADERS)
