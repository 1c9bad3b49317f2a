"""One engine a process; whoever opens a session commits it."""

from functools import lru_cache

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, sessionmaker

from app.config import settings


@lru_cache(maxsize=1)
def engine() -> Engine:
    url = settings().database_url
    if url is None:
        raise RuntimeError("KINDRED_DATABASE_URL is not set; `kindred up` starts a PostgreSQL and sets it.")
    return create_engine(
        url,
        pool_pre_ping=True,  # a restarted PostgreSQL costs one ping, not one failed request
        pool_size=10,
        max_overflow=10,
        pool_timeout=10,
        connect_args={"connect_timeout": 5},
    )


@lru_cache(maxsize=1)
def _factory() -> sessionmaker[Session]:
    return sessionmaker(engine(), expire_on_commit=False)


def open_session() -> Session:
    """A session to be used as a context manager; leaving it without a commit rolls back."""
    return _factory()()
