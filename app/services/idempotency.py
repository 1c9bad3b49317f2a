"""`Idempotency-Key`: a POST sent again answers what it answered first, and creates nothing.

Draft: IETF httpapi, The Idempotency-Key HTTP Header Field.
"""

from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.session import tenant_of
from app.db.tables import IdempotencyKey
from app.errors import Conflict, Invalid

KEEP = timedelta(hours=24)
MAX_LENGTH = 200


def recall(session: Session, key: str | None, request_digest: str) -> IdempotencyKey | None:
    """The answer that `key` was given before; `Conflict` when it came with another request."""
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_LENGTH or not key.isprintable():
        raise Invalid(
            f"Idempotency-Key must have 1 to {MAX_LENGTH} printable characters.",
            code="invalid-idempotency-key",
            fields={"Idempotency-Key": f"1 to {MAX_LENGTH} printable characters"},
        )
    found = session.scalar(
        select(IdempotencyKey).where(
            IdempotencyKey.tenant_id == tenant_of(session),
            IdempotencyKey.key == key,
            IdempotencyKey.created_at >= func.now() - KEEP,
        )
    )
    if found is not None and found.request_digest != request_digest:
        raise _reused(key)
    return found


def remember(
    session: Session,
    key: str | None,
    request_digest: str,
    *,
    status: int,
    location: str,
    body: dict[str, Any],
) -> None:
    """Keep the answer in the transaction that creates what it speaks of."""
    if key is None:
        return
    # Here and not in `recall`, whose transaction need not be committed.
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created_at < func.now() - KEEP))
    inserted = session.execute(
        insert(IdempotencyKey)
        .values(key=key, request_digest=request_digest, status=status, location=location, body=body)
        .on_conflict_do_nothing()
        .returning(IdempotencyKey.key)
    ).scalar_one_or_none()
    if inserted is None:
        raise Conflict(
            "A request with this Idempotency-Key is being answered at this moment; send it again.",
            code="idempotency-key-in-use",
        )


def _reused(key: str) -> Conflict:
    return Conflict(
        f"Idempotency-Key {key!r} came with another request before; use a new key for a new request.",
        code="idempotency-key-reused",
    )
