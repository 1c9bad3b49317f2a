"""What the service tells of itself: ids in logs, metrics, and the two kinds of health."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import func, text

from app import metrics, storage
from app.config import settings
from app.db.migrate import upgrade
from app.db.session import open_session
from app.db.tables import Run, Upload
from app.embedded import running_servers
from app.main import create_app
from app.services import collections, jobs, keys
from tests.app.test_api import assert_problem
from tests.conftest import forget_settings
from worker.report import Reporter
from worker.sweep import sweep


def scraped(api: TestClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = api.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(found: dict, name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_requests_are_counted_by_the_route_and_not_by_the_path(api: TestClient):
    made = api.post("/v1/collections", json={"name": "x"}).json()["id"]
    before = scraped(api)
    for identity in (made, made, str(uuid.uuid4())):
        api.get(f"/v1/collections/{identity}")
    api.get("/nowhere/at/all")
    found = scraped(api)
    route = "/v1/collections/{collection_id}"

    def grown(status: str, where: str = route) -> float:
        labels = {"method": "GET", "route": where, "status": status}
        return value(found, "kindred_http_requests_total", **labels) - before.get(
            ("kindred_http_requests_total", frozenset(labels.items())), 0.0
        )

    assert (grown("200"), grown("404"), grown("404", "unmatched")) == (2, 1, 1)
    count = value(found, "kindred_http_request_seconds_count", method="GET", route=route)
    assert count >= 3
    names = "".join(label for _, labels in found for _, label in labels)
    assert made not in names


def test_jobs_are_counted_and_timed_by_the_database(api: TestClient):
    with open_session() as session:
        collection = collections.create(session, "watched")
        done, waits, works = (Upload(id=uuid.uuid4(), collection_id=collection.id, bytes=1) for _ in range(3))
        session.add(done)
        run = Run(id=uuid.uuid4(), collection_id=collection.id, parameters={}, created_at=func.now())
        session.add(run)
        session.flush()
        assert jobs.claim(session, Upload, done.id)
        session.execute(text("UPDATE uploads SET started_at = now() - interval '10 s' WHERE state = 'running'"))
        assert jobs.finish(session, Upload, done.id, 1, received=500, accepted=500)
        session.add_all([waits, works])
        session.flush()
        session.execute(text("UPDATE uploads SET created_at = now() - interval '90 s' WHERE state = 'queued'"))
        session.flush()
        session.execute(
            text("UPDATE uploads SET state='running', attempt=1, lease_until=now() + interval '25 s' WHERE id = :id"),
            {"id": works.id},
        )
        session.commit()
    found = scraped(api)
    assert value(found, "kindred_database_up") == 1
    states = {"queued": 1, "running": 1, "succeeded": 1, "failed": 0, "cancelled": 0}
    for state, count in states.items():
        assert value(found, "kindred_jobs", kind="upload", state=state) == count
    assert value(found, "kindred_jobs", kind="run", state="queued") == 1
    assert value(found, "kindred_oldest_queued_seconds", kind="upload") == pytest.approx(90, abs=20)
    # A lease of 60 s that ends in 25 s began 35 s ago.
    assert value(found, "kindred_heartbeat_age_seconds", kind="upload") == pytest.approx(35, abs=20)
    assert value(found, "kindred_ingest_images_per_second") == pytest.approx(50, rel=0.2)
    assert value(found, "kindred_queue_depth", queue="train") >= 0
    assert value(found, "kindred_disk_free_bytes") > 0


def test_what_a_sweeper_does_reaches_the_scrape_of_the_api(api: TestClient):
    with open_session() as session:
        collection = collections.create(session, "swept")
        run = Run(id=uuid.uuid4(), collection_id=collection.id, parameters={})
        session.add(run)
        session.flush()
        assert jobs.claim(session, Run, run.id)
        assert jobs.expire(session, Run, run.id, 1)
        session.commit()
    before = metrics.SWEEPER.labels(action="requeued")._value.get()
    sweep()
    stop = threading.Event()
    reporter = Reporter("ingest@a host/with: signs", stop)
    reporter.start()
    deadline = time.monotonic() + 10
    while not list(storage.metrics().glob("*.prom")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = scraped(api)
    worker = "ingest@a_host_with__signs"
    assert value(found, "kindred_sweeper_actions_total", action="requeued", worker=worker) == before + 1
    assert value(found, "kindred_sweeper_actions_total", action="orphan_removed", worker=worker) >= 0
    assert value(found, "kindred_worker_seen_seconds", worker=worker) < 10
    os.utime(storage.metrics() / f"{worker}.prom", (0, 0))
    old = scraped(api)
    assert value(old, "kindred_worker_seen_seconds", worker=worker) > 10**6
    assert not [name for name, _ in old if name == "kindred_sweeper_actions_total"]
    stop.set()
    reporter.join(10)
    assert not list(storage.metrics().glob("*"))


def test_metrics_are_for_administrators_once_there_are_keys(api: TestClient):
    with open_session() as session:
        secrets = {scope: keys.create(session, scope, scope)[1] for scope in ("read", "write", "admin")}
        session.commit()
    assert api.get("/metrics").status_code == 401
    statuses = {
        scope: api.get("/metrics", headers={"Authorization": f"Bearer {secret}"}).status_code
        for scope, secret in secrets.items()
    }
    assert statuses == {"read": 403, "write": 403, "admin": 200}
    assert (api.get("/healthz").status_code, api.get("/readyz").status_code) == (200, 200)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-123.DEF_4", True), ("x" * 64, True), ("", False), ("x" * 65, False), ("a b", False), ('"\n', False)],
)
def test_a_request_has_an_id_that_its_answer_names(api: TestClient, given: str, kept: object):
    answer = api.get("/healthz", headers=[(b"X-Request-ID", given.encode())])
    found = answer.headers["x-request-id"]
    assert (found == given) is kept
    if not kept:
        assert uuid.UUID(found)
    assert api.get("/v1/collections/x").headers["x-request-id"] != found


LOGS = """
import sys, structlog, logging
from app.logs import configure_logs
configure_logs()
with structlog.contextvars.bound_contextvars(request="r1", run="u1", attempt=2):
    structlog.get_logger("a").info("own", n=1)
    logging.getLogger("other").warning("of %s", "a library")
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("other").exception("failed")
"""


def logged(script: str, form: str) -> list[str]:
    """The lines that a process logs which runs `script`."""
    environment = os.environ | {"KINDRED_LOG_FORMAT": form}
    said = subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    return (said.stdout + said.stderr).strip().splitlines()


@pytest.mark.parametrize("form", ["text", "json"])
def test_every_line_of_the_log_carries_its_ids(form: str):
    lines = logged(LOGS, form)
    assert len(lines) == 3
    for line in lines:
        if form == "json":
            found = json.loads(line)
            assert (found["request"], found["run"], found["attempt"]) == ("r1", "u1", 2)
            assert {"event", "level", "timestamp"} <= set(found)
        else:
            assert "request='r1'" in line
            assert "run='u1'" in line
            assert "attempt=2" in line
    assert "ValueError: why" in lines[-1]


REFUSED = """
import logging, structlog, uuid
from sqlalchemy import text
from app.db.copy import insert_rows
from app.db.session import open_session
from app.logs import configure_logs

def by_statement(session):
    values = {"id": uuid.uuid4(), "name": "secret\\nsecret" * 100}
    session.execute(text("INSERT INTO collections (id, name) VALUES (:id, :name)"), values)

def by_copy(session):
    row = (*(str(uuid.uuid4()) for _ in range(4)), "short", "secret\\nsecret.png", "PNG", 1, 1, 1)
    columns = "tenant_id, collection_id, upload_id, id, sha256, filename, format, width, height, bytes"
    insert_rows(session, f"COPY images ({columns}) FROM STDIN", [row])

configure_logs()
for act in (by_statement, by_copy):
    try:
        with open_session() as session:
            act(session)
    except Exception:
        structlog.get_logger("a").exception("broke")
        logging.getLogger("library").exception("broke")
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_row_that_the_database_refuses_is_not_logged(database: None, form: str):
    lines = logged(REFUSED, form)
    assert len(lines) == 4
    for line in lines:
        assert "violates check constraint" in line
        assert "Traceback" in line
        assert "secret" not in line


def test_the_log_of_a_request_names_what_it_made(api: TestClient, capfd: pytest.CaptureFixture[str]):
    answer = api.post("/v1/collections", json={"name": "secret name"}, headers={"X-Request-ID": "tell-me"})
    said = capfd.readouterr()
    (line,) = [line for line in (said.out + said.err).splitlines() if "event='request'" in line]
    for part in ("request='tell-me'", f"location='{answer.headers['location']}'", "status=201", "method='POST'"):
        assert part in line
    assert "secret name" not in line


def test_without_migrations_the_service_lives_and_is_not_ready(api: TestClient):
    with open_session() as session:
        version = session.scalar(text("SELECT version_num FROM alembic_version"))
        session.execute(text("UPDATE alembic_version SET version_num = '0000'"))
        session.commit()
    try:
        body = assert_problem(api.get("/readyz"), 503, "not-ready")
    finally:
        with open_session() as session:
            session.execute(text("UPDATE alembic_version SET version_num = :version"), {"version": version})
            session.commit()
    assert [error["field"] for error in body["errors"]] == ["migrations"]
    assert "0000" in body["detail"]
    assert version in body["detail"]
    assert api.get("/readyz").json() == {"status": "ok", "broker": "ok"}


def test_without_a_disk_to_write_to_the_service_lives_and_is_not_ready(
    api: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("KINDRED_DATA_DIR", str(tmp_path / "file" / "data"))
    settings.cache_clear()
    body = assert_problem(api.get("/readyz"), 503, "not-ready")
    assert [error["field"] for error in body["errors"]] == ["disk"]
    assert api.get("/healthz").status_code == 200


@pytest.fixture
def lonely(configured: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The API after its PostgreSQL and its broker were stopped."""
    with running_servers(tmp_path / "own") as urls:
        upgrade(urls.database_url)
        monkeypatch.setenv("KINDRED_DATABASE_URL", urls.database_url)
        monkeypatch.setenv("KINDRED_BROKER_URL", urls.broker_url)
        forget_settings()
        client = TestClient(create_app(), base_url="http://localhost")
        assert client.get("/readyz").json() == {"status": "ok", "broker": "ok"}
    yield client
    forget_settings()


@pytest.mark.slow
def test_without_a_database_the_service_lives_and_is_not_ready(lonely: TestClient):
    assert lonely.get("/healthz").json() == {"status": "ok"}
    body = assert_problem(lonely.get("/readyz"), 503, "not-ready")
    assert [error["field"] for error in body["errors"]] == ["database"]
    assert_problem(lonely.get("/v1/collections"), 503, "database-away")
