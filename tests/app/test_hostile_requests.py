"""Requests out of range: JSON that is none, numbers beyond every limit, ids, cursors and names made to break things."""

import json
import uuid
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from app.config import settings
from app.main import create_app
from app.services.pages import encode
from tests.app.test_api import assert_problem
from tests.pictures import picture, zip_of

MISSING = str(uuid.UUID(int=7))
JSON = {"Content-Type": "application/json"}
LISTS = ("/v1/collections", f"/v1/collections/{MISSING}/images", f"/v1/uploads/{MISSING}/files")


@pytest.fixture
def collection(api: TestClient) -> str:
    return api.post("/v1/collections", json={"name": "hostile"}).json()["id"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"name"', b"\xff\xfe{}", b"\x00", b'{"name": NaN}', b'{"name": 1e400}',
        b'{"name": "a\\u0000b"}', b'{"name": "\\ud800"}', b'{"\\ud800": 1, "name": "x"}', b'{"name": {}}',
        b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}", b'{"a":' * 100_000, b'{"name": ' + b"9" * 100_000 + b"}",
        b'{"name": "x", "name\\u0000": 1}', b'{"name": "' + b"x" * 100_000 + b'"}',
    ],
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_a_body_that_is_no_collection_is_refused(api: TestClient, body: bytes):
    answer = api.post("/v1/collections", content=body, headers=JSON)
    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert api.get("/v1/collections").json()["items"] == []


@pytest.mark.parametrize("field", ["clusters", "seed", "epochs", "restarts", "image_size"])
@pytest.mark.parametrize(
    "value", ["-1", "0.5", "1e400", "-1e400", "1" + "0" * 4000, "NaN", "Infinity", '"\\ud800"', "[]", "{}"]
)
def test_a_number_out_of_range_is_named(api: TestClient, collection: str, field: str, value: str):
    fields = {"clusters": "2"} | {field: value}
    body = "{" + ", ".join(f'"{name}": {text}' for name, text in fields.items()) + "}"
    answer = api.post(f"/v1/collections/{collection}/runs", content=body.encode(), headers=JSON)
    found = assert_problem(answer, 422, "invalid-input")
    assert [error["field"] for error in found["errors"]] == [field]
    assert len(answer.content) < 2000


@pytest.mark.parametrize(
    "limit", ["0", "-1", "1001", "1" + "0" * 30, "1" + "0" * 5000, "1e3", "", "NaN", "\N{ARABIC-INDIC DIGIT FIVE}\x00"]
)
@pytest.mark.parametrize("path", LISTS)
def test_a_page_size_out_of_range_is_named(api: TestClient, path: str, limit: str):
    found = assert_problem(api.get(path, params={"limit": limit}), 422, "invalid-input")
    assert [error["field"] for error in found["errors"]] == ["limit"]


@pytest.mark.parametrize(
    "position",
    [
        [], [None], [-1], [10**30], [2**63], [2**31], [1.5], [True], ["x"], [[1]], [{}], [1, 2, 3],
        ["0001-01-01T00:00:00", "x"], ["9999-12-31T23:59:59+00:00", "\x00"], ["not a day", MISSING],
        ["2026-01-01", "' OR 1=1 --"], ["2026-01-01", 5], ["2026-01-01", []],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "route",
    ["/v1/collections", "/v1/collections/{}/images", "/v1/collections/{}/runs", "/v1/collections/{}/uploads"],
)
def test_a_forged_cursor_is_refused_or_ends_the_list(api: TestClient, collection: str, route: str, position: list):
    answer = api.get(route.format(collection), params={"cursor": encode(position)})
    if answer.status_code != 200:
        assert_problem(answer, 422, "invalid-cursor")


@pytest.mark.parametrize(
    "year", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+23:59"]
)
def test_a_cursor_of_another_age_is_refused_or_ends_the_list(api: TestClient, year: str):
    answer = api.get("/v1/collections", params={"cursor": encode([year, MISSING])})
    if answer.status_code != 200:
        assert_problem(answer, 422, "invalid-cursor")


@pytest.mark.parametrize(
    "identity", ["x", "0", "-1", "%00", "..%2f..", "'", "0" * 5000, "%ed%a0%80", "\N{SNOWMAN}", "1e400"]
)
@pytest.mark.parametrize(
    "path", ["/v1/collections/{}", "/v1/uploads/{}", "/v1/runs/{}", "/v1/images/{}/thumbnail", "/v1/runs/{}/labels.csv"]
)
def test_an_id_that_is_none_is_refused(api: TestClient, path: str, identity: str):
    answer = api.get(path.format(identity))
    assert answer.status_code in (404, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    json.loads(answer.content)


@pytest.mark.parametrize("number", ["-1", "4096", "1" + "0" * 30, "x", "1.5", "%00"])
def test_a_cluster_number_out_of_range_is_named(api: TestClient, number: str):
    answer = api.get(f"/v1/runs/{MISSING}/clusters/{number}")
    assert [error["field"] for error in assert_problem(answer, 422, "invalid-input")["errors"]] == ["cluster"]


@pytest.mark.parametrize("key", ["", " ", "x" * 201, "a\tb", "\x7f", "\xff"])
def test_an_idempotency_key_out_of_range_is_named(api: TestClient, key: str):
    answer = api.post("/v1/collections", json={"name": "x"}, headers=[(b"Idempotency-Key", key.encode("latin-1"))])
    if key == "\xff":
        assert answer.status_code == 201
    elif key == " ":
        assert answer.status_code in (201, 422)
    else:
        assert answer.status_code == 422


@pytest.mark.parametrize("says_its_size", [True, False])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "text/plain"])
def test_a_body_beyond_the_limit_is_not_read_into_memory(api: TestClient, says_its_size: object, kind: str):
    limit = settings().max_body_bytes

    def body() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * (limit // 8)

    content = b" " * (limit + 1) if says_its_size else body()
    answer = api.post("/v1/collections", content=content, headers={"Content-Type": kind})
    assert str(limit) in assert_problem(answer, 413, "body-too-large")["detail"]


@pytest.mark.parametrize("length", ["9" * 400, "-5", "1e9", "\xb2"])
def test_a_length_that_is_no_number_of_bytes(api: TestClient, length: str):
    answer = api.post(
        "/v1/collections",
        content=b'{"name": "x"}',
        headers=[(b"Content-Type", b"application/json"), (b"Content-Length", length.encode("latin-1"))],
    )
    assert answer.status_code in (201, 413)


def test_an_upload_may_be_larger_than_other_bodies_and_has_a_limit(
    api: TestClient, collection: str, monkeypatch: pytest.MonkeyPatch
):
    content = zip_of({"a.png": picture(1), "noise": bytes(2 * settings().max_body_bytes)})
    path = f"/v1/collections/{collection}/uploads"
    assert api.post(path, files={"file": ("a.zip", content)}).status_code == 202
    monkeypatch.setenv("KINDRED_MAX_UPLOAD_BYTES", "100000")
    settings.cache_clear()
    with TestClient(create_app(), base_url="http://localhost") as limited:
        found = assert_problem(limited.post(path, files={"file": ("a.zip", content)}), 413, "upload-too-large")
    assert "100000 bytes" in found["detail"]
