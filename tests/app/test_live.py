"""What pages say of work that is under way, and take back once it is over."""

import re
import uuid

from fastapi.testclient import TestClient

from app.db.session import open_session
from app.db.tables import Run, Upload
from app.services import jobs
from tests.app.test_web import finished_run


def test_a_run_whose_images_are_in_waits_for_a_worker(api: TestClient):
    run = finished_run(state="queued")
    page = api.get(f"/runs/{run.id}").text
    assert "Waiting for a worker" in page
    assert "When all images are in" not in page
    with open_session() as session:
        upload = session.get_one(Upload, run.upload_id)
        upload.state, upload.finished_at, upload.lease_until = "running", None, upload.finished_at
        session.commit()
    page = api.get(f"/runs/{run.id}").text
    assert "6 files looked at" in page
    assert "When all images are in" in page


def test_a_line_of_a_run_loses_its_bar_when_the_run_is_over(api: TestClient):
    run = finished_run(state="queued", stage="training", progress=0.5)
    with open_session() as session:
        assert jobs.claim(session, Run, run.id) is not None
        session.commit()
    assert "<progress" in progress_of(api, run.id)
    with open_session() as session:
        assert jobs.finish(session, Run, run.id, 1)
        session.commit()
    assert progress_of(api, run.id) == ""  # still there, so that an open page takes it over


def progress_of(api: TestClient, run_id: uuid.UUID) -> str:
    found = re.search(
        rf'<span class="run-progress" id="progress-{run_id}" data-live>(.*?)</span>\n</li>',
        api.get("/").text,
        re.DOTALL,
    )
    assert found is not None
    return found[1].strip()
