"""What goes out: pictures without metadata, files to be saved, tables that run nothing, headers on all of it."""

import csv
import io
import json
import os
import re
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from urllib.parse import unquote

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from sqlalchemy import text
from sqlalchemy.orm import Session

from app import storage
from app.config import settings
from app.db.session import open_session
from app.headers import HEADERS, attachment, image_name
from app.main import create_app
from app.services import collections, results, tabular
from app.services.collections import remove
from app.services.results import labels_csv, labels_json
from benchmarks.export import written
from tests.app.test_api import assert_problem, files_below
from tests.app.test_web import METRICS, PAGE, finished_run, pages_of
from tests.pictures import picture, zip_of
from tests.waiting import wait_for
from worker.ingest import ingest
from worker.sweep import remove_leftovers

SECRET = b"51 deg 28' 38\" N, the house of Ada"
RISKY = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'quoted", "''", "\N{FULLWIDTH EQUALS SIGN}1"]
PLAIN = ["a.png", "a=b.png", " =1", "\N{SNOWMAN}.png", 'quo"te,;.png', "0"]


def with_metadata() -> bytes:
    """A JPEG that says where it was taken in every place that a JPEG has for it."""
    image = Image.open(io.BytesIO(picture(1, size=(300, 200), encoding="PNG")))
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = SECRET.decode()
    exif[ExifTags.Base.Artist] = SECRET.decode()
    exif.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (51.0, 28.0, 38.0), 29: SECRET.decode()})
    buffer = io.BytesIO()
    image.save(
        buffer, "JPEG", exif=exif, comment=SECRET, xmp=b"<x:xmpmeta>" + SECRET + b"</x:xmpmeta>", icc_profile=SECRET
    )
    return buffer.getvalue()


def taken_in(api: TestClient, name: str, content: bytes) -> dict:
    """An image of a collection of its own, by the real ingest."""
    collection = api.post("/v1/collections", json={"name": "x"}).json()
    upload = api.post(collection["links"]["uploads"], files={"file": ("p.zip", zip_of({name: content}))}).json()
    ingest(uuid.UUID(upload["id"]), threading.Event())
    return api.get(collection["links"]["images"]).json()["items"][0]


def test_a_thumbnail_keeps_nothing_that_the_file_said_of_itself(api: TestClient):
    sent = with_metadata()
    assert sent.count(SECRET) >= 5
    image = taken_in(api, "a.jpg", sent)
    answer = api.get(f"/v1/images/{image['id']}/thumbnail")
    assert answer.headers["content-type"] == "image/jpeg"
    assert SECRET not in answer.content
    served = Image.open(io.BytesIO(answer.content))
    assert served.getexif() == {}
    assert not {"exif", "comment", "xmp", "icc_profile", "photoshop"} & served.info.keys()
    again = api.get(f"/v1/images/{image['id']}/thumbnail", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    # The file itself is given back as it came.
    assert api.get(f"/v1/images/{image['id']}/original").content == sent


def test_a_picture_whose_file_is_gone_is_not_there(api: TestClient):
    image = taken_in(api, "a.png", picture(1))
    for path in (settings().data_dir / "collections").rglob("*"):
        if path.is_file():
            path.unlink()
    for what in ("thumbnail", "original"):
        assert_problem(api.get(f"/v1/images/{image['id']}/{what}"), 404, "image-not-found")


def test_what_a_killed_deletion_left_is_swept_up(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    taken_in(api, "a.png", picture(1))
    collection = api.get("/v1/collections").json()["items"][0]
    with monkeypatch.context() as killed:
        killed.setattr(storage, "remove", lambda _path: None)
        assert api.delete(collection["links"]["self"]).status_code == 204
    left = settings().data_dir / "deleted"
    assert [path for path in left.rglob("*") if path.is_file()]
    assert not list((settings().data_dir / "collections").iterdir())
    remove_leftovers()
    assert not list(left.iterdir())


def test_a_deletion_that_ended_before_its_files_did_is_carried_out(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    """By whoever sweeps; and folders whose rows are in no such plan stay, whatever the database says of them."""
    taken_in(api, "a.png", picture(1))
    collection = api.get("/v1/collections").json()["items"][0]
    run = settings().data_dir / "runs" / str(uuid.uuid4())
    stranger = settings().data_dir / "collections" / str(uuid.uuid4())
    for folder in (run, stranger):
        folder.mkdir(parents=True)
        (folder / "levels.csv").write_text("a.png")
    monkeypatch.setattr(collections, "remove", lambda *given: [*remove(*given), uuid.UUID(run.name)])
    with monkeypatch.context() as killed:
        killed.setattr(storage, "carry_out", lambda *_given: [])
        assert api.delete(collection["links"]["self"]).status_code == 204
    assert (settings().data_dir / "collections" / collection["id"]).exists()
    remove_leftovers()
    assert not (settings().data_dir / "collections" / collection["id"]).exists()
    assert not run.exists()
    assert stranger.exists()
    assert list(storage.all_deletions()) == []


def test_a_deletion_that_was_not_committed_takes_nothing(api: TestClient):
    image = taken_in(api, "a.png", picture(1))
    collection = api.get("/v1/collections").json()["items"][0]
    with pytest.raises(RuntimeError), storage.deletion(uuid.UUID(collection["id"]), []):
        raise RuntimeError("the commit failed")
    remove_leftovers()
    assert len(list(storage.all_deletions())) == 1  # it may be about to be committed
    os.utime(settings().data_dir / "deletions" / collection["id"], (0, 0))
    remove_leftovers()
    assert list(storage.all_deletions()) == []
    assert api.get(f"/v1/images/{image['id']}/original").status_code == 200


def test_an_original_is_saved_and_never_shown(api: TestClient):
    name = "ordner/<script>alert(1)<\N{SNOWMAN}>.html"
    image = taken_in(api, name, picture(1))
    answer = api.get(f"/v1/images/{image['id']}/original")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert answer.headers["cache-control"].startswith("private")
    disposition = answer.headers["content-disposition"]
    assert disposition.startswith("attachment; ")
    assert "filename*=UTF-8''_script_alert%281%29_%E2%98%83_.html.png" in disposition


@pytest.mark.parametrize(
    ("path", "image_format", "name"),
    [
        ("a/b/photo.JPG", "JPEG", "photo.JPG"),
        ("photo.png", "JPEG", "photo.png.jpg"),
        ("x.html", "PNG", "x.html.png"),
        ("x.exe", "GIF", "x.exe.gif"),
        ("..", "PNG", "image.png"),
        ("a/..\\..\\x.png", "PNG", "x.png"),
        ("C:evil.png", "PNG", "C_evil.png"),
        ("a\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe", "JPEG", "agpj.exe.jpg"),
        ("a\r\nSet-Cookie: x=1.png", "PNG", "aSet-Cookie_ x=1.png"),
        ("n" * 300 + ".png", "PNG", "n" * 146 + ".png"),
        ("x" * 300, "WEBP", "x" * 144 + ".webp"),
        ("", "BMP", "image.bmp"),
    ],
)
def test_the_name_to_save_an_image_as_is_harmless(path: str, image_format: str, name: str):
    assert image_name(path, image_format) == name


@given(st.text(max_size=60))
def test_a_disposition_says_one_name_and_nothing_else(name: str):
    name = name.encode("utf-8", "replace").decode()
    header = attachment(name)
    assert header.isascii()
    assert header.isprintable()
    message = Message()
    message["Content-Disposition"] = header
    assert message.get_content_disposition() == "attachment"
    plain, encoded = header.removeprefix("attachment; ").split("; filename*=")
    assert re.fullmatch(r'filename="[A-Za-z0-9 ._()+=,-]+"', plain)
    assert re.fullmatch(r"UTF-8''[A-Za-z0-9_.~%-]*", encoded)
    assert unquote(encoded.removeprefix("UTF-8''")) == name


@given(st.text())
def test_a_text_comes_back_from_a_table_as_it_was(value: str):
    assert tabular.original(tabular.safe(value)) == value
    assert not tabular.safe(value).startswith(("=", "+", "-", "@", "\t", "\r", "\n"))


def test_names_are_no_formulas_in_csv_and_exact_in_json(api: TestClient):
    names = RISKY + PLAIN
    run = finished_run(images=len(names), metrics=METRICS)
    with open_session() as session:
        for number, name in enumerate(names):
            session.execute(
                text("UPDATE images SET filename = :name WHERE sha256 = :sha256"),
                {"name": name, "sha256": f"{number:064d}"},
            )
        session.execute(text("UPDATE clusters SET name = '=HYPERLINK(1)' WHERE cluster = 0"))
        session.execute(text("UPDATE upload_files SET filename = '@x', reason = '=y'"))
        session.commit()
    labels = list(csv.DictReader(io.StringIO(api.get(f"/v1/runs/{run.id}/labels.csv").text, newline="")))
    assert [row["filename"] for row in labels] == [f"'{name}" for name in RISKY] + PLAIN
    assert [tabular.original(row["filename"]) for row in labels] == names
    assert labels[0]["cluster_name"] == "'=HYPERLINK(1)"
    ledger = next(csv.DictReader(io.StringIO(api.get(f"/v1/uploads/{run.upload_id}/files.csv").text)))
    assert (ledger["filename"], ledger["reason"]) == ("'@x", "'=y")
    exact = api.get(f"/v1/runs/{run.id}/labels.json").json()["items"]
    assert [row["filename"] for row in exact] == names


def test_a_table_may_begin_so_that_excel_knows_its_letters(api: TestClient):
    run = finished_run(metrics=METRICS)
    for path in (f"/v1/runs/{run.id}/labels.csv", f"/v1/uploads/{run.upload_id}/files.csv"):
        plain, marked = api.get(path), api.get(path, params={"bom": "true"})
        assert marked.content == b"\xef\xbb\xbf" + plain.content
        assert int(marked.headers["content-length"]) == len(marked.content)
        assert plain.headers.get("etag") != marked.headers.get("etag") or "etag" not in plain.headers
        assert f"{path}?bom=true" in api.get(path.replace("/v1", "").rpartition("/")[0], headers=PAGE).text


def test_every_answer_says_what_a_browser_may_do_with_it(api: TestClient):
    run = finished_run(metrics=METRICS)
    storage.levels(run.id).parent.mkdir(parents=True)
    storage.levels(run.id).write_text("image_id\n")
    paths = [
        *pages_of(run), "/nothing", "/v1/nothing", "/healthz", "/readyz", "/openapi.json", "/docs", "/static/style.css",
        "/static/icon.svg", "/v1/collections", f"/v1/runs/{run.id}/labels.csv", f"/v1/runs/{run.id}/labels.json",
        f"/v1/runs/{run.id}/levels.csv", f"/v1/runs/{run.id}/clusters", "/sign-in",
    ]  # fmt: skip
    for path in paths:
        for headers in (PAGE, {}):
            answer = api.get(path, headers=headers, follow_redirects=False)
            assert HEADERS.keys() <= {name.title() for name in answer.headers} | {"X-Frame-Options"}, path
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"
            if not path.startswith("/static/"):
                assert answer.headers["cache-control"].startswith(("private", "no-store")), path


def test_what_fails_says_it_too(database: None, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("app.services.collections.list_page", broken)
    http = TestClient(create_app(), base_url="http://localhost", raise_server_exceptions=False)
    for answer in (
        http.get("/v1/collections"),
        http.get("/", headers=PAGE),
        http.post("/v1/collections", headers={"Origin": "https://evil.example"}),
    ):
        assert answer.status_code in (403, 500)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_the_report_of_a_run_is_json_whatever_it_says(api: TestClient):
    run = finished_run(metrics=METRICS)
    answer = api.get(f"/v1/runs/{run.id}/report")
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.text)["metrics"]["warnings"]


def test_a_table_is_whole_before_the_first_byte_is_sent(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "SCRATCH_IN_MEMORY", 1000)  # the rest goes to the disk
    run = finished_run(images=50, metrics=METRICS)
    answer = api.get(f"/v1/runs/{run.id}/labels.csv")
    assert int(answer.headers["content-length"]) == len(answer.content) > 1000
    assert len(answer.text.splitlines()) == 51
    assert files_below(settings().data_dir) == []

    with Path("/dev/full").open("w+b", buffering=0) as full:
        monkeypatch.setattr(storage, "scratch", lambda: full)
        assert_problem(api.get(f"/v1/runs/{run.id}/labels.json"), 507, "storage-full")


def terminated(statement: str) -> int:
    """How many connections were at work on such a statement, and are no more."""
    query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE state = 'active' AND query LIKE :like"
    with open_session() as session:
        return session.execute(text(query + " AND pid <> pg_backend_pid()"), {"like": statement}).scalar_one()


def test_a_table_whose_database_goes_away_is_a_problem(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    run = finished_run(images=50, metrics=METRICS)
    path = f"/v1/runs/{run.id}/labels.json"
    whole = api.get(path).content
    with monkeypatch.context() as slow, ThreadPoolExecutor(1) as pool:
        slow.setattr("app.services.results.LABELS", "SELECT pg_sleep(60)")
        answer = pool.submit(api.get, path)
        wait_for(lambda: terminated("COPY%pg_sleep(60)%"))
        assert_problem(answer.result(), 503, "database-away")
    assert api.get(path).content == whole


def is_served(pid: int) -> bool:
    with open_session() as session:
        return session.scalar(text("SELECT true FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid}) is not None


def test_a_request_that_the_database_gave_up_is_a_problem(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    """Of a transaction that did nothing for too long the server says so by an error of another kind."""
    run = finished_run(metrics=METRICS)

    def too_slow(session: Session, *_given: object) -> None:
        pid = session.scalar(text("SELECT pg_backend_pid()"))
        session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '1ms'"))
        wait_for(lambda: not is_served(pid))
        session.scalar(text("SELECT 1"))

    monkeypatch.setattr(results, "clusters", too_slow)
    assert_problem(api.get(f"/v1/runs/{run.id}/clusters"), 503, "database-away")


def test_a_large_table_is_sent_in_small_blocks(database: None):
    """Row by row each would wait for a thread, and all at once they would fill the memory."""
    run_id = written(str(settings().database_url).replace("+psycopg", ""), 20_000)
    with open_session() as session:
        as_csv, as_json = list(labels_csv(session, run_id)), list(labels_json(session, run_id))
    for blocks in (as_csv, as_json):
        assert 20 <= len(blocks) <= 25
        assert max(map(len, blocks)) < 512 * 1024
    labels = list(csv.DictReader(io.StringIO(b"".join(as_csv).decode(), newline="")))
    exact = json.loads(b"".join(as_json))
    assert exact["run_id"] == str(run_id)
    assert [row["image_id"] for row in labels] == [row["image_id"] for row in exact["items"]]
    assert [row["filename"].split("_")[-1] for row in labels] == [f"{number}.jpg" for number in range(1, 20_001)]
    assert {row["cluster_name"] for row in labels if row["cluster"] == "7"} == {"Group 7"}
