"""A browser signs in with a key and is known by a cookie; what a cookie opens, and to whom."""

import hashlib
from http.cookies import SimpleCookie

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.db.session import open_session
from app.main import create_app
from tests.app.keys import bearer, make_key
from tests.app.test_api import assert_problem

PAGE = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
OURS = {"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"}


@pytest.fixture
def browser(api: TestClient) -> TestClient:
    api.headers.update(PAGE)
    api.follow_redirects = False
    return api


def sign_in(browser: TestClient, key: str, **fields: str):
    return browser.post("/sign-in", data={"key": key, **fields}, headers=OURS)


def cookie_of(answer):
    return next(iter(SimpleCookie(answer.headers["set-cookie"]).values()))


def execute(statement: str) -> None:
    with open_session() as session:
        session.execute(text(statement))
        session.commit()


def test_a_page_leads_to_the_sign_in_and_that_back_to_the_page(browser: TestClient):
    key = make_key(name="of Ada")
    asked = browser.get("/collections/00000000-0000-0000-0000-000000000007?after=x")
    assert asked.status_code == 303
    assert asked.headers["location"] == (
        "/sign-in?next=%2Fcollections%2F00000000-0000-0000-0000-000000000007%3Fafter%3Dx"
    )
    form = browser.get(asked.headers["location"])
    assert form.status_code == 200
    assert 'value="/collections/00000000-0000-0000-0000-000000000007?after=x"' in form.text
    answer = sign_in(browser, f"  {key}\n", next="/?after=x")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?after=x")
    assert "Signed in as of Ada" in browser.get("/").text
    assert browser.get("/sign-in").headers["location"] == "/"


def test_the_cookie_is_out_of_reach_and_holds_no_key(browser: TestClient):
    key = make_key()
    answer = sign_in(browser, key)
    cookie = cookie_of(answer)
    assert (cookie["httponly"], cookie["samesite"], cookie["path"], cookie["max-age"], cookie["domain"]) == (
        True, "strict", "/", "43200", "",
    )  # fmt: skip
    assert cookie.key == "kindred_session"
    assert len(cookie.value) == 43  # 256 bits
    assert key[25:] not in answer.headers["set-cookie"]
    with open_session() as session:
        kept = str(session.execute(text("SELECT array_agg(w) FROM web_sessions w")).scalar())
    assert cookie.value not in kept
    assert hashlib.sha256(cookie.value.encode()).hexdigest() in kept


def test_over_https_the_cookie_is_for_https_and_this_host_only(database: None):
    with TestClient(create_app(), base_url="https://kindred.example", headers=PAGE, follow_redirects=False) as browser:
        origin = {"Origin": "https://kindred.example"}
        answer = browser.post("/sign-in", data={"key": make_key()}, headers=origin)
        cookie = cookie_of(answer)
        assert (cookie.key, cookie["secure"], cookie["path"], cookie["domain"]) == (
            "__Host-kindred_session", True, "/", "",
        )  # fmt: skip
        assert browser.get("/").status_code == 200
        # A cookie of the other name may have been set over http, by anybody on the way.
        browser.cookies.clear()
        assert browser.get("/", headers={"Cookie": f"kindred_session={cookie.value}"}).status_code == 303


@pytest.mark.parametrize("key", ["", "nonsense", "kindred_" + "0" * 16 + "_" + "A" * 43, "<script>alert(1)</script>"])
def test_a_wrong_key_is_refused_and_not_repeated(browser: TestClient, key: str):
    make_key()
    answer = sign_in(browser, key, next="/runs/x")
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers
    assert 'role="alert"' in answer.text
    assert 'name="next" value="/runs/x"' in answer.text
    if key:
        assert key not in answer.text
    assert browser.get("/").status_code == 303


@pytest.mark.parametrize(
    "elsewhere",
    [
        "https://evil.example/", "//evil.example", "/\\evil.example", "\\\\evil.example", "javascript:alert(1)", "evil",
        "/\tx", "\n//evil.example", "///evil.example", "", "//[",
    ],
)  # fmt: skip
def test_the_way_back_leads_nowhere_else(browser: TestClient, elsewhere: str):
    key = make_key()
    assert 'name="next" value="/"' in browser.get("/sign-in", params={"next": elsewhere}).text
    assert sign_in(browser, key, next=elsewhere).headers["location"] == "/"
    assert browser.get("/sign-in", params={"next": elsewhere}).headers["location"] == "/"


def test_signed_out_the_cookie_opens_nothing_whoever_kept_it(browser: TestClient):
    kept = cookie_of(sign_in(browser, make_key())).value
    answer = browser.post("/sign-out", headers=OURS)
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")
    assert cookie_of(answer)["max-age"] == "0"
    assert "cache" in answer.headers["clear-site-data"]
    assert not browser.cookies
    browser.cookies.set("kindred_session", kept)
    assert browser.get("/").status_code == 303
    assert_problem(browser.get("/v1/collections"), 401, "key-needed")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE web_sessions SET expires_at = now() - interval '1 second'",
        "UPDATE api_keys SET revoked_at = now()",
        "UPDATE api_keys SET expires_at = now() - interval '1 second'",
        "DELETE FROM web_sessions",
    ],
)
def test_a_sign_in_ends_by_itself_and_with_its_key(browser: TestClient, statement: str):
    sign_in(browser, make_key())
    assert browser.get("/").status_code == browser.get("/v1/collections").status_code == 200
    execute(statement)
    assert browser.get("/").status_code == 303
    assert_problem(browser.get("/v1/collections"), 401, "key-needed")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (OURS, 201),
        ({"Origin": "http://localhost"}, 201),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({}, 403),  # a browser says where it comes from
    ],
)
def test_a_cookie_writes_from_our_own_pages_only(browser: TestClient, headers: dict[str, str], status: int):
    sign_in(browser, make_key())
    answer = browser.post("/v1/collections", json={"name": "x"}, headers=headers)
    assert answer.status_code == status
    assert len(browser.get("/v1/collections").json()["items"]) == (status == 201)


def test_a_foreign_page_can_neither_sign_in_nor_out(browser: TestClient):
    key = make_key()
    foreign = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
    assert browser.post("/sign-in", data={"key": key}, headers=foreign).status_code == 403
    sign_in(browser, key)
    assert browser.post("/sign-out", headers=foreign).status_code == 403
    assert browser.get("/").status_code == 200


def test_a_cookie_planted_beforehand_opens_nothing_afterwards(browser: TestClient):
    browser.cookies.set("kindred_session", "planted")
    answer = sign_in(browser, make_key())
    assert cookie_of(answer).value != "planted"
    browser.cookies.clear()
    browser.cookies.set("kindred_session", "planted")
    assert browser.get("/").status_code == 303


def test_a_browser_may_what_its_key_may(browser: TestClient):
    sign_in(browser, make_key(scope="read"))
    page = browser.get("/").text
    assert "may only look" in page
    assert "Upload and group" not in page
    assert_problem(browser.post("/v1/collections", json={"name": "x"}, headers=OURS), 403, "scope-missing")
    assert_problem(browser.get("/v1/keys"), 403, "scope-missing")


def test_a_browser_sees_its_own_tenant(browser: TestClient):
    one, another = make_key("one"), make_key("another")
    browser.post("/v1/collections", json={"name": "of one"}, headers=bearer(one))
    sign_in(browser, another)
    assert "of one" not in browser.get("/").text
    sign_in(browser, one)
    assert "of one" in browser.get("/").text


def test_a_key_in_the_header_counts_before_the_cookie(browser: TestClient):
    sign_in(browser, make_key("one"))
    assert_problem(browser.get("/v1/collections", headers={"Authorization": "Bearer x"}), 401, "unknown-key")


def test_without_keys_nobody_is_asked_to_sign_in(browser: TestClient):
    assert browser.get("/sign-in").headers["location"] == "/"
    page = browser.get("/").text
    assert "Sign out" not in page


def test_old_sign_ins_are_cleared_away(browser: TestClient):
    key = make_key()
    for _ in range(3):
        sign_in(browser, key)
        execute("UPDATE web_sessions SET expires_at = now() - interval '1 second'")
    sign_in(browser, key)
    with open_session() as session:
        assert session.execute(text("SELECT count(*) FROM web_sessions")).scalar() == 1
