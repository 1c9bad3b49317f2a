"""The API over real PostgreSQL and a real broker; what needs a worker is in tests/e2e."""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from app.config import settings
from app.db.session import open_session
from tests.pictures import picture, zip_of

MISSING = str(uuid.UUID(int=7))


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def rows(table: str) -> int:
    with open_session() as session:
        return int(session.execute(text(f"SELECT count(*) FROM {table}")).scalar_one())


def assert_problem(answer, status: int, code: str) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["type"] == f"/problems/{code}"
    assert body["status"] == status
    return body


def archive() -> tuple[str, bytes, str]:
    return ("pictures.zip", zip_of({"a/1.png": picture(1), "b/2.png": picture(2)}), "application/zip")


def listed(api: TestClient, path: str) -> list[str]:
    """The ids in a list, read two at a time."""
    seen, cursor = [], None
    while True:
        page = api.get(path, params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        assert len(page["items"]) <= 2
        seen += [item["id"] for item in page["items"]]
        cursor = page["next"]
        if cursor is None:
            return seen


def test_collections_come_newest_first_in_pages(api: TestClient):
    made = [api.post("/v1/collections", json={"name": f"c{n}"}).json()["id"] for n in range(5)]
    assert listed(api, "/v1/collections") == made[::-1]


def test_uploads_of_a_collection_come_newest_first_in_pages(api: TestClient):
    links, other = (api.post("/v1/collections", json={"name": name}).json()["links"] for name in "ab")
    made = [api.post(links["uploads"], files={"file": archive()}).json()["id"] for _ in range(5)]
    api.post(other["uploads"], files={"file": archive()})
    assert listed(api, links["uploads"]) == made[::-1]
    (first,) = api.get(links["uploads"], params={"limit": 1}).json()["items"]
    assert first == api.get(first["links"]["self"]).json()


def test_a_created_collection_is_where_location_says(api: TestClient):
    answer = api.post("/v1/collections", json={"name": " Ferien \N{SNOWMAN} "})
    assert answer.status_code == 201
    found = api.get(answer.headers["location"]).json()
    assert (found["name"], found["images"]) == ("Ferien \N{SNOWMAN}", 0)


@pytest.mark.parametrize("name", ["", "   ", "x" * 201, "a\x00b", "a\nb", "\u200b", "a\u202eb"])
def test_a_bad_name_is_named(api: TestClient, name: str):
    body = assert_problem(api.post("/v1/collections", json={"name": name}), 422, "invalid-input")
    assert body["errors"][0]["field"] == "name"


@pytest.mark.parametrize("cursor", ["x", "WzFd", "bnVsbA", "W251bGwsbnVsbF0", "\N{SNOWMAN}"])
def test_a_foreign_cursor_is_refused(api: TestClient, cursor: str):
    assert_problem(api.get("/v1/collections", params={"cursor": cursor}), 422, "invalid-cursor")


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", f"/v1/collections/{MISSING}", "collection-not-found"),
        ("DELETE", f"/v1/collections/{MISSING}", "collection-not-found"),
        ("GET", f"/v1/collections/{MISSING}/images", "collection-not-found"),
        ("GET", f"/v1/collections/{MISSING}/runs", "collection-not-found"),
        ("GET", f"/v1/collections/{MISSING}/uploads", "collection-not-found"),
        ("GET", f"/v1/uploads/{MISSING}", "upload-not-found"),
        ("GET", f"/v1/uploads/{MISSING}/files", "upload-not-found"),
        ("GET", f"/v1/uploads/{MISSING}/files.csv", "upload-not-found"),
        ("GET", f"/v1/images/{MISSING}/thumbnail", "image-not-found"),
        ("GET", f"/v1/images/{MISSING}/original", "image-not-found"),
        ("GET", f"/v1/runs/{MISSING}", "run-not-found"),
        ("POST", f"/v1/runs/{MISSING}/cancel", "run-not-found"),
        ("GET", f"/v1/runs/{MISSING}/events", "run-not-found"),
        ("GET", f"/v1/runs/{MISSING}/clusters", "run-not-found"),
        ("GET", f"/v1/runs/{MISSING}/labels.csv", "run-not-found"),
        ("GET", f"/v1/runs/{MISSING}/labels.json", "run-not-found"),
        ("GET", f"/v1/runs/{MISSING}/levels.csv", "run-not-found"),
        ("GET", f"/v1/runs/{MISSING}/report", "run-not-found"),
    ],
)
def test_what_does_not_exist_is_named(api: TestClient, method: str, path: str, code: str):
    assert MISSING in assert_problem(api.request(method, path), 404, code)["detail"]


def test_an_upload_to_a_missing_collection_keeps_nothing(api: TestClient):
    answer = api.post(f"/v1/collections/{MISSING}/uploads", files={"file": archive()})
    assert_problem(answer, 404, "collection-not-found")
    assert files_below(settings().data_dir) == []


def test_the_one_shot_makes_collection_upload_and_run(api: TestClient):
    answer = api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "2", "truth": "folder"})
    assert answer.status_code == 202
    assert answer.headers["retry-after"] == "1"
    run = api.get(answer.headers["location"]).json()
    assert run["state"] == "queued"
    assert run["parameters"]["clusters"] == 2
    upload = api.get(run["links"]["upload"]).json()
    assert upload["state"] == "queued"
    assert api.get(run["links"]["collection"]).json()["name"] == "pictures"
    assert [path.read_bytes() for path in files_below(settings().data_dir)] == [archive()[1]]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "clusters"),
        ({"clusters": "1"}, "clusters"),
        ({"clusters": "4097"}, "clusters"),
        ({"clusters": "many"}, "clusters"),
        ({"clusters": "2", "method": "magic"}, "method"),
        ({"clusters": "2", "backbone": "resnet9000"}, "backbone"),
        ({"clusters": "2", "truth": "filename"}, "truth"),
        ({"clusters": "2", "seed": "-1"}, "seed"),
        ({"clusters": "2", "colour": "blue"}, "colour"),
    ],
)
def test_bad_parameters_are_named_and_nothing_remains(api: TestClient, fields: dict, field: str):
    answer = api.post("/v1/cluster", files={"file": archive()}, data=fields)
    body = assert_problem(answer, 422, "invalid-input")
    assert [error["field"] for error in body["errors"]] == [field]
    assert files_below(settings().data_dir) == []
    assert (rows("collections"), rows("uploads"), rows("runs")) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("notes.txt", b"hello", "notes.txt is not an archive"), ("empty.zip", b"", "empty.zip is empty")],
)
def test_one_file_that_is_nothing_to_read_is_refused_at_once(api: TestClient, name: str, content: bytes, words: str):
    answer = api.post("/v1/cluster", files={"file": (name, content)}, data={"clusters": "2"})
    assert words in assert_problem(answer, 422, "not-an-archive")["detail"]
    assert files_below(settings().data_dir) == []


def test_a_request_without_files_is_refused(api: TestClient):
    boundary = "abc"
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="clusters"\r\n\r\n2\r\n--{boundary}--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    assert_problem(api.post("/v1/cluster", content=body, headers=headers), 422, "no-files")
    assert_problem(api.post("/v1/cluster", content=body[:-9], headers=headers), 422, "broken-multipart")
    assert_problem(api.post("/v1/cluster", content=b"{}"), 422, "not-multipart")
    assert files_below(settings().data_dir) == []


def test_too_many_bytes_are_refused_with_the_limit(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINDRED_MAX_UPLOAD_BYTES", "1000")
    settings.cache_clear()
    answer = api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "2"})
    assert "1000 bytes" in assert_problem(answer, 413, "upload-too-large")["detail"]

    def undeclared():
        yield b'--abc\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'
        yield b"x" * 2000

    headers = {"Content-Type": "multipart/form-data; boundary=abc"}
    answer = api.post("/v1/cluster", content=undeclared(), headers=headers)
    assert_problem(answer, 413, "upload-too-large")
    assert files_below(settings().data_dir) == []


def test_many_image_parts_keep_names_and_bytes(api: TestClient):
    names = ["plain.png", "a b/c d.png", "\N{CJK UNIFIED IDEOGRAPH-732B}/\N{SNOWMAN}.png", 'quo"te.png']
    pictures = [picture(number) for number in range(len(names))]
    files = [("file", (name, content, "image/png")) for name, content in zip(names, pictures, strict=True)]
    collection = api.post("/v1/collections", json={"name": "parts"}).json()
    upload = api.post(f"{collection['links']['uploads']}", files=files)
    assert upload.status_code == 202
    with open_session() as session:
        parts = session.execute(text("SELECT filename FROM upload_parts ORDER BY part")).scalars().all()
    assert [name.replace("%22", '"') for name in parts] == names
    stored = sorted(files_below(settings().data_dir))
    assert [path.read_bytes() for path in stored] == pictures


def test_an_idempotency_key_creates_once(api: TestClient):
    headers = {"Idempotency-Key": "k-1"}
    request = {"files": {"file": archive()}, "data": {"clusters": "2"}, "headers": headers}
    first, second = api.post("/v1/cluster", **request), api.post("/v1/cluster", **request)
    assert first.status_code == second.status_code == 202
    assert first.json()["id"] == second.json()["id"]
    assert first.headers["location"] == second.headers["location"]
    assert rows("runs") == 1
    other = api.post("/v1/collections", json={"name": "x"}, headers=headers)
    assert_problem(other, 409, "idempotency-key-reused")


def test_an_idempotency_key_is_new_again_after_a_day(api: TestClient):
    request = {"files": {"file": archive()}, "data": {"clusters": "2"}, "headers": {"Idempotency-Key": "k-1"}}
    first = api.post("/v1/cluster", **request)
    with open_session() as session:
        session.execute(text("UPDATE idempotency_keys SET created_at = created_at - interval '25 hours'"))
        session.commit()
    second = api.post("/v1/cluster", **request)
    assert second.status_code == 202, second.text
    assert first.json()["id"] != second.json()["id"]
    assert rows("idempotency_keys") == 1


def test_a_run_needs_images_that_are_there(api: TestClient):
    collection = api.post("/v1/collections", json={"name": "empty"}).json()
    path = collection["links"]["runs"]
    body = assert_problem(api.post(path, json={"clusters": 3}), 422, "too-few-images")
    assert "3" in body["detail"]
    assert "0" in body["detail"]
    upload = api.post(collection["links"]["uploads"], files={"file": archive()}).json()
    body = assert_problem(api.post(path, json={"clusters": 2}), 409, "collection-busy")
    assert upload["id"] in body["detail"]
    assert_problem(api.delete(collection["links"]["self"]), 409, "collection-busy")


def test_a_queued_run_is_cancelled_at_once_and_stays_so(api: TestClient):
    run = api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "2"}).json()
    answer = api.post(run["links"]["cancel"])
    assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
    assert api.post(run["links"]["cancel"]).json()["state"] == "cancelled"
    assert_problem(api.get(f"{run['links']['self']}/labels.csv"), 409, "run-without-results")
    with api.stream("GET", run["links"]["events"]) as stream:
        text_ = "".join(stream.iter_text())
    assert text_.startswith("event: end\ndata: ")
    assert json.loads(text_.split("data: ")[1])["state"] == "cancelled"


def test_those_who_watch_a_run_keep_no_connection_of_the_database(api: TestClient):
    """The pool has twenty; a page that watches a run must not cost one."""
    run = api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "2"}).json()
    with ThreadPoolExecutor(30) as pool:
        watched = [pool.submit(lambda: api.get(run["links"]["events"]).text) for _ in range(30)]
        try:
            for _ in range(20):
                assert api.get("/v1/collections").status_code == 200
        finally:
            api.post(run["links"]["cancel"])
        assert all("event: end" in each.result() for each in watched)


def test_submitting_works_while_the_broker_is_away(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    from app import queue

    monkeypatch.setenv("KINDRED_BROKER_URL", "redis://127.0.0.1:1/0")
    settings.cache_clear()
    queue._celery.cache_clear()
    answer = api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "2"})
    assert answer.status_code == 202
    assert rows("runs") == 1


def test_a_path_that_is_nothing_and_a_wrong_method(api: TestClient):
    assert_problem(api.get("/v1/nothing"), 404, "no-such-page")
    answer = api.put("/v1/collections")
    body = assert_problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "GET, HEAD, POST"
    assert body["detail"] == "/v1/collections answers to GET, HEAD, POST alone, not to PUT."
    assert api.put("/").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/v1/collections", "/openapi.json", "/static/style.css", "/v1/nothing"]
)
def test_head_is_answered_as_get_without_the_body(api: TestClient, path: str):
    head, get = api.head(path), api.get(path)
    assert head.status_code == get.status_code
    assert head.content == b""
    asked = ("content-type", "content-length", "cache-control", "content-security-policy")
    assert {name: head.headers.get(name) for name in asked} == {name: get.headers.get(name) for name in asked}


def test_head_of_a_stream_ends(api: TestClient):
    run = api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "2"}).json()
    answer = api.head(run["links"]["events"])
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"].startswith("text/event-stream")


def test_parameters_are_asked_about_before_anything_is_sent(api: TestClient):
    answer = api.post("/v1/parameters", json={"clusters": "auto", "method": "simclr", "weights": "random"})
    body = assert_problem(answer, 422, "invalid-input")
    assert [error["field"] for error in body["errors"]] == ["weights"]
    answer = api.post("/v1/parameters", json={"clusters": 2, "weights": "none.safetensors"})
    assert_problem(answer, 422, "weights-not-found")
    answer = api.post("/v1/parameters", json={"clusters": "3"})
    assert answer.status_code == 200
    assert (answer.json()["clusters"], answer.json()["backbone"]) == (3, "efficientnet_lite0")
    assert rows("runs") == 0


def test_a_body_that_is_no_json_is_said_to_be_none(api: TestClient):
    answer = api.post("/v1/collections", content=b'{"name": "a', headers={"Content-Type": "application/json"})
    body = assert_problem(answer, 422, "invalid-input")
    assert [error["field"] for error in body["errors"]] == ["body"]
    assert body["detail"].startswith("body: is not JSON: ")


def test_a_form_field_that_comes_twice_is_refused(api: TestClient):
    form = [("clusters", (None, "2")), ("clusters", (None, "3")), ("file", archive())]
    body = assert_problem(api.post("/v1/cluster", files=form), 422, "invalid-input")
    assert body["errors"] == [{"field": "clusters", "message": "must be sent once"}]


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("Holiday 2026/notes.txt", "Holiday 2026"),
        ("photos.tar.gz", "photos"),
        ("a.png", "a.png"),
        (".zip", "images"),
        ("a\u202e/1.png", "a"),
    ],
)
def test_a_collection_is_called_after_the_folder_or_the_archive(api: TestClient, filename: str, name: str):
    answer = api.post("/v1/cluster", files={"file": (filename, archive()[1])}, data={"clusters": "2"})
    assert api.get(answer.json()["links"]["collection"]).json()["name"] == name


def test_a_collection_of_loose_pictures_says_how_many(api: TestClient):
    files = [("file", (f"{n}.png", picture(n))) for n in range(3)]
    answer = api.post("/v1/cluster", files=files, data={"clusters": "2"})
    assert api.get(answer.json()["links"]["collection"]).json()["name"] == "3 images"


def test_health_and_readiness(api: TestClient):
    assert api.get("/healthz").json() == {"status": "ok"}
    assert api.get("/readyz").json() == {"status": "ok", "broker": "ok"}


def test_every_route_of_the_contract_is_documented(api: TestClient):
    paths = api.get("/openapi.json").json()["paths"]
    for path in (
        "/v1/cluster",
        "/v1/parameters",
        "/v1/collections",
        "/v1/collections/{collection_id}",
        "/v1/collections/{collection_id}/uploads",
        "/v1/uploads/{upload_id}",
        "/v1/uploads/{upload_id}/files",
        "/v1/collections/{collection_id}/images",
        "/v1/images/{image_id}/thumbnail",
        "/v1/images/{image_id}/original",
        "/v1/collections/{collection_id}/runs",
        "/v1/runs/{run_id}",
        "/v1/runs/{run_id}/cancel",
        "/v1/runs/{run_id}/events",
        "/v1/runs/{run_id}/clusters",
        "/v1/runs/{run_id}/clusters/{cluster}",
        "/v1/runs/{run_id}/clusters/{cluster}/images",
        "/v1/runs/{run_id}/labels.json",
        "/v1/runs/{run_id}/labels.csv",
        "/v1/runs/{run_id}/levels.csv",
        "/v1/runs/{run_id}/report",
    ):
        assert path in paths
