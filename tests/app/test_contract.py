"""The whole OpenAPI document against the running API: no 5xx, and no answer that is not written there.

A real uvicorn, a real PostgreSQL and a real broker; what a worker makes is made by the same code here. Ids in
paths are half of the time those of things that exist, so that requests come further than a 404.
"""

import os
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import hypothesis
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck
from schemathesis.specs.openapi.checks import positive_data_acceptance

from app import storage
from app.db.session import open_session
from app.db.tables import Run, Upload
from app.embedded import ServerUrls
from app.main import create_app
from app.services import collections, images, jobs, keys, results, uploads
from app.services.parameters import Parameters
from app.services.results import AssignmentRow, ClusterRow
from tests.conftest import empty_database, forget_settings
from tests.pictures import two_kinds, zip_of
from worker.ingest import ingest

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("KINDRED_CONTRACT_EXAMPLES", "12"))


@dataclass(frozen=True, kw_only=True)
class Known:
    """What exists, by the name of the path parameter that it goes into."""

    collection_id: uuid.UUID
    upload_id: uuid.UUID
    run_id: uuid.UUID
    image_id: uuid.UUID
    key_id: uuid.UUID
    key: str


def filled() -> Known:
    """A collection with an upload that a worker took in and a run that is over."""
    upload_id = uuid.uuid4()
    storage.incoming(upload_id).mkdir(parents=True)
    content = zip_of(two_kinds(4) | {"text.txt": b"no picture"})
    storage.incoming_part(upload_id, 0).write_bytes(content)
    with open_session() as session:
        collection = collections.create(session, "Contract")
        session.flush()
        part = uploads.ReceivedPart(filename="a.zip", bytes=len(content))
        uploads.create(session, upload_id, collection.id, [part])
        session.commit()
    ingest(upload_id, threading.Event())
    with open_session() as session:
        assert session.get_one(Upload, upload_id).state == "succeeded"
        found = images.list_page(session, collection.id, 10, None).items
        run = Run(id=uuid.uuid4(), collection_id=collection.id, parameters=Parameters(clusters=2).model_dump())
        session.add(run)
        session.flush()
        assert jobs.claim(session, Run, run.id) is not None
        assert jobs.finish(session, Run, run.id, 1, metrics={"seconds": 1.0})
        clusters = [
            ClusterRow(
                cluster=number, name=f"Group {number + 1}", size=2, confidence=0.9, cohesion=0.5,
                representatives=[found[number].id],
            )
            for number in range(2)
        ]  # fmt: skip
        rows = (
            AssignmentRow(
                position=position, image_id=image.id, cluster=position % 2, rank=position // 2, confidence=0.9,
                runner_up=1 - position % 2, margin=0.5, consensus=True,
            )
            for position, image in enumerate(found)
        )  # fmt: skip
        results.store(session, run.id, clusters, rows)
        key, secret = keys.create(session, "contract", "admin")
        session.commit()
        return Known(
            collection_id=collection.id, upload_id=upload_id, run_id=run.id, image_id=found[0].id,
            key_id=key.id, key=secret,
        )  # fmt: skip


@pytest.fixture(scope="module")
def service(servers: ServerUrls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Known]]:
    """The URL of a running API, and what exists there; one for all tests, since filling it takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINDRED_DATABASE_URL", servers.database_url)
        patch.setenv("KINDRED_BROKER_URL", servers.broker_url)
        patch.setenv("KINDRED_REQUESTS_PER_MINUTE", "0")
        patch.setenv("KINDRED_DATA_DIR", str(tmp_path_factory.mktemp("contract")))
        forget_settings()
        with listening() as url:
            yield url, filled()
        empty_database()
        forget_settings()


@contextmanager
def listening() -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(), log_config=None, access_log=False, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


# `positive_data_acceptance` is left out: a schema cannot say that a cursor is one of ours, that bytes are a picture,
# or that a weights file is on this server.
DOCUMENT = schemathesis.openapi.from_dict(create_app().openapi())


@DOCUMENT.parametrize()
@hypothesis.settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 12, suppress_health_check=list(HealthCheck)
)
def test_every_answer_is_one_that_the_document_names(case: schemathesis.Case, service: tuple[str, Known]):
    url, known = service
    # What is deleted or revoked is nobody else's then; and a wrong id must stay wrong.
    right = case.meta is not None and case.meta.generation.mode is schemathesis.GenerationMode.POSITIVE
    for name in case.path_parameters if right and case.method in ("GET", "POST") else ():
        if hasattr(known, name) and zlib.crc32(repr(case.path_parameters[name]).encode()) % 2:
            case.path_parameters[name] = str(getattr(known, name))
    headers = {"Authorization": f"Bearer {known.key}"}
    case.call_and_validate(base_url=url, timeout=20, headers=headers, excluded_checks=[positive_data_acceptance])
