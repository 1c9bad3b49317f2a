"""The pages on real rows; what needs a worker and a browser is in tests/e2e."""

import re
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import cast, func, text, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import OperationalError
from starlette.datastructures import Headers

from app import storage
from app.db.session import open_session
from app.db.tables import Collection, Image, Run, Upload, UploadFile
from app.main import create_app
from app.services import collections, results
from app.services.parameters import TRAIN_OF_METHOD
from app.web.guard import comes_from_here
from app.web.pages import JOBS_A_PAGE
from tests.pictures import picture, zip_of

HOSTILE = "<script>alert('1')</script>/\"onerror=alert(2) x=.png"
MISSING = str(uuid.UUID(int=7))
PAGE = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture
def browser(api: TestClient) -> TestClient:
    api.headers.update(PAGE)
    return api


def finished_run(*, images: int = 5, state: str = "succeeded", name: str = HOSTILE, **values) -> Run:
    """A run of two clusters over `images` pictures, the last of which is alone in the second, and doubted."""
    now = datetime.now(UTC)
    with open_session() as session:
        collection = Collection(id=uuid.uuid4(), name=name)
        session.add(collection)
        session.flush()
        upload = Upload(
            id=uuid.uuid4(), collection_id=collection.id, bytes=1000, state="succeeded", finished_at=now,
            received=images + 1, accepted=images, rejected=1,
        )  # fmt: skip
        session.add(upload)
        session.flush()
        rows = [
            Image(
                id=uuid.uuid4(), collection_id=collection.id, upload_id=upload.id, sha256=f"{number:064d}",
                filename=f"{number}{HOSTILE}", format="PNG", width=1, height=1, bytes=1,
            )
            for number in range(images)
        ]  # fmt: skip
        session.add_all(rows)
        session.add(
            UploadFile(
                upload_id=upload.id, position=0, filename=HOSTILE, bytes=1, outcome="rejected", reason_code="x",
                reason=HOSTILE,
            )
        )  # fmt: skip
        parameters = {"clusters": 2, "method": "scl", "seed": 0, "truth": "folder", "image_size": 224}
        run = Run(
            id=uuid.uuid4(), collection_id=collection.id, upload_id=upload.id, parameters=parameters, state=state,
            created_at=now, started_at=now,
            finished_at=None if state in collections.OPEN_STATES else now + timedelta(seconds=3),
            **values,
        )  # fmt: skip
        session.add(run)
        session.flush()
        if state == "succeeded":
            last = images - 1
            ids = [row.id for row in rows]
            results.store(
                session,
                run.id,
                [
                    results.ClusterRow(
                        cluster=0, name="Group 1", size=last, confidence=0.9, cohesion=0.8, representatives=ids[:8]
                    ),
                    results.ClusterRow(
                        cluster=1, name=HOSTILE, size=1, confidence=0.4, cohesion=None, representatives=ids[last:]
                    ),
                ],
                [
                    results.AssignmentRow(
                        position=number, image_id=identity, cluster=int(number == last),
                        rank=0 if number == last else number, confidence=0.4 if number == last else 0.9,
                        runner_up=int(number != last), margin=0.1, consensus=number != last,
                    )
                    for number, identity in enumerate(ids)
                ],
            )  # fmt: skip
        session.commit()
        return run


METRICS = {
    "sizes": [4, 1],
    "consensus_rate": 0.8,
    "quality": {"acc": 0.9712, "nmi": 0.5, "ari": 0.25},
    "baseline": {"quality": {"acc": 0.8124, "nmi": 0.4, "ari": 0.2}},
    "warnings": [{"code": "collapse", "message": HOSTILE}],
    "seconds": {"features": 1.5},
}


def pages_of(run: Run) -> list[str]:
    return [
        "/",
        f"/collections/{run.collection_id}",
        f"/uploads/{run.upload_id}",
        f"/uploads/{run.upload_id}?outcome=rejected",
        f"/runs/{run.id}",
        f"/runs/{run.id}/clusters/0",
        f"/runs/{run.id}/clusters/1",
    ]


def test_hostile_names_are_text_on_every_page(browser: TestClient):
    run = finished_run(metrics=METRICS)
    for path in pages_of(run):
        answer = browser.get(path)
        assert answer.status_code == 200, path
        assert "&lt;script&gt;alert(&#39;1&#39;)" in answer.text, path
        assert "<script>" not in answer.text, path
        for tag in re.findall(r"<[^>]*onerror[^>]*>", answer.text):
            outside_quotes = re.sub(r'"[^"]*"', "", tag)
            assert "onerror" not in outside_quotes, (path, tag)


def test_every_page_has_a_strict_policy_and_nothing_inline(browser: TestClient):
    run = finished_run(metrics=METRICS)
    for path in [*pages_of(run), "/nothing", f"/runs/{MISSING}"]:
        answer = browser.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<style|\sstyle=|\son\w+=[\"']?\w+\(|<script(?![^>]*\ssrc=)", answer.text), path


def test_every_link_and_file_of_the_pages_is_there(browser: TestClient):
    run = finished_run(metrics=METRICS)
    found = set()
    for path in pages_of(run):
        found |= set(re.findall(r'(?:href|src)="(/[^"]*)"', browser.get(path).text))
    for path in sorted(found):
        if "/thumbnail" not in path and "/original" not in path:  # these rows have no files
            assert browser.get(path).status_code == 200, path


def test_a_result_shows_quality_beside_the_baseline(browser: TestClient):
    run = finished_run(metrics=METRICS)
    page = browser.get(f"/runs/{run.id}").text
    assert "0.971" in page
    assert "0.812" in page
    assert "80.0%" in page
    assert page.count('class="panel card"') == 2
    assert f"/v1/runs/{run.id}/labels.csv" in page


def test_the_form_of_a_run_proposes_what_the_run_before_was_asked(browser: TestClient):
    asked = {
        "clusters": "auto",
        "method": "scl",
        "train": "full",
        "backbone": "timm/x.y",
        "weights": "net.pth",
        "seed": 3,
    }
    (storage.weights("net.pth").parent).mkdir(parents=True)
    storage.weights("net.pth").write_bytes(b"tensors")
    run = finished_run(metrics=METRICS | {"auto": {"clusters": 2}})
    with open_session() as session:
        session.execute(update(Run).values(parameters=Run.parameters.op("||")(cast(asked, JSONB))))
        session.commit()
    page = " ".join(browser.get(f"/runs/{run.id}").text.split())
    assert "2 clusters, found · SCL, whole network · seed 3" in page
    assert re.search(r'name="clusters"[^>]* value="2" required disabled>', page)
    assert re.search(r'type="checkbox" id="auto" name="clusters" value="auto"[^>]* checked>', page)
    assert '<option value="full" selected>' in page
    assert '<option value="net.pth" selected>' in page
    assert 'value="timm/x.y"' in page
    for method in TRAIN_OF_METHOD:
        assert page.count(f'<option value="{method}"') == 1


@pytest.mark.parametrize("unknown", [{}, {"quality": None, "baseline": None}])
def test_a_result_without_truth_or_baseline_is_shown_too(browser: TestClient, unknown: dict):
    run = finished_run(metrics={"sizes": [4, 1], **unknown})
    for path in pages_of(run):
        assert browser.get(path).status_code == 200, path
    page = browser.get(f"/runs/{run.id}").text
    assert "Quality" not in page
    assert page.count('class="panel card"') == 2


def test_members_come_in_pages_that_hold_each_once(browser: TestClient):
    run = finished_run(images=200, metrics=METRICS)
    seen, number = [], 1
    while True:
        answer = browser.get(f"/runs/{run.id}/clusters/0?page={number}")
        if answer.status_code == 404:
            break
        seen += re.findall(r'src="/v1/images/([^/]*)/thumbnail"', answer.text)
        ends = [word for word in ("First", "Last") if f">{word}</a>" in answer.text]
        assert ends == {1: ["Last"], 2: [], 3: ["First"]}[number]
        number += 1
    assert number == 4  # 199 images, 96 a page
    assert len(seen) == len(set(seen)) == 199


def test_an_image_without_consensus_is_marked_with_its_second_guess(browser: TestClient):
    run = finished_run(metrics=METRICS)
    assert "unsure" not in browser.get(f"/runs/{run.id}/clusters/0").text
    doubted = browser.get(f"/runs/{run.id}/clusters/1").text
    assert 'class="unsure"' in doubted
    assert "Group 1?" in doubted


def test_a_failed_run_says_why_and_a_cancelled_one_that_it_was(browser: TestClient):
    failed = finished_run(state="failed", problem={"code": "x", "detail": f"It broke: {HOSTILE}"})
    assert "It broke: &lt;script&gt;" in browser.get(f"/runs/{failed.id}").text
    cancelled = finished_run(state="cancelled")
    assert "was cancelled" in browser.get(f"/runs/{cancelled.id}").text


def test_an_open_run_shows_progress_and_the_counts_of_its_upload(browser: TestClient):
    files = {"file": ("p.zip", zip_of({"a.png": picture(1)}), "application/zip")}
    run = browser.post("/v1/cluster", files=files, data={"clusters": "2"}).json()
    page = browser.get(f"/runs/{run['id']}").text
    assert 'data-open="reload"' in page
    assert "Taking in images" in page
    with open_session() as session:
        session.execute(
            text(
                "UPDATE uploads SET state = 'running', received = 1234, accepted = 1200, rejected = 34,"
                " progress = 0.5, lease_until = now()"
            )
        )
        session.commit()
    page = browser.get(f"/runs/{run['id']}").text
    assert "1,234 files looked at · 1,200 accepted · 34 rejected" in " ".join(page.split())
    with open_session() as session:
        session.execute(text("UPDATE uploads SET state = 'succeeded', lease_until = NULL, finished_at = now()"))
        session.execute(
            text(
                "UPDATE runs SET state = 'running', stage = 'training', progress = 0.42, eta_s = 31,"
                " lease_until = now()"
            )
        )
        session.commit()
    for path in (f"/runs/{run['id']}", "/", run["links"]["collection"].removeprefix("/v1")):
        page = browser.get(path).text
        assert "Learning the clusters" in page
        assert "42%" in page
        assert "data-open" in page
    assert "about 30 s left" in browser.get(f"/runs/{run['id']}").text


def test_an_empty_service_says_what_to_do(browser: TestClient):
    page = browser.get("/").text
    assert "Nothing here yet" in page
    assert "data-open" not in page


def test_a_collection_s_uploads_come_in_pages(browser: TestClient):
    run = finished_run()
    with open_session() as session:
        session.add_all(
            Upload(id=uuid.uuid4(), collection_id=run.collection_id, bytes=1, state="succeeded", finished_at=func.now())
            for _ in range(JOBS_A_PAGE)
        )
        session.commit()
    path = f"/collections/{run.collection_id}"
    first = browser.get(path).text
    (further,) = re.findall(r'rel="next" href="([^"]+)"', first)
    assert further.endswith("#uploads-title")
    second = browser.get(further).text
    assert 'rel="next"' not in second
    assert f'href="{path}#uploads-title">First page</a>' in second
    seen = re.findall(r'id="upload-([^"]+)"', first + second)
    assert (len(seen), len(set(seen))) == (JOBS_A_PAGE + 1, JOBS_A_PAGE + 1)
    # Runs have a page of their own, and all of them are on the first.
    assert str(run.id) in first
    assert str(run.id) in second


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nothing", 404),
        ("/runs/nonsense", 404),
        (f"/runs/{MISSING}", 404),
        (f"/collections/{MISSING}", 404),
        (f"/uploads/{MISSING}", 404),
        (f"/runs/{MISSING}/clusters/0", 404),
        (f"/runs/{MISSING}/clusters/99999999999", 422),
        ("/?after=x", 422),
        (f"/uploads/{MISSING}?outcome=x", 422),
    ],
)
def test_what_is_not_there_is_a_page_for_browsers(browser: TestClient, path: str, status: int):
    answer = browser.get(path)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert 'href="/"' in answer.text


@pytest.mark.parametrize(
    ("error", "status"),
    [(OperationalError("SELECT 1", {}, Exception("secret")), 503), (RuntimeError("secret"), 500)],
)
def test_what_breaks_here_is_a_page_without_its_secrets(
    database: None, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
):
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(collections, "list_page", broken)
    answer = TestClient(create_app(), base_url="http://localhost", raise_server_exceptions=False).get("/", headers=PAGE)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "secret" not in answer.text
    assert ("retry-after" in answer.headers) == (status == 503)


def test_a_page_beyond_the_last_is_not_there(browser: TestClient):
    run = finished_run(metrics=METRICS)
    assert browser.get(f"/runs/{run.id}?page=2").status_code == 404


def test_the_clusters_of_an_unfinished_run_are_a_conflict_in_words(browser: TestClient):
    run = finished_run(state="cancelled")
    answer = browser.get(f"/runs/{run.id}/clusters/0")
    assert answer.status_code == 409
    assert "its state is cancelled" in answer.text


@pytest.mark.parametrize("path", [f"/v1/runs/{MISSING}", "/v1/runs/nonsense", "/v1/nothing"])
def test_the_api_answers_problems_whatever_is_accepted(browser: TestClient, path: str):
    answer = browser.get(path)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status_code


def test_clients_that_ask_for_no_page_get_problems(api: TestClient):
    assert api.get("/nothing").headers["content-type"] == "application/problem+json"


def test_pages_are_no_part_of_the_api_description(api: TestClient):
    rooms = ("/v1/", "/healthz", "/readyz", "/metrics")
    assert all(path.startswith(rooms) for path in api.get("/openapi.json").json()["paths"])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 201),
        ({"sec-fetch-site": "same-origin", "origin": "http://localhost"}, 201),
        ({"sec-fetch-site": "none"}, 201),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "origin": "http://localhost:3000"}, 403),
        ({"sec-fetch-site": ""}, 403),
        ({"origin": "http://localhost"}, 201),
        ({"origin": "http://LocalHost"}, 201),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
    ],
)
def test_only_our_own_pages_may_write(api: TestClient, headers: dict[str, str], status: int):
    answer = api.post("/v1/collections", json={"name": "x"}, headers=headers)
    assert answer.status_code == status
    if status == 201:
        return
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "/problems/cross-site-request"
    assert api.get("/v1/collections").json()["items"] == []


def test_a_foreign_form_uploads_and_deletes_nothing(api: TestClient):
    foreign = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
    made = api.post("/v1/collections", json={"name": "mine"}).json()
    files = {"file": ("p.zip", zip_of({"a.png": picture(1)}), "application/zip")}
    assert api.post("/v1/cluster", files=files, data={"clusters": "2"}, headers=foreign).status_code == 403
    assert api.delete(made["links"]["self"], headers=foreign).status_code == 403
    assert [item["id"] for item in api.get("/v1/collections", headers=foreign).json()["items"]] == [made["id"]]


def test_an_origin_needs_a_host_to_be_compared_with():
    assert not comes_from_here(Headers({"origin": ""}))
    assert not comes_from_here(Headers({"origin": "null"}))
