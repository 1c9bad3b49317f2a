"""Runs migrations under one advisory lock, with time limits on locks and statements."""

from alembic import context
from sqlalchemy import create_engine, pool, text

from app.config import settings
from app.db.tables import Table

_LOCK = 0x6B696E64  # "kind": two starting services must not migrate at the same time


def _url() -> str:
    url = context.config.get_main_option("sqlalchemy.url") or settings().database_url
    if url is None:
        raise SystemExit("error: set KINDRED_DATABASE_URL")
    return url


def run_migrations() -> None:
    engine = create_engine(_url(), poolclass=pool.NullPool)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": _LOCK})
        # A migration that waits for a lock holds up everyone who queues behind it.
        connection.execute(text("SET lock_timeout = '10s'"))
        connection.execute(text("SET statement_timeout = '10min'"))
        connection.commit()
        context.configure(connection=connection, target_metadata=Table.metadata, compare_server_default=True)
        with context.begin_transaction():
            context.run_migrations()
        connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": _LOCK})
    engine.dispose()


run_migrations()
