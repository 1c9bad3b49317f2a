"""Keys for tests, made as whoever runs the service makes them."""

from datetime import timedelta

from app.db.session import open_session
from app.services import keys, tenants


def make_key(
    tenant: str = "default", scope: str = "admin", *, name: str = "test", lasts: timedelta | None = None
) -> str:
    with open_session() as session:
        _, key = keys.create(session, name, scope, lasts=lasts, tenant_id=tenants.named(session, tenant).id)
        session.commit()
    return key


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
