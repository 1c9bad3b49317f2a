"""Headers that every answer carries unless it says otherwise: what a browser may do with it."""

import re
import unicodedata
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# No page: whatever a browser makes of it, nothing in it runs, loads or is framed.
DATA_POLICY = "sandbox; default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# A page: its own files, and nothing inline.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

HEADERS = {
    "Content-Security-Policy": DATA_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # What one caller may see is for no cache that another asks.
    "Cache-Control": "no-store",
}

_MAX_NAME = 150
_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
}


class SecurityHeaders:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def attachment(filename: str) -> str:
    """`Content-Disposition` that saves a file under a name, whatever the name (RFC 6266, RFC 8187)."""
    plain = unicodedata.normalize("NFKD", filename).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9 ._()+=,-]", "_", plain).strip() or "file"
    # Older clients take the first; a percent sign would be one of an escape to some.
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


def image_name(path: str, image_format: str) -> str:
    """The name to save an image as: the last part of its path, harmless, and with the extension of what it is.

    A picture may be a web page or a program to whoever opens it by another extension.
    """
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    # Controls, and marks that turn the direction of text: `gpj.exe` can be made to look like `exe.jpg`.
    name = "".join(char for char in name if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))
    name = re.sub(r'[<>:"|?*]', "_", name).strip(" .") or "image"
    extensions = _EXTENSIONS.get(image_format.upper(), (f".{image_format.lower()}",))
    if not name.lower().endswith(extensions):
        name = f"{name[: _MAX_NAME - 6]}{extensions[0]}"
    if len(name) > _MAX_NAME:
        stem, _, extension = name.rpartition(".")
        name = f"{stem[: _MAX_NAME - len(extension) - 1]}.{extension}"
    return name
