"""Real servers for every test: one PostgreSQL and one Valkey a session, tables emptied after each test."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from app import queue
from app.config import settings
from app.db import session as db_session
from app.db.migrate import upgrade
from app.db.tables import DEFAULT_TENANT, Table, Tenant
from app.embedded import ServerUrls, running_servers
from tests.faults.table import print_table

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerUrls]:
    with running_servers(tmp_path_factory.mktemp("servers")) as urls:
        upgrade(urls.database_url)
        yield urls


def forget_settings() -> None:
    if db_session.engine.cache_info().currsize:
        db_session.engine().dispose()
    for cached in (settings, db_session.engine, db_session._factory, queue._celery):
        cached.cache_clear()


@pytest.fixture
def configured(servers: ServerUrls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Settings that point to the test servers and to a data folder of this test."""
    for name in [name for name in os.environ if name.startswith("KINDRED_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KINDRED_DATABASE_URL", servers.database_url)
    monkeypatch.setenv("KINDRED_BROKER_URL", servers.broker_url)
    monkeypatch.setenv("KINDRED_DATA_DIR", str(tmp_path / "data"))
    forget_settings()
    yield
    forget_settings()


@pytest.fixture
def database(configured: None) -> Iterator[None]:
    """An empty database under the newest schema."""
    yield
    empty_database()


def empty_database() -> None:
    tables = ", ".join(table.name for table in Table.metadata.sorted_tables)
    with db_session.open_session() as session:
        session.execute(text(f"TRUNCATE {tables} CASCADE"))
        session.add(Tenant(id=DEFAULT_TENANT, name="default"))
        session.commit()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The labelled image sets, which stand beside the checkout on some machines only."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the labelled image sets (../shared/data) are not on this machine")
    return SHARED_DATA


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes make no names: some change with the time of day, and processes must have the same tests."""
    return argname if isinstance(val, bytes) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The promises under faults, with what was seen; here, since tests may run in other processes."""
    print_table(terminalreporter)
