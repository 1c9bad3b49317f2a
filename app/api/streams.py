"""Answers that are streamed out of the database at constant memory."""

from collections.abc import Callable, Iterator

from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session

from app.db.session import open_session


def csv_answer(
    rows: Callable[[Session], Iterator[str] | Iterator[bytes]],
    filename: str,
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    return streamed(rows, "text/csv; charset=utf-8", filename, headers)


def streamed(
    rows: Callable[[Session], Iterator[str] | Iterator[bytes]],
    media_type: str,
    filename: str,
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    def body() -> Iterator[str | bytes]:
        # A session of its own: the route's is closed before the last byte is sent.
        with open_session() as session:
            yield from rows(session)

    disposition = {"Content-Disposition": f'attachment; filename="{filename}"'}
    return StreamingResponse(body(), media_type=media_type, headers={**disposition, **(headers or {})})
