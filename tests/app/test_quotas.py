"""What one tenant may have at once."""

import uuid

import pytest
from fastapi.testclient import TestClient

from app.config import settings
from app.db.session import open_session
from app.db.tables import DEFAULT_TENANT, Image, Upload
from app.errors import TooLarge
from app.services import quotas
from tests.app.keys import bearer, make_key
from tests.app.test_api import archive, assert_problem, files_below, rows
from tests.app.test_web import finished_run


def test_a_tenant_s_queue_is_limited_and_nobody_else_s(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINDRED_MAX_QUEUED_RUNS", "2")
    settings.cache_clear()
    one, another = bearer(make_key("one")), bearer(make_key("another"))
    request = {"files": {"file": archive()}, "data": {"clusters": "2"}}
    made = [api.post("/v1/cluster", **request, headers=one) for _ in range(3)]
    assert [answer.status_code for answer in made] == [202, 202, 429]
    assert "At most 2 runs" in assert_problem(made[2], 429, "too-many-runs")["detail"]
    assert int(made[2].headers["retry-after"]) > 0
    assert (rows("runs"), rows("uploads"), rows("collections")) == (2, 2, 2)
    assert len(files_below(settings().data_dir)) == 2
    assert api.post("/v1/cluster", **request, headers=another).status_code == 202
    api.post(made[0].json()["links"]["cancel"], headers=one)
    assert api.post("/v1/cluster", **request, headers=one).status_code == 202


def test_what_a_tenant_keeps_is_limited(api: TestClient, monkeypatch: pytest.MonkeyPatch):
    size = len(archive()[1])
    monkeypatch.setenv("KINDRED_MAX_STORED_BYTES", str(2 * size + 1000))
    settings.cache_clear()
    one, another = bearer(make_key("one")), bearer(make_key("another"))
    request = {"files": {"file": archive()}, "data": {"clusters": "2"}}
    statuses = [api.post("/v1/cluster", **request, headers=one).status_code for _ in range(2)]
    assert statuses == [202, 202]
    body = assert_problem(api.post("/v1/cluster", **request, headers=one), 413, "quota-exceeded")
    assert str(2 * size) in body["detail"]
    assert len(files_below(settings().data_dir)) == 2
    assert api.post("/v1/cluster", **request, headers=another).status_code == 202

    def undeclared():  # the length is only known once it is all there
        form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="p.zip"\r\n\r\n'
        yield form + archive()[1] + b'\r\n--b\r\nContent-Disposition: form-data; name="clusters"\r\n\r\n2\r\n--b--\r\n'

    headers = one | {"Content-Type": "multipart/form-data; boundary=b"}
    assert_problem(api.post("/v1/cluster", content=undeclared(), headers=headers), 413, "quota-exceeded")
    assert len(files_below(settings().data_dir)) == 3


@pytest.mark.parametrize(("sent", "brought", "kept"), [(100, 60, 100), (100, 140, 140), (100, 0, 100)])
def test_an_upload_under_way_counts_once(
    database: None, monkeypatch: pytest.MonkeyPatch, sent: int, brought: int, kept: int
):
    run = finished_run(images=0)
    with open_session() as session:
        upload = Upload(id=uuid.uuid4(), collection_id=run.collection_id, bytes=sent)
        session.add(upload)
        session.flush()
        if brought:
            session.add(
                Image(
                    id=uuid.uuid4(), collection_id=run.collection_id, upload_id=upload.id, sha256="a" * 64,
                    filename="a.png", format="PNG", width=1, height=1, bytes=brought,
                )
            )  # fmt: skip
            session.flush()
        monkeypatch.setenv("KINDRED_MAX_STORED_BYTES", str(kept + 7))
        settings.cache_clear()
        quotas.check_room(session, DEFAULT_TENANT, 7)
        with pytest.raises(TooLarge, match=f"have {kept};"):
            quotas.check_room(session, DEFAULT_TENANT, 8)
