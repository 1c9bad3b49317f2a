"""Answers that are streamed out of the database at constant memory."""

from collections.abc import Callable, Iterator

from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session

from app.db.session import tenant_of, tenant_session
from app.headers import attachment


def csv_answer(
    session: Session,
    blocks: Callable[[Session], Iterator[bytes]],
    filename: str,
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    return streamed(session, blocks, "text/csv; charset=utf-8", filename, headers)


def streamed(
    session: Session,
    blocks: Callable[[Session], Iterator[bytes]],
    media_type: str,
    filename: str,
    headers: dict[str, str] | None = None,
) -> StreamingResponse:
    tenant_id = tenant_of(session)

    def body() -> Iterator[bytes]:
        # A session of its own: the route's is closed before the last byte is sent.
        with tenant_session(tenant_id) as own:
            yield from blocks(own)

    disposition = {"Content-Disposition": attachment(filename)}
    return StreamingResponse(body(), media_type=media_type, headers={**disposition, **(headers or {})})
