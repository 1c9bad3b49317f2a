"""HEAD: what GET would answer, without the body (RFC 9110, 9.3.2). FastAPI's routes refuse it."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAsGet:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        begun = False

        async def as_from_nobody() -> Message:
            # Once the headers are out nobody listens, so that what streams without an end stops.
            return {"type": "http.disconnect"} if begun else await receive()

        async def headers_only(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                await send(message)
                await send({"type": "http.response.body", "body": b""})

        asked = {**scope, "method": "GET"}
        try:
            await self._app(asked, as_from_nobody, headers_only)
        finally:
            scope.update((key, asked[key]) for key in ("route", "endpoint") if key in asked)
