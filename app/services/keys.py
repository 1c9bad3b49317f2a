"""Verbs on keys, and on the browsers that signed in with one.

A key is `kindred_PREFIX_SECRET`. The prefix finds the row; the SHA-256 of the whole key proves it. A slow hash
would add nothing: what it slows down is the guessing of passwords, and 256 random bits are not guessed.
"""

import hashlib
import hmac
import re
import secrets
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from sqlalchemy import Row, delete, func, select, text, update
from sqlalchemy.orm import Session

from app.db.tables import ApiKey, Tenant, WebSession
from app.errors import Unauthenticated, not_found
from app.services import pages

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")

_PREFIX_BYTES = 8
_SECRET_BYTES = 32
_FORM = re.compile(r"kindred_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_USED_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Whose key it is, and what it allows."""

    key_id: uuid.UUID
    tenant_id: uuid.UUID
    name: str
    scope: Scope
    stale: bool
    """Whether the time of its last use is to be noted."""


def create(
    session: Session,
    name: str,
    scope: Scope,
    *,
    lasts: timedelta | None = None,
    tenant_id: uuid.UUID | None = None,
) -> tuple[ApiKey, str]:
    """A new key, and its secret form, which is nowhere to be found again."""
    prefix = secrets.token_hex(_PREFIX_BYTES)
    key = f"kindred_{prefix}_{secrets.token_urlsafe(_SECRET_BYTES)}"
    row = ApiKey(id=uuid.uuid4(), name=name, prefix=prefix, sha256=_sha256(key), scope=scope)
    if tenant_id is not None:
        row.tenant_id = tenant_id
    if lasts is not None:
        row.expires_at = cast("datetime", func.now() + lasts)
    session.add(row)
    session.flush()
    session.refresh(row)
    return row, key


def list_page(session: Session, limit: int, cursor: str | None) -> pages.Page[ApiKey]:
    """Newest first; of every tenant that the session sees."""
    query = select(ApiKey).order_by(ApiKey.created_at.desc(), ApiKey.prefix.desc()).limit(limit + 1)
    after = pages.decode(cursor, datetime.fromisoformat, _prefix)
    if after is not None:
        created_at, prefix = after
        query = query.where(
            (ApiKey.created_at < created_at) | ((ApiKey.created_at == created_at) & (ApiKey.prefix < prefix))
        )
    rows = session.scalars(query).all()
    return pages.page(rows, limit, lambda row: (row.created_at.isoformat(), row.prefix))


def _prefix(value: object) -> str:
    """What a cursor says is a prefix."""
    if not isinstance(value, str) or not value.isalnum() or not value.isascii():
        raise ValueError(value)
    return value


def list_all(session: Session) -> list[tuple[str, ApiKey]]:
    """Every key with the name of its tenant, oldest first."""
    rows = session.execute(
        select(Tenant.name, ApiKey).join(Tenant, Tenant.id == ApiKey.tenant_id).order_by(ApiKey.created_at)
    )
    return [(name, key) for name, key in rows]


def get(session: Session, key_id: uuid.UUID) -> ApiKey:
    row = session.get(ApiKey, key_id)
    if row is None:
        raise not_found("key", key_id)
    return row


def revoke(session: Session, key_id: uuid.UUID) -> ApiKey:
    """From the next request on it opens nothing, nor does any browser that signed in with it. Twice is once."""
    session.execute(
        update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None)).values(revoked_at=func.now())
    )
    row = session.get(ApiKey, key_id, populate_existing=True)
    if row is None:
        raise not_found("key", key_id)
    return row


def by_prefix(session: Session, prefix: str) -> ApiKey:
    """The key that begins so, `kindred_` left out or not."""
    row = session.scalar(select(ApiKey).where(ApiKey.prefix == prefix.removeprefix("kindred_")[:16]))
    if row is None:
        raise not_found("key", prefix)
    return row


def exist(session: Session) -> bool:
    """Whether a key was ever made here. Revoked and expired ones count: the end of a key must open no door."""
    return bool(session.scalar(text("SELECT kindred_keys_exist()")))


def recognise(session: Session, key: str) -> Holder:
    """Whose key this is. Raises `Unauthenticated`."""
    form = _FORM.fullmatch(key)
    row = None
    if form is not None:
        row = session.execute(text("SELECT * FROM kindred_find_key(:prefix)"), {"prefix": form[1]}).one_or_none()
    # Of SHA-256 values, so that the time it takes says nothing of the key; and the same for a prefix that is none.
    proven = hmac.compare_digest(_sha256(key), row.sha256 if row else _sha256(""))
    if row is None or not proven:
        raise Unauthenticated("This is not a key of this service.", code="unknown-key")
    if row.state != "usable":
        raise Unauthenticated(f"This key is {row.state}.", code=f"{row.state}-key")
    return _holder(row)


def sign_in(session: Session, holder: Holder, lasts_s: float) -> str:
    """What the cookie of a browser is to hold; the database keeps only its SHA-256."""
    session.execute(delete(WebSession).where(WebSession.expires_at < func.now()))
    token = secrets.token_urlsafe(_SECRET_BYTES)
    session.add(
        WebSession(
            sha256=_sha256(token),
            tenant_id=holder.tenant_id,
            key_id=holder.key_id,
            expires_at=cast("datetime", func.now() + timedelta(seconds=lasts_s)),
        )
    )
    session.flush()
    return token


def signed_in(session: Session, token: str) -> Holder | None:
    """Who signed in, unless that is over, or the key is no longer good."""
    row = session.execute(text("SELECT * FROM kindred_find_session(:sha256)"), {"sha256": _sha256(token)}).one_or_none()
    return _holder(row) if row is not None and row.state == "usable" else None


def sign_out(session: Session, token: str) -> None:
    session.execute(delete(WebSession).where(WebSession.sha256 == _sha256(token)))


def note_use(session: Session, key_id: uuid.UUID) -> None:
    """Once in a while: a write for every request would cost more than it tells."""
    session.execute(update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=func.now()))


def _holder(row: Row[Any]) -> Holder:
    stale = row.unused_s is None or row.unused_s > _USED_EVERY_S
    return Holder(key_id=row.id, tenant_id=row.tenant_id, name=row.name, scope=row.scope, stale=stale)


def _sha256(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()
