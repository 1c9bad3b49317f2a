"""Tables to save: out of the database at its speed, out of the service at the client's, at constant memory."""

import codecs
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Annotated

from fastapi import Query
from fastapi.responses import StreamingResponse

from app import storage
from app.errors import StorageFull
from app.headers import attachment

CSV = "text/csv; charset=utf-8"
Bom = Annotated[bool, Query(description="Begin with a byte order mark: by it Excel knows that the text is UTF-8.")]
_BLOCK = 256 * 1024


def download(
    blocks: Generator[bytes],
    filename: str,
    media_type: str,
    headers: dict[str, str] | None = None,
    *,
    bom: bool = False,
) -> StreamingResponse:
    """All of it is written down before the first byte is sent.

    So a client that reads slowly keeps no connection of the database, what fails on the way is a problem and not half
    a table, and the length is known. Raises `StorageFull`.
    """
    file = storage.scratch()
    try:
        # Closed at once, or a COPY that goes on would keep the session from closing.
        with closing(blocks):
            file.write(codecs.BOM_UTF8 if bom else b"")
            for block in blocks:
                file.write(block)
        size = file.tell()
        file.seek(0)
    except BaseException as error:
        file.close()
        if isinstance(error, OSError) and storage.is_full(error):
            raise StorageFull(
                "The service has no room left to put this table together.", code="storage-full"
            ) from error
        raise

    def body() -> Iterator[bytes]:
        with file:
            while block := file.read(_BLOCK):
                yield block

    known = {"Content-Disposition": attachment(filename), "Content-Length": str(size)}
    return StreamingResponse(body(), media_type=media_type, headers={**known, **(headers or {})})
