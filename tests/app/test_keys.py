"""Keys: who gets in with which, and what is kept of them."""

import hashlib
import re
import threading
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app import access
from app.access import AdminRoute, GuardedRoute, Rates
from app.config import settings
from app.db.session import open_session
from app.errors import TooMany
from app.main import create_app
from tests.app.keys import bearer, make_key
from tests.app.test_api import archive, assert_problem, files_below

SCOPES = ("read", "write", "admin")


def table(name: str) -> str:
    with open_session() as session:
        return str(session.execute(text(f"SELECT array_agg({name}) FROM {name}")).scalar())


def test_a_key_is_shown_once_and_kept_as_its_sha256(api: TestClient):
    made = api.post("/v1/keys", json={"name": "import", "scope": "write"})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    key = made.json()["key"]
    # 43 characters of base64 are 256 bits.
    assert re.fullmatch(r"kindred_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", key)
    kept = table("api_keys")
    assert key.rpartition("_")[2][:20] not in kept
    assert key[25:] not in kept
    assert hashlib.sha256(key.encode()).hexdigest() in kept
    admin = bearer(make_key())
    for answer in (api.get(made.headers["location"], headers=admin), api.get("/v1/keys", headers=admin)):
        assert answer.status_code == 200
        assert made.json()["prefix"] in answer.text
        assert key not in answer.text
        assert "sha256" not in answer.text


def test_two_keys_have_nothing_in_common(api: TestClient):
    keys = {make_key() for _ in range(50)}
    assert len({key[8:24] for key in keys}) == len({key[25:] for key in keys}) == 50


def test_once_a_key_is_made_every_request_needs_one(api: TestClient):
    assert api.get("/v1/collections").status_code == 200
    key = make_key()
    refused = api.get("/v1/collections")
    assert_problem(refused, 401, "key-needed")
    assert refused.headers["www-authenticate"] == 'Bearer realm="kindred"'
    assert api.get("/v1/collections", headers=bearer(key)).status_code == 200
    with open_session() as session:
        session.execute(text("UPDATE api_keys SET revoked_at = now()"))
        session.commit()
    # The end of the last key opens nothing.
    assert_problem(api.get("/v1/collections"), 401, "key-needed")
    assert_problem(api.get("/v1/collections", headers=bearer(key)), 401, "revoked-key")


def test_keys_can_be_needed_from_the_first_request_on(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINDRED_REQUIRE_KEYS", "1")
    settings.cache_clear()
    assert_problem(api.get("/v1/collections"), 401, "key-needed")
    assert api.get("/v1/collections", headers=bearer(make_key())).status_code == 200
    assert api.get("/healthz").status_code == api.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("base_url", "client", "status"),
    [
        ("http://localhost:8000", ("127.0.0.1", 50000), 200),
        ("http://127.0.0.1:8000", ("127.0.0.1", 50000), 200),
        ("http://127.8.8.8:8000", ("127.0.0.1", 50000), 200),
        ("http://[::1]:8000", ("::1", 50000), 200),
        ("http://[::1]:8000", ("::ffff:127.0.0.1", 50000), 200),
        ("http://127.0.0.1:8000", ("192.0.2.7", 50000), 401),  # what a proxy says of its client
        ("http://127.0.0.1:8000", ("::ffff:192.0.2.7", 50000), 401),
        ("http://192.0.2.1:8000", ("127.0.0.1", 50000), 401),
        ("http://evil.example:8000", ("127.0.0.1", 50000), 401),  # DNS rebinding
        ("http://127.0.0.1.evil.example:8000", ("127.0.0.1", 50000), 401),
        ("http://localhost.evil.example:8000", ("127.0.0.1", 50000), 401),
    ],
)
def test_without_keys_only_this_machine_is_answered(
    database: None, base_url: str, client: tuple[str, int], status: int
):
    with TestClient(create_app(), base_url=base_url, client=client) as http:
        assert http.get("/v1/collections").status_code == status
        assert http.post("/v1/collections", json={"name": "x"}).status_code == (201 if status == 200 else 401)
        assert http.get("/v1/collections", headers=bearer(make_key())).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer x"},
        {"Authorization": "Basic dTpw"},
        {"Authorization": ""},
        {"Authorization": "Bearer \xff"},
        {"Authorization": "Bearer kindred_" + "0" * 16 + "_" + "A" * 43},
        {"Authorization": "Bearer kindred_" + "0" * 16 + "_" + "A" * 43 + "\n"},
        {"Authorization": "Bearer " + "A" * 8000},
    ],
)
@pytest.mark.parametrize("keyless", [1, 0])
def test_what_is_no_key_is_refused_though_none_be_needed(api: TestClient, headers: dict, keyless: int):
    if not keyless:
        make_key()
    encoded = {name: value.strip("\n").encode("latin-1") for name, value in headers.items()}
    assert_problem(api.get("/v1/collections", headers=encoded), 401, "unknown-key")


def test_a_key_with_one_character_changed_is_none(api: TestClient):
    key = make_key()
    for place in (8, 23, 25, 40, len(key) - 1):
        changed = key[:place] + ("b" if key[place] == "a" else "a") + key[place + 1 :]
        assert_problem(api.get("/v1/collections", headers=bearer(changed)), 401, "unknown-key")
    assert api.get("/v1/collections", headers=bearer(key)).status_code == 200


def test_the_hashes_are_compared_in_constant_time(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    compared = []
    monkeypatch.setattr("app.services.keys.hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    api.get("/v1/collections", headers=bearer(make_key()))
    api.get("/v1/collections", headers=bearer("kindred_" + "0" * 16 + "_" + "A" * 43))  # a prefix that is none
    assert [len(a) == len(b) == 64 for a, b in compared] == [True, True]


def test_an_expired_key_is_told_so(api: TestClient):
    key = make_key(lasts=timedelta(hours=1))
    assert api.get("/v1/collections", headers=bearer(key)).status_code == 200
    with open_session() as session:
        session.execute(text("UPDATE api_keys SET expires_at = now() - interval '1 second'"))
        session.commit()
    assert_problem(api.get("/v1/collections", headers=bearer(key)), 401, "expired-key")


def test_a_scope_may_what_those_below_it_may(api: TestClient):
    keys = {scope: bearer(make_key(scope=scope)) for scope in SCOPES}
    collection = api.post("/v1/collections", json={"name": "x"}, headers=keys["write"]).json()["links"]["self"]
    allowed = {
        scope: [
            api.get(collection, headers=headers).status_code,
            api.post("/v1/collections", json={"name": "x"}, headers=headers).status_code,
            api.get("/v1/keys", headers=headers).status_code,
        ]
        for scope, headers in keys.items()
    }
    assert allowed == {"read": [200, 403, 403], "write": [200, 201, 403], "admin": [200, 201, 200]}
    body = assert_problem(api.delete(collection, headers=keys["read"]), 403, "scope-missing")
    assert body["detail"] == "This takes a key of the scope write; yours has read."
    assert api.get(collection, headers=keys["read"]).status_code == 200


def test_an_upload_without_a_key_leaves_nothing_behind(api: TestClient):
    read = make_key(scope="read")
    request = {"files": {"file": archive()}, "data": {"clusters": "2"}}
    assert_problem(api.post("/v1/cluster", **request), 401, "key-needed")
    assert_problem(api.post("/v1/cluster", **request, headers=bearer(read)), 403, "scope-missing")
    assert files_below(settings().data_dir) == []


def test_a_revoked_key_opens_nothing_from_the_next_request_on(api: TestClient):
    admin, other = bearer(make_key()), make_key(name="other")
    row = api.get("/v1/keys", headers=admin).json()["items"][0]
    assert row["name"] == "other"
    assert api.get("/v1/collections", headers=bearer(other)).status_code == 200
    first = api.post(f"{row['links']['self']}/revoke", headers=admin).json()["revoked_at"]
    assert first is not None
    assert_problem(api.get("/v1/collections", headers=bearer(other)), 401, "revoked-key")
    assert api.post(f"{row['links']['self']}/revoke", headers=admin).json()["revoked_at"] == first


def test_a_stream_ends_with_its_key(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.api.runs._POLL_S", 0.02)
    key, other = bearer(make_key()), bearer(make_key())
    run = api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "2"}, headers=key).json()

    def revoke() -> None:
        for row in api.get("/v1/keys", headers=other).json()["items"][1:]:
            api.post(f"{row['links']['self']}/revoke", headers=other)

    timer = threading.Timer(1.0, revoke)
    timer.start()
    heard = api.get(run["links"]["events"], headers=key).text  # would not end by itself: the run waits for ever
    timer.join()
    assert "event: progress" in heard
    assert "event: end" not in heard


def test_the_time_of_the_last_use_is_known(api: TestClient):
    admin, other = bearer(make_key()), make_key(name="other")
    before = api.get("/v1/keys", headers=admin).json()["items"][0]
    assert before["last_used_at"] is None
    api.get("/v1/collections", headers=bearer(other))
    after = api.get("/v1/keys", headers=admin).json()["items"][0]
    assert after["last_used_at"] >= after["created_at"]


def test_keys_come_newest_first_in_pages(api: TestClient):
    admin = bearer(make_key(name="0"))
    for number in range(1, 5):
        make_key(name=str(number))
    seen, cursor = [], None
    while True:
        page = api.get("/v1/keys", headers=admin, params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        seen += [item["name"] for item in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == ["4", "3", "2", "1", "0"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "name"),
        ({"name": " "}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "a\x00b"}, "name"),
        ({"name": "x", "scope": "root"}, "scope"),
        ({"name": "x", "expires_in_s": 0}, "expires_in_s"),
        ({"name": "x", "expires_in_s": 10**12}, "expires_in_s"),
        ({"name": "x", "tenant_id": str(uuid.UUID(int=1))}, "tenant_id"),
    ],
)
def test_a_bad_key_is_named(api: TestClient, body: dict, field: str):
    answer = assert_problem(api.post("/v1/keys", json=body), 422, "invalid-input")
    assert [error["field"] for error in answer["errors"]] == [field]
    assert "api_keys" not in table("api_keys")


def test_every_route_is_guarded_but_for_those_that_hold_nothing_of_anybody_s(api: TestClient):
    open_to_all = {"/healthz", "/readyz", "/metrics", "/sign-in", "/sign-out", "/docs"}
    seen = 0
    for module in _routers():
        for route in module.router.routes:
            seen += 1
            if route.path not in open_to_all:
                assert isinstance(route, GuardedRoute), route.path
            if route.path.startswith("/v1/keys"):
                assert isinstance(route, AdminRoute)
    assert seen > 30
    make_key()
    for path, methods in api.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            if path in open_to_all:
                continue
            assert {"401", "403", "429"} <= operation["responses"].keys(), (method, path)
            assert operation["security"] == [{"key": []}], (method, path)
            answer = api.request(method, re.sub(r"\{.*?\}", str(uuid.UUID(int=7)), path))
            assert_problem(answer, 401, "key-needed")


def _routers() -> list:
    """Every module that has routes, whether or not somebody thought of it here."""
    import importlib

    root = Path(access.__file__).parent
    names = [
        ".".join(path.relative_to(root.parent).with_suffix("").parts)
        for folder in ("api", "web")
        for path in sorted((root / folder).glob("*.py"))
    ]
    modules = [importlib.import_module(name) for name in names]
    return [module for module in modules if hasattr(module, "router")]


def test_a_tenant_s_requests_are_limited_and_nobody_else_s(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    api.app.state.rates = Rates(60, clock=lambda: now[0])
    one, another = bearer(make_key("one")), bearer(make_key("another"))
    assert {api.get("/v1/collections", headers=one).status_code for _ in range(60)} == {200}
    refused = api.get("/v1/collections", headers=one)
    assert "60 requests a minute" in assert_problem(refused, 429, "too-many-requests")["detail"]
    assert refused.headers["retry-after"] == "1"
    assert api.get("/v1/collections", headers=another).status_code == 200
    now[0] += 1.0
    assert api.get("/v1/collections", headers=one).status_code == 200
    assert api.get("/v1/collections", headers=one).status_code == 429
    monkeypatch.setenv("KINDRED_BROKER_URL", "redis://127.0.0.1:1/0")  # the limit asks no server


def test_a_bucket_holds_a_minute_and_fills_evenly():
    now, tenant = [100.0], uuid.uuid4()
    waits: set[int] = set()
    rates = Rates(600, clock=lambda: now[0])

    def passed(tries: int) -> int:
        good = 0
        for _ in range(tries):
            try:
                rates.count(tenant)
                good += 1
            except TooMany as error:
                waits.add(error.retry_after_s)
        return good

    assert passed(1000) == 600
    now[0] += 3.0
    assert passed(1000) == 30
    now[0] += 3600.0
    assert passed(1000) == 600
    assert waits == {1}
    assert Rates(0).count(tenant) is None


def test_without_keys_requests_are_not_counted(api: TestClient):
    api.app.state.rates = Rates(2)
    assert {api.get("/v1/collections").status_code for _ in range(5)} == {200}
