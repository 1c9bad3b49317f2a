"""What makes two requests the same, and results cacheable."""

import hashlib

from fastapi import Request, Response


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def stream_digest(request: Request) -> str:
    """For bodies that are not read before they are answered: the same call with a body of the same length.

    Multipart boundaries are random, so that the bytes of a repeated upload differ while their number does not.
    """
    return digest(request.method, request.url.path, request.headers.get("content-length", ""))


_REVALIDATE = "private, max-age=0, must-revalidate"


def not_modified(request: Request, response: Response, tag: str, caching: str = _REVALIDATE) -> Response | None:
    """Set `ETag`; a 304 when the client has this version. Results never change: a name is enough."""
    quoted = f'"{tag}"'
    headers = {"ETag": quoted, "Cache-Control": caching}
    response.headers.update(headers)
    known = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    if quoted in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return None
