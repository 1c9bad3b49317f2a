"""What goes wrong, as a page for a browser; everyone else keeps the problem details of the API."""

import inspect
import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from app.web import render, sign_in

_OTHER_ROOMS = ("/v1/", "/healthz", "/readyz", "/openapi.json", "/static/")
_HEADLINES = {
    401: "Sign in first",
    403: "Not with this key",
    429: "Too fast",
    404: "There is nothing here",
    409: "Not yet",
    422: "That address makes no sense",
    503: "Back in a moment",
}


def install(app: FastAPI) -> None:
    """Wrap the handlers that are there: status and words stay theirs."""
    for key, handler in list(app.exception_handlers.items()):
        app.add_exception_handler(key, _page_or(handler))


def _page_or(handler: Callable[[Any, Any], Any]) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, error: Exception) -> Response:
        response = handler(request, error)
        if inspect.isawaitable(response):
            response = await response
        if not _is_for_a_page(request):
            return response  # type: ignore[no-any-return] # handlers are untyped in Starlette
        problem = json.loads(response.body)
        kept = {name: value for name, value in response.headers.items() if name in ("retry-after", "allow")}
        status = response.status_code
        if status == 401 and request.method == "GET":
            return sign_in.ask(request)
        headline = _HEADLINES.get(status, "Something went wrong")
        return render.page(
            "problem.html",
            status=status,
            headers=kept,
            headline=headline,
            detail=problem["detail"],
            caller=getattr(request.state, "caller", None),
        )

    return answer


def _is_for_a_page(request: Request) -> bool:
    return (
        request.scope["type"] == "http"
        and not request.url.path.startswith(_OTHER_ROOMS)
        and "text/html" in request.headers.get("accept", "")
    )
