import uuid
from collections.abc import Iterator

import pytest
from alembic import command
from sqlalchemy import Engine, create_engine, make_url, text

from app.db.migrate import alembic_config, upgrade
from app.db.tables import DEFAULT_TENANT


def test_the_tables_are_what_the_migrations_build(servers):
    """Raises when a migration is missing."""
    command.check(alembic_config(servers.database_url))


@pytest.fixture
def empty(servers) -> Iterator[str]:
    """The URL of a database of its own, which belongs to a role that is no superuser, as on a rented server."""
    name = f"m{uuid.uuid4().hex}"
    admin = create_engine(servers.database_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE ROLE {name} LOGIN CREATEROLE"))
        # As the server's administrator does; a role may not give out a role that another one made.
        connection.execute(text(f"GRANT kindred_api TO {name}"))
        connection.execute(text(f"CREATE DATABASE {name} OWNER {name}"))
    url = make_url(servers.database_url).set(database=name)
    yield url.update_query_dict({"options": f"-crole={name}"}).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        connection.execute(text(f"DROP ROLE {name}"))
    admin.dispose()


@pytest.fixture
def engine(empty: str) -> Iterator[Engine]:
    engine = create_engine(empty)
    yield engine
    engine.dispose()


def fill(engine: Engine) -> dict[str, uuid.UUID]:
    """A row of each table of 0001."""
    ids = {name: uuid.uuid4() for name in ("collection", "upload", "image", "run")}
    rows = [
        "INSERT INTO collections (id, name) VALUES (:collection, 'mine')",
        "INSERT INTO uploads (id, collection_id, bytes) VALUES (:upload, :collection, 1)",
        "INSERT INTO upload_parts VALUES (:upload, 0, 'a.zip', 1)",
        "INSERT INTO images VALUES (:image, DEFAULT, :collection, :upload, :sha256, 'a.png', 'PNG', 1, 1, 1)",
        "INSERT INTO upload_files VALUES (:upload, 0, 'a.png', 1, 'accepted', :image)",
        "INSERT INTO runs (id, collection_id, parameters) VALUES (:run, :collection, '{}')",
        "INSERT INTO clusters VALUES (:run, 0, 'Group 1', 1)",
        "INSERT INTO representatives VALUES (:run, 0, 0, :image)",
        "INSERT INTO assignments VALUES (:run, 0, :image, 0, 0, 1, 0, 1, true)",
        "INSERT INTO idempotency_keys VALUES ('k', 'd', 201, '/', '{}')",
    ]  # fmt: skip
    with engine.begin() as connection:
        for row in rows:
            connection.execute(text(row), {**ids, "sha256": "a" * 64})
    return ids


def seen(engine: Engine, tenant: object) -> dict[str, int]:
    """Rows of each table of 0001 that the API sees for a tenant."""
    tables = (
        "collections", "uploads", "upload_parts", "upload_files", "images", "runs", "clusters", "representatives",
        "assignments", "idempotency_keys",
    )  # fmt: skip
    with engine.begin() as connection:
        connection.execute(
            text("SELECT set_config('role', 'kindred_api', true), set_config('kindred.tenant', :tenant, true)"),
            {"tenant": str(tenant)},
        )
        return {table: connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() for table in tables}


def test_a_filled_database_becomes_the_default_tenant_s(empty: str, engine: Engine):
    config = alembic_config(empty)
    command.upgrade(config, "0001")
    ids = fill(engine)
    upgrade(empty)
    assert set(seen(engine, DEFAULT_TENANT).values()) == {1}
    assert set(seen(engine, uuid.uuid4()).values()) == {0}
    with engine.begin() as connection:
        # The owner, whom workers act as, sees and writes everything, though it is no superuser.
        own = "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user"
        assert connection.execute(text(own)).scalar_one() is False
        assert connection.execute(text("SELECT count(*) FROM assignments")).scalar() == 1
        driver = connection.connection.driver_connection
        with driver.cursor() as cursor, cursor.copy("COPY clusters FROM STDIN") as copy:
            copy.write_row((ids["run"], 1, "Group 2", 0, None, None))
        assert connection.execute(text("SELECT count(*) FROM clusters")).scalar() == 2
    command.check(config)


def test_the_way_back_keeps_the_rows_and_refuses_to_mix_tenants(empty: str, engine: Engine):
    config = alembic_config(empty)
    command.upgrade(config, "0001")
    fill(engine)
    upgrade(empty)
    other = uuid.uuid4()
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO tenants (id, name) VALUES (:id, 'other')"), {"id": other})
        connection.execute(
            text("INSERT INTO collections (id, tenant_id, name) VALUES (:id, :id, 'theirs')"), {"id": other}
        )
    with pytest.raises(RuntimeError, match="1 collections belong to tenants other"):
        command.downgrade(config, "0001")
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM tenants WHERE id = :id"), {"id": other})
    command.downgrade(config, "0001")
    with engine.begin() as connection:
        assert connection.execute(text("SELECT name FROM collections")).scalars().all() == ["mine"]
        assert connection.execute(text("SELECT to_regclass('tenants')")).scalar() is None
    upgrade(empty)
    assert set(seen(engine, DEFAULT_TENANT).values()) == {1}
