"""Refuses large bodies of calls that take JSON: those are read into memory as a whole, uploads are not.

FastAPI's own `max_body_size` does the same, but answers plain text where a request declares its length.
"""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import problem
from app.config import settings


class BodyLimit:
    """Passes bodies of up to `max_body_bytes`; a larger one is 413, unread where it says its size."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _streams(scope["path"]):
            await self._app(scope, receive, send)
            return
        limit = settings().max_body_bytes
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
            await problem(413, "body-too-large", _words(limit))(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise HTTPException(413, _words(limit))
            return message

        await self._app(scope, counted, send)


def _streams(path: str) -> bool:
    """Whether a call writes its body to disk as it comes, under limits of its own (`app.api.receive`)."""
    return path == "/v1/cluster" or path.endswith("/uploads")


def _words(limit: int) -> str:
    return f"The body of this request may have at most {limit} bytes."
