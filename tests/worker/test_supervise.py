"""Runs under supervision: real trainer processes, real PostgreSQL, no queue in between."""

import hashlib
import os
import signal
import threading
import time
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app import storage
from app.config import settings
from app.db.session import open_session
from app.db.tables import Assignment, Image, Run, Upload
from app.services import collections, results, runs
from app.services.parameters import Parameters
from tests.pictures import picture
from tests.waiting import wait_for
from worker import supervise as supervision
from worker.supervise import supervise
from worker.sweep import sweep, until_next_turn_s

pytestmark = [pytest.mark.usefixtures("database"), pytest.mark.slow]


def collection_of(count: int) -> uuid.UUID:
    """A collection with `count` pictures of two kinds, as an ingest leaves it."""
    with open_session() as session:
        collection = collections.create(session, "pictures")
        upload = Upload(
            id=uuid.uuid4(), collection_id=collection.id, bytes=0, state="succeeded", finished_at=func.now()
        )
        session.add(upload)
        session.flush()
        for number in range(count):
            content = picture(number, kind=number % 2)
            sha256 = hashlib.sha256(content).hexdigest()
            with storage.atomic_write(storage.original(collection.id, sha256)) as file:
                file.write(content)
            session.add(
                Image(
                    id=uuid.uuid4(),
                    collection_id=collection.id,
                    upload_id=upload.id,
                    sha256=sha256,
                    filename=f"kind-{number % 2}/{number}.png",
                    format="PNG",
                    width=40,
                    height=30,
                    bytes=len(content),
                )
            )
            session.flush()
        session.commit()
        return collection.id


def new_run(collection_id: uuid.UUID, **parameters: object) -> uuid.UUID:
    with open_session() as session:
        run = runs.create(session, collection_id, Parameters(**{"clusters": 2, **parameters}))
        session.commit()
        return run.id


def read(run_id: uuid.UUID) -> Run:
    with open_session() as session:
        return runs.get(session, run_id)


def trainers() -> list[int]:
    """Process ids of the trainers that this process has started and that live."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"worker.trainer" in command and parent == os.getpid():
                found.append(int(entry.name))
    return found


def in_background(run_id: uuid.UUID, stop: threading.Event | None = None) -> threading.Thread:
    thread = threading.Thread(target=supervise, args=(run_id, stop or threading.Event()))
    thread.start()
    return thread


def test_what_the_trainer_said_while_the_database_was_away_is_kept(monkeypatch: pytest.MonkeyPatch):
    """From the first heartbeat to the last; it is back for the result."""
    run_id = new_run(collection_of(20), method="kmeans")
    report, lost = supervision._report, []

    def away() -> Session:
        raise OperationalError("SELECT 1", None, Exception("server closed the connection"))

    def unheard(attempt: object) -> bool:
        with monkeypatch.context() as outage:
            outage.setattr(supervision, "open_session", away)
            lost.append(report(attempt))
        return False

    monkeypatch.setattr(supervision, "_report", unheard)
    supervise(run_id, threading.Event())
    run = read(run_id)
    assert lost
    assert not any(lost)
    assert (run.state, run.stage, run.progress, run.eta_s) == ("succeeded", "done", 1.0, 0.0)
    assert run.provenance is not None
    assert len(run.provenance["backbone_sha256"]) == 64
    assert run.parameters["restarts"] is not None


def test_a_run_ends_with_labels_for_every_image():
    run_id = new_run(collection_of(20), truth="folder")
    supervise(run_id, threading.Event())
    run = read(run_id)
    assert run.state == "succeeded", run.problem
    assert run.metrics is not None
    assert run.metrics["quality"]["acc"] == 1.0
    assert run.metrics["baseline"]["quality"]["acc"] == 1.0
    assert run.parameters["epochs"] is not None
    assert run.provenance is not None
    assert len(run.provenance["backbone_sha256"]) == 64
    assert run.provenance["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    with open_session() as session:
        assert results.sizes(session, run_id) == [10, 10]
        assert session.scalar(select(func.count()).select_from(Assignment)) == 20
        header, *rows = b"".join(results.labels_csv(session, run_id)).decode().splitlines()
    assert header == "image_id,filename,cluster,cluster_name,confidence,runner_up,margin,consensus"
    assert [row.split(",")[1] for row in rows] == [f"kind-{n % 2}/{n}.png" for n in range(20)]
    assert sorted(path.suffix for path in storage.run(run_id).glob("model.*")) == [".json", ".safetensors"]
    level_header, *level_rows = storage.levels(run_id).read_text().splitlines()
    assert level_header.split(",")[:2] == ["image_id", "filename"]
    assert "groups_2" in level_header.split(",")
    column = level_header.split(",").index("groups_2")
    # At the level of the clusters the groups are the clusters.
    assert [(row.split(",")[0], row.split(",")[column]) for row in level_rows] == [
        (row.split(",")[0], row.split(",")[2]) for row in rows
    ]


def test_a_second_message_does_nothing():
    run_id = new_run(collection_of(8), method="kmeans")
    supervise(run_id, threading.Event())
    before = read(run_id)
    supervise(run_id, threading.Event())
    after = read(run_id)
    assert (after.attempt, after.finished_at) == (before.attempt, before.finished_at)


def obstructed(run_id: uuid.UUID) -> Path:
    """A folder with something in it, where the run's model is to go."""
    obstacle = storage.run(run_id) / "model.json" / "occupied"
    obstacle.mkdir(parents=True)
    return obstacle.parent


def test_a_result_that_cannot_be_stored_is_tried_again_at_once_and_then_says_whose_fault_it_is():
    run_id = new_run(collection_of(8), method="kmeans")
    obstructed(run_id)
    for attempt in (1, 2, 3):
        supervise(run_id, threading.Event())
        run = read(run_id)
        assert (run.attempt, run.state) == (attempt, "queued" if attempt < 3 else "failed")
    assert run.problem is not None
    assert run.problem["code"] == "internal-error"
    with open_session() as session:
        assert results.sizes(session, run_id) == []
    assert not list(storage.run(run_id).glob("attempt-*"))


def test_a_result_that_could_not_be_stored_once_is_stored_by_the_next_attempt():
    run_id = new_run(collection_of(8), method="kmeans")
    obstacle = obstructed(run_id)
    supervise(run_id, threading.Event())
    storage.remove(obstacle)
    supervise(run_id, threading.Event())
    run = read(run_id)
    assert (run.attempt, run.lost_attempts, run.state) == (2, 1, "succeeded")


def test_a_killed_trainer_is_tried_again_and_after_three_times_given_up():
    collection_id = collection_of(8)
    run_id = new_run(collection_id, method="kmeans")
    for attempt in (1, 2, 3):
        thread = in_background(run_id)
        (trainer,) = wait_for(trainers, timeout_s=60)
        os.kill(trainer, signal.SIGKILL)
        thread.join(30)
        run = read(run_id)
        assert (run.attempt, run.lost_attempts) == (attempt, attempt)
        assert run.state == ("queued" if attempt < 3 else "failed")
    assert run.problem is not None
    assert run.problem["code"] == "worker_lost"
    # Once more, undisturbed: the collection is none the worse.
    again = new_run(collection_id, method="kmeans")
    supervise(again, threading.Event())
    assert read(again).state == "succeeded"


def test_a_cancelled_run_leaves_no_process():
    run_id = new_run(collection_of(60), image_size=512)
    thread = in_background(run_id)
    wait_for(trainers, timeout_s=60)
    with open_session() as session:
        runs.cancel(session, run_id)
        session.commit()
    asked = time.monotonic()
    thread.join(20)
    assert time.monotonic() - asked < 20
    assert read(run_id).state == "cancelled"
    assert trainers() == []
    with open_session() as session:
        assert results.sizes(session, run_id) == []


def test_a_worker_that_is_told_to_stop_gives_its_run_back():
    run_id = new_run(collection_of(60), image_size=512)
    stop = threading.Event()
    thread = in_background(run_id, stop)
    wait_for(trainers, timeout_s=60)
    stop.set()
    thread.join(30)
    run = read(run_id)
    assert (run.state, run.lost_attempts) == ("queued", 0)
    assert trainers() == []


def test_a_run_that_another_worker_took_over_is_left_alone():
    run_id = new_run(collection_of(60), image_size=512)
    thread = in_background(run_id)
    wait_for(trainers, timeout_s=60)
    with open_session() as session:
        session.execute(text("UPDATE runs SET attempt = attempt + 1"))
        session.commit()
    thread.join(60)
    assert not thread.is_alive()
    assert trainers() == []
    run = read(run_id)
    assert (run.state, run.attempt) == ("running", 2)


def test_the_sweeper_comes_when_the_first_lease_runs_out():
    collection_id = collection_of(4)
    assert until_next_turn_s() == settings().sweep_s
    for lease_s, waits_s in ((600, settings().sweep_s), (-1, settings().sweep_s), (0.5, 0.6)):
        new_run(collection_id, method="kmeans")
        with open_session() as session:
            claimed = {"state": "running", "attempt": 1, "lease_until": func.now() + timedelta(seconds=lease_s)}
            session.execute(update(Run).where(Run.state == "queued").values(**claimed))
            session.commit()
        assert waits_s - 0.3 < until_next_turn_s() <= waits_s
    time.sleep(until_next_turn_s())
    sweep()
    with open_session() as session:
        lost = session.scalars(text("SELECT lost_attempts FROM runs ORDER BY created_at")).all()
    assert lost == [0, 1, 1]


def test_a_lease_that_ran_out_is_found_by_the_sweeper():
    run_id = new_run(collection_of(4), method="kmeans")
    with open_session() as session:
        session.execute(text("UPDATE runs SET state = 'running', attempt = 1, lease_until = now() - interval '1 s'"))
        session.commit()
    sweep()
    run = read(run_id)
    assert (run.state, run.lost_attempts) == ("queued", 1)
    supervise(run_id, threading.Event())
    assert read(run_id).state == "succeeded"
