"""What routes ask for."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Header, Query
from sqlalchemy.orm import Session

from app.db.session import open_session
from app.services import idempotency


def _session() -> Iterator[Session]:
    # Routes commit; leaving the block only closes, and rolls back what was not committed.
    with open_session() as session:
        yield session


DatabaseSession = Annotated[Session, Depends(_session)]
Cursor = Annotated[str | None, Query(description="`next` of the page before.", max_length=500, examples=["WzQyXQ"])]
Limit = Annotated[int, Query(ge=1, le=1000, description="Most items on a page.")]
IdempotencyKeyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Sending the same request again with the same key within a day creates nothing new.",
        min_length=1,
        max_length=idempotency.MAX_LENGTH,
    ),
]
