"""keys and tenants

Tenants are kept apart by the database itself. The API works as the role `kindred_api`, which owns no table and
may only do what is granted here, and tells each transaction whose it is (`kindred.tenant`); row-level security
hides the rest. Migrations and workers act as the owner, whom the policies leave alone: PostgreSQL refuses
`COPY … FROM`, by which workers store results, to roles that are subject to them.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

_DEFAULT_TENANT = "00000000-0000-0000-0000-000000000001"
_SETTING = "nullif(current_setting('kindred.tenant', true), '')"
# As a subquery it is evaluated once, where a function would be called for every row.
_TENANT = f"(SELECT {_SETTING}::uuid)"
_THIS_TENANT = f"coalesce({_SETTING}, '{_DEFAULT_TENANT}')::uuid"
_MOMENT = postgresql.TIMESTAMP(timezone=True)

# Which rows a tenant sees. A policy that asks another table is asked through that table's own policy.
_VISIBLE = {
    "tenants": f"id = {_TENANT}",
    **dict.fromkeys(
        ("api_keys", "web_sessions", "idempotency_keys", "collections", "uploads", "images", "runs"),
        f"tenant_id = {_TENANT}",
    ),
    **{
        table: f"EXISTS (SELECT FROM uploads u WHERE u.id = {table}.upload_id)"
        for table in ("upload_parts", "upload_files")
    },
    **{
        table: f"EXISTS (SELECT FROM runs r WHERE r.id = {table}.run_id)"
        for table in ("clusters", "representatives", "assignments")
    },
}

_IN_COLLECTIONS = ("uploads", "images", "runs")

# What the API does, and nothing more. `FOR UPDATE` asks for the right to update some column.
_GRANTS = (
    "SELECT ON {tables}, alembic_version",
    "INSERT ON api_keys, web_sessions, collections, idempotency_keys, uploads, upload_parts, runs",
    "UPDATE (revoked_at, last_used_at) ON api_keys",
    "UPDATE (name) ON collections",
    "UPDATE (state, cancel_requested_at, finished_at) ON runs",
    "DELETE ON web_sessions, collections, idempotency_keys",
)

_ROLE = """
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'kindred_api' AND (rolsuper OR rolbypassrls)) THEN
        RAISE EXCEPTION 'the role kindred_api must be neither a superuser nor exempt from row-level security';
    END IF;
    BEGIN
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'kindred_api') THEN
            CREATE ROLE kindred_api NOLOGIN;
        END IF;
        IF NOT pg_has_role(CURRENT_USER, 'kindred_api', 'MEMBER') THEN
            GRANT kindred_api TO CURRENT_USER;
        END IF;
    EXCEPTION
        WHEN duplicate_object OR unique_violation THEN
            NULL; -- another database of this server is being migrated at the same time
        WHEN insufficient_privilege THEN
            RAISE EXCEPTION 'as a superuser, run: CREATE ROLE kindred_api NOLOGIN; GRANT kindred_api TO %',
                CURRENT_USER;
    END;
END $$
"""

# All that can be asked before it is known whose request it is; each runs as the tables' owner.
_FUNCTIONS = {
    "kindred_keys_exist()": """
RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER SET search_path = {schema}, pg_temp
AS 'SELECT EXISTS (SELECT FROM api_keys)'
""",
    "kindred_find_key(wanted text)": """
RETURNS TABLE (id uuid, tenant_id uuid, name text, scope text, sha256 text, state text, unused_s double precision)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = {schema}, pg_temp
AS $$
    SELECT k.id, k.tenant_id, k.name, k.scope, k.sha256,
           CASE WHEN k.revoked_at IS NOT NULL THEN 'revoked' WHEN k.expires_at <= now() THEN 'expired' ELSE 'usable' END,
           extract(epoch FROM now() - k.last_used_at)
    FROM api_keys k WHERE k.prefix = wanted
$$
""",
    "kindred_find_session(wanted text)": """
RETURNS TABLE (id uuid, tenant_id uuid, name text, scope text, sha256 text, state text, unused_s double precision)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = {schema}, pg_temp
AS $$
    SELECT f.* FROM web_sessions s JOIN api_keys k ON k.id = s.key_id, kindred_find_key(k.prefix) f
    WHERE s.sha256 = wanted AND s.expires_at > now()
$$
""",
}


def upgrade() -> None:
    schema = op.get_bind().scalar(sa.text("SELECT quote_ident(current_schema())"))
    op.create_table(
        "tenants",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", _MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 100", name=op.f("ck_tenants_name_length")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
        sa.UniqueConstraint("name", name=op.f("uq_tenants_name")),
    )
    op.execute(f"INSERT INTO tenants (id, name) VALUES ('{_DEFAULT_TENANT}', 'default')")
    _create_keys()
    _give_rows_a_tenant()
    op.execute(_ROLE)
    op.execute(f"GRANT USAGE ON SCHEMA {schema} TO kindred_api")
    for grant in _GRANTS:
        op.execute(f"GRANT {grant.format(tables=', '.join(_VISIBLE))} TO kindred_api")
    for table, rule in _VISIBLE.items():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY tenant ON {table} TO kindred_api USING ({rule}) WITH CHECK ({rule})")
    for function, body in _FUNCTIONS.items():
        op.execute(f"CREATE FUNCTION {function} {body.format(schema=schema)}")
        name = f"{function.partition('(')[0]}({'text' if 'text' in function else ''})"
        op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {name} TO kindred_api")


def _create_keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), server_default=sa.text(_THIS_TENANT), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("created_at", _MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", _MOMENT, nullable=True),
        sa.Column("revoked_at", _MOMENT, nullable=True),
        sa.Column("last_used_at", _MOMENT, nullable=True),
        sa.CheckConstraint("length(name) BETWEEN 1 AND 100", name=op.f("ck_api_keys_name_length")),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_api_keys_sha256")),
        sa.CheckConstraint("scope IN ('read', 'write', 'admin')", name=op.f("ck_api_keys_scope")),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenants.id"], name=op.f("fk_api_keys_tenant_id_tenants"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("prefix", name=op.f("uq_api_keys_prefix")),
    )
    op.create_index("ix_api_keys_tenant_id_created_at", "api_keys", ["tenant_id", "created_at"])
    op.create_table(
        "web_sessions",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), server_default=sa.text(_THIS_TENANT), nullable=False),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", _MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", _MOMENT, nullable=False),
        sa.CheckConstraint("length(sha256) = 64", name=op.f("ck_web_sessions_sha256")),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenants.id"], name=op.f("fk_web_sessions_tenant_id_tenants"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["key_id"], ["api_keys.id"], name=op.f("fk_web_sessions_key_id_api_keys"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_web_sessions")),
    )
    op.create_index("ix_web_sessions_key_id", "web_sessions", ["key_id"])


def _give_rows_a_tenant() -> None:
    """A default that is the same for every row costs no rewriting of the table."""
    for table in ("collections", "idempotency_keys", *_IN_COLLECTIONS):
        op.add_column(table, sa.Column("tenant_id", sa.Uuid(), server_default=_DEFAULT_TENANT, nullable=False))
        op.alter_column(table, "tenant_id", server_default=sa.text(_THIS_TENANT))
    for table in ("collections", "idempotency_keys"):
        op.create_foreign_key(
            op.f(f"fk_{table}_tenant_id_tenants"), table, "tenants", ["tenant_id"], ["id"], ondelete="CASCADE"
        )
    op.create_unique_constraint(op.f("uq_collections_id_tenant_id"), "collections", ["id", "tenant_id"])
    for table in _IN_COLLECTIONS:
        op.drop_constraint(f"fk_{table}_collection_id_collections", table)
        op.create_foreign_key(
            op.f(f"fk_{table}_collection_id_collections"),
            table,
            "collections",
            ["collection_id", "tenant_id"],
            ["id", "tenant_id"],
            ondelete="CASCADE",
        )
    op.create_index("ix_runs_tenant_id_state", "runs", ["tenant_id", "state"])
    op.drop_constraint("pk_idempotency_keys", "idempotency_keys")
    op.create_primary_key(op.f("pk_idempotency_keys"), "idempotency_keys", ["tenant_id", "key"])
    op.create_index("ix_collections_tenant_id_created_at_id", "collections", ["tenant_id", "created_at", "id"])
    op.drop_index("ix_collections_created_at_id", table_name="collections")


def downgrade() -> None:
    """What belongs to tenants other than the default one is refused to be mixed into it."""
    others = op.get_bind().scalar(sa.text(f"SELECT count(*) FROM collections WHERE tenant_id <> '{_DEFAULT_TENANT}'"))
    if others:
        raise RuntimeError(f"{others} collections belong to tenants other than the default one: delete them first")
    for function in _FUNCTIONS:
        op.execute(f"DROP FUNCTION {function.partition('(')[0]}")
    for table in _VISIBLE:
        op.execute(f"DROP POLICY tenant ON {table}")
        op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
    op.execute("DROP OWNED BY kindred_api")  # what it was granted in this database; other databases may use the role
    op.create_index("ix_collections_created_at_id", "collections", ["created_at", "id"])
    op.drop_index("ix_collections_tenant_id_created_at_id", table_name="collections")
    op.drop_constraint("pk_idempotency_keys", "idempotency_keys")
    op.execute(f"DELETE FROM idempotency_keys WHERE tenant_id <> '{_DEFAULT_TENANT}'")
    op.create_primary_key(op.f("pk_idempotency_keys"), "idempotency_keys", ["key"])
    op.drop_index("ix_runs_tenant_id_state", table_name="runs")
    for table in _IN_COLLECTIONS:
        op.drop_constraint(f"fk_{table}_collection_id_collections", table)
        op.create_foreign_key(
            op.f(f"fk_{table}_collection_id_collections"), table, "collections", ["collection_id"], ["id"],
            ondelete="CASCADE",
        )  # fmt: skip
        op.drop_column(table, "tenant_id")
    op.drop_constraint("uq_collections_id_tenant_id", "collections")
    for table in ("collections", "idempotency_keys"):
        op.drop_constraint(f"fk_{table}_tenant_id_tenants", table)
        op.drop_column(table, "tenant_id")
    op.drop_table("web_sessions")
    op.drop_table("api_keys")
    op.drop_table("tenants")
