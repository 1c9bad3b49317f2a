"""Tenants are kept apart by the database: by the API, route by route, and below it, by SQL."""

import re
import uuid

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, ProgrammingError

from app import storage
from app.config import settings
from app.db.session import API_ROLE, open_session, tenant_session
from app.db.tables import DEFAULT_TENANT, Table
from app.main import create_app
from app.services import tenants
from tests.app.keys import bearer, make_key
from tests.app.test_web import METRICS, finished_run, pages_of
from tests.conftest import forget_settings
from tests.pictures import picture, zip_of

TABLES = [table.name for table in Table.metadata.sorted_tables]


def everything() -> dict[str, str]:
    """All rows of all tables, as text."""
    with open_session() as session:
        return {
            name: str(session.execute(text(f"SELECT array_agg(t.* ORDER BY t::text) FROM {name} t")).scalar())
            for name in TABLES
        }


@pytest.fixture
def theirs(api: TestClient) -> dict[str, str]:
    """What another tenant has, by the names that paths give to their parts."""
    run = finished_run(metrics=METRICS)
    with open_session() as session:
        images = session.execute(text("SELECT id, sha256 FROM images ORDER BY number")).all()
    for _, sha256 in images:
        for path in (storage.original(run.collection_id, sha256), storage.thumbnail(run.collection_id, sha256)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"a picture of theirs")
    storage.levels(run.id).parent.mkdir(parents=True)
    storage.levels(run.id).write_text("image_id,filename,groups_2\n")
    key = make_key(name="theirs")
    with open_session() as session:
        key_id = session.execute(text("SELECT id FROM api_keys")).scalar_one()
    return {
        "key": key,
        "collection_id": str(run.collection_id),
        "upload_id": str(run.upload_id),
        "run_id": str(run.id),
        "image_id": str(images[0].id),
        "cluster": "0",
        "key_id": str(key_id),
        "pages": " ".join(page for page in pages_of(run) if page != "/"),
    }


def requests(api: TestClient) -> list[tuple[str, str, dict]]:
    """A good request for every call that names something, GETs first and what ends things last."""
    order = {"get": 0, "post": 1, "delete": 2}
    found = []
    for path, methods in api.get("/openapi.json").json()["paths"].items():
        for method in methods:
            body: dict = {}
            if path.endswith("/uploads") and method == "post":
                body = {"files": {"file": ("p.zip", zip_of({"a.png": picture(1)}))}}
            elif path.endswith("/runs") and method == "post":
                body = {"json": {"clusters": 2}}
            if "{" in path:
                found.append((method, path, body))
    return sorted(found, key=lambda call: (call[1].endswith("/revoke"), order[call[0]], call[1]))


def test_every_route_with_another_tenant_s_ids_finds_nothing_and_changes_nothing(
    api: TestClient, theirs: dict[str, str]
):
    ours = bearer(make_key("ours"))
    calls = requests(api)
    assert len(calls) >= 20
    before = everything()
    for method, path, body in calls:
        answer = api.request(method, path.format(**theirs), headers=ours, **body)
        assert answer.status_code == 404, (method, path, answer.text)
        # The same words as for what nobody has.
        nobody_s = {name: str(uuid.UUID(int=7)) if name.endswith("_id") else value for name, value in theirs.items()}
        missing = api.request(method, path.format(**nobody_s), headers=ours, **body)
        assert missing.status_code == 404
        assert re.sub(r"[0-9a-f-]{36}", "ID", answer.text) == re.sub(r"[0-9a-f-]{36}", "ID", missing.text)
    for path in theirs["pages"].split():
        assert api.get(path, headers={**ours, "Accept": "text/html"}).status_code == 404, path
    after = everything()
    assert [name for name in TABLES if name != "api_keys" and before[name] != after[name]] == []
    with open_session() as session:
        assert session.execute(text("SELECT count(*) FROM api_keys WHERE revoked_at IS NOT NULL")).scalar() == 0


def test_the_same_requests_find_everything_with_its_owner_s_key(api: TestClient, theirs: dict[str, str]):
    """Or else the test above would pass for whatever answers 404."""
    for method, path, body in requests(api):
        answer = api.request(method, path.format(**theirs), headers=bearer(theirs["key"]), **body)
        # What their own requests did before may forbid the next one (409), but nothing is unknown.
        assert answer.status_code in (200, 202, 204, 409), (method, path, answer.text)


def test_lists_show_nothing_of_another_tenant(api: TestClient, theirs: dict[str, str]):
    ours = bearer(make_key("ours"))
    assert api.get("/v1/collections", headers=ours).json()["items"] == []
    assert [item["name"] for item in api.get("/v1/keys", headers=ours).json()["items"]] == ["test"]
    page = api.get("/", headers={**ours, "Accept": "text/html"}).text
    assert "Nothing here yet" in page
    assert theirs["collection_id"] not in page
    assert len(api.get("/v1/collections", headers=bearer(theirs["key"])).json()["items"]) == 1


def test_an_idempotency_key_is_each_tenant_s_own(api: TestClient):
    one, another = (bearer(make_key(name)) | {"Idempotency-Key": "same"} for name in ("one", "another"))
    first = api.post("/v1/collections", json={"name": "x"}, headers=one)
    second = api.post("/v1/collections", json={"name": "x"}, headers=another)
    assert first.status_code == second.status_code == 201
    assert first.json()["id"] != second.json()["id"]
    assert api.post("/v1/collections", json={"name": "x"}, headers=one).json()["id"] == first.json()["id"]


def test_sql_under_the_role_of_the_api_sees_nothing_without_a_tenant(api: TestClient, theirs: dict[str, str]):
    with tenant_session(None) as session:
        assert session.execute(text("SELECT current_user")).scalar() == API_ROLE
        for name in TABLES:
            assert session.execute(text(f"SELECT count(*) FROM {name}")).scalar() == 0, name
    with tenant_session(DEFAULT_TENANT) as session:
        seen = {name for name in TABLES if session.execute(text(f"SELECT count(*) FROM {name}")).scalar()}
    assert {"tenants", "collections", "uploads", "upload_files", "images", "runs", "clusters"} <= seen


def test_the_tenant_and_the_role_last_one_transaction(database: None):
    with open_session() as session:
        own = session.execute(text("SELECT current_user")).scalar()
    with tenant_session(DEFAULT_TENANT) as session:
        for _ in range(2):
            assert session.execute(text("SELECT current_user")).scalar() == API_ROLE
            session.commit()
    for _ in range(12):  # whichever connection of the pool it is
        with open_session() as session:
            found = session.execute(text("SELECT current_user, current_setting('kindred.tenant', true)")).one()
        assert found in ((own, None), (own, ""))


def test_the_role_owns_nothing_and_no_policy_leaves_it_out(database: None):
    with open_session() as session:
        role = session.execute(
            text(
                "SELECT rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolcanlogin"
                " FROM pg_roles WHERE rolname = :r"
            ),
            {"r": API_ROLE},
        ).one()
        assert not any(role)
        owned = text("SELECT count(*) FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner WHERE r.rolname = :r")
        assert session.execute(owned, {"r": API_ROLE}).scalar() == 0
        guarded = text("SELECT relname FROM pg_class WHERE relkind = 'r' AND relrowsecurity")
        # A table that comes later belongs to a tenant too, or says here why not.
        assert set(TABLES) <= set(session.execute(guarded).scalars())
        policies = session.execute(text("SELECT tablename, roles::text[], permissive FROM pg_policies")).all()
        assert {(name, ("kindred_api",)) for name in TABLES} <= {(p.tablename, tuple(p.roles)) for p in policies}


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO collections (id, tenant_id, name) VALUES (gen_random_uuid(), 'OTHER', 'x')",
        "UPDATE runs SET collection_id = collection_id",
        "UPDATE collections SET tenant_id = tenant_id",
        "UPDATE api_keys SET scope = 'admin'",
        "DELETE FROM api_keys",
        "DELETE FROM runs",
        "INSERT INTO tenants (id, name) VALUES (gen_random_uuid(), 'mine')",
        "INSERT INTO assignments SELECT * FROM assignments",
        "TRUNCATE collections",
        "DROP TABLE collections",
        "ALTER TABLE collections DISABLE ROW LEVEL SECURITY",
        "CREATE TABLE mine (id int)",
        "COPY collections TO PROGRAM 'cat'",
        "SELECT pg_read_file('/etc/passwd')",
        "UPDATE alembic_version SET version_num = 'x'",
    ],
)
def test_the_role_may_not_do_what_the_api_does_not(database: None, statement: str):
    with open_session() as session:
        other = tenants.named(session, "other").id
        session.commit()
    with (
        tenant_session(DEFAULT_TENANT) as session,
        pytest.raises(ProgrammingError, match=r"permission denied|row-level security|must be owner"),
    ):
        session.execute(text(statement.replace("OTHER", str(other))))


def test_a_run_cannot_be_hung_on_another_tenant_s_collection(api: TestClient, theirs: dict[str, str]):
    """Foreign keys look past row-level security, so they ask whose it is as well."""
    with open_session() as session:
        other = tenants.named(session, "other").id
        session.commit()
    insert = text(
        "INSERT INTO runs (id, tenant_id, collection_id, parameters) VALUES (gen_random_uuid(), :tenant, :c, '{}')"
    )
    for tenant, error, words in (
        (other, IntegrityError, "fk_runs_collection_id_collections"),
        (DEFAULT_TENANT, ProgrammingError, "row-level security"),
    ):
        with tenant_session(other) as session, pytest.raises(error, match=words):
            session.execute(insert, {"tenant": tenant, "c": theirs["collection_id"]})


def test_what_is_written_for_no_tenant_goes_to_none_through_the_api(database: None):
    insert = text("INSERT INTO collections (id, name) VALUES (gen_random_uuid(), 'x')")
    with tenant_session(None) as session, pytest.raises(ProgrammingError, match="row-level security"):
        session.execute(insert)


def test_the_api_works_with_a_login_that_is_nothing_but_its_role(database: None, monkeypatch: pytest.MonkeyPatch):
    """So that whoever takes over the API's process cannot take the owner's rights back."""
    web = f"web_{uuid.uuid4().hex}"
    with open_session() as session:
        session.execute(text(f"CREATE ROLE {web}"))
        session.execute(text(f"GRANT {API_ROLE} TO {web}"))
        session.commit()
    own = str(settings().database_url)
    monkeypatch.setenv("KINDRED_DATABASE_URL", f"{own}&options=-crole%3D{web}")
    forget_settings()
    try:
        with TestClient(create_app(), base_url="http://localhost") as http:
            assert http.get("/readyz").status_code == 200
            files = {"file": ("p.zip", zip_of({"a.png": picture(1), "b.png": picture(2)}))}
            run = http.post("/v1/cluster", files=files, data={"clusters": "2"}, headers={"Idempotency-Key": "k"})
            assert run.status_code == 202, run.text
            assert http.post(run.json()["links"]["cancel"]).status_code == 202
            key = http.post("/v1/keys", json={"name": "x", "scope": "admin"}).json()
            http.headers.update(bearer(key["key"]))
            assert http.get("/", headers={"Accept": "text/html"}).status_code == 200
            assert http.post("/v1/collections", json={"name": "x"}).status_code == 201
            signed_in = http.post("/sign-in", data={"key": key["key"]}, follow_redirects=False)
            assert signed_in.status_code == 303
            assert http.post("/sign-out", follow_redirects=False).status_code == 303
            assert http.post(f"{key['links']['self']}/revoke").status_code == 200
            assert http.get("/v1/collections").status_code == 401
        with open_session() as session, pytest.raises(ProgrammingError, match="permission denied"):
            session.execute(text("DELETE FROM runs"))
    finally:
        monkeypatch.setenv("KINDRED_DATABASE_URL", own)
        forget_settings()
        with open_session() as session:
            session.execute(text(f"DROP ROLE {web}"))
            session.commit()
