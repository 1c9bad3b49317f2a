"""What routes ask for."""

from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, Header, Query, Request, Security
from fastapi.security import HTTPBearer
from sqlalchemy.orm import Session

from app import access
from app.db.session import tenant_session
from app.services import idempotency

# For the description of the API only: `app.access` reads the header itself, before anything else is read.
_BEARER = HTTPBearer(scheme_name="key", bearerFormat="kindred_…", auto_error=False)


def _caller(request: Request, _: Annotated[object, Security(_BEARER)]) -> access.Caller:
    return access.caller_of(request)


CallerOf = Annotated[access.Caller, Depends(_caller)]


def _session(caller: CallerOf) -> Iterator[Session]:
    # Routes commit; leaving the block only closes, and rolls back what was not committed.
    with tenant_session(caller.tenant_id) as session:
        yield session


# The rows of the caller's tenant. Closed before the answer is sent: one that lasts, as a stream of events does, must
# keep no connection.
DatabaseSession = Annotated[Session, Depends(_session, scope="function")]
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
