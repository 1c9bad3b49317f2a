"""Verbs on tenants. For whoever runs the service: no request makes one."""

import uuid

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.tables import Tenant
from app.errors import Invalid

MAX_NAME = 100
DEFAULT_NAME = "default"


def named(session: Session, name: str) -> Tenant:
    """The tenant of that name, made where there is none."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or name != name.strip():
        raise Invalid(
            f"A tenant's name must have 1 to {MAX_NAME} printable characters.",
            code="invalid-tenant",
            fields={"tenant": f"1 to {MAX_NAME} printable characters"},
        )
    session.execute(insert(Tenant).values(id=uuid.uuid4(), name=name).on_conflict_do_nothing())
    return session.scalars(select(Tenant).where(Tenant.name == name)).one()
