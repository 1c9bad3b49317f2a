"""One engine a process; whoever opens a session commits it."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from sqlalchemy import Connection, Engine, NullPool, create_engine, event, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from app.config import settings

# Owns no table, and row-level security applies to it; migration 0002 makes it.
API_ROLE = "kindred_api"
_TENANT = "kindred_tenant"
# Keepalives are the server's own, which otherwise asks after hours whether a machine is still there.
_HOLD = (
    "SET idle_in_transaction_session_timeout = '5min'; "
    "SET tcp_keepalives_idle = 60; SET tcp_keepalives_interval = 15; SET tcp_keepalives_count = 4"
)
_BEGIN = text("SELECT set_config('role', :role, true), set_config('kindred.tenant', :tenant, true)")


@lru_cache(maxsize=1)
def engine() -> Engine:
    url = settings().database_url
    if url is None:
        raise RuntimeError("KINDRED_DATABASE_URL is not set; `kindred up` starts a PostgreSQL and sets it.")
    own = create_engine(
        url,
        pool_pre_ping=True,  # a restarted PostgreSQL costs one ping, not one failed request
        pool_size=10,
        max_overflow=10,
        pool_timeout=10,
        hide_parameters=True,  # an error that is logged names no file
        connect_args={"connect_timeout": 5},
    )
    event.listen(own, "connect", _limit_what_we_hold)
    return own


def _limit_what_we_hold(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
    """A process that was frozen, or whose machine is gone, keeps its locks no longer than this."""
    cursor = connection.cursor()
    cursor.execute(_HOLD)
    cursor.close()
    connection.commit()


@lru_cache(maxsize=1)
def _factory() -> sessionmaker[Session]:
    return sessionmaker(engine(), expire_on_commit=False)


def open_session() -> Session:
    """A session to be used as a context manager; leaving it without a commit rolls back.

    It sees everything, so it is for workers and for whoever runs the service. A request gets `tenant_session`.
    """
    return _factory()()


@contextmanager
def session_of(database_url: str) -> Iterator[Session]:
    """A session like that of `open_session`, on a connection of its own; for the command line."""
    own = create_engine(database_url, poolclass=NullPool, connect_args={"connect_timeout": 5})
    try:
        with Session(own, expire_on_commit=False) as session:
            yield session
    finally:
        own.dispose()


def tenant_session(tenant_id: uuid.UUID | None) -> Session:
    """The same under the role of the API: it sees one tenant's rows, or with None nobody's."""
    session = _factory()(info={_TENANT: tenant_id})
    event.listen(session, "after_begin", _become_tenant)
    return session


def tenant_of(session: Session) -> uuid.UUID:
    """Whose rows a session sees. Raises for one that sees everything, or nothing."""
    found = session.info[_TENANT]
    if not isinstance(found, uuid.UUID):
        raise TypeError("this session belongs to no tenant")
    return found


def _become_tenant(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    # For the transaction only: a connection goes back to the pool as it came.
    connection.execute(_BEGIN, {"role": API_ROLE, "tenant": str(session.info[_TENANT] or "")})
