"""Training of a whole network under supervision: it stops with a checkpoint and goes on from there."""

import os
import signal
import threading
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from app import storage
from app.config import settings
from app.db.session import open_session
from app.services import results, runs
from tests import checkpoints
from tests.trainings import WHOLE_NETWORK
from tests.waiting import wait_for
from tests.worker.test_supervise import collection_of, in_background, new_run, read, trainers
from worker.supervise import supervise

pytestmark = [pytest.mark.usefixtures("database"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch):
    """Threads that wait for each other on a busy machine take many times longer than one."""
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def wait_until_it_trains(run_id: uuid.UUID) -> None:
    """Some steps into the training."""
    wait_for(lambda: read(run_id).stage == "training", timeout_s=120)
    first = read(run_id).progress
    wait_for(lambda: read(run_id).progress > first, timeout_s=60)


def steps_done(run_id: uuid.UUID) -> int:
    return checkpoints.steps_done(storage.run(run_id) / "checkpoint")


def labels(run_id: uuid.UUID) -> bytes:
    with open_session() as session:
        return b"".join(results.labels_csv(session, run_id))


def ranks_of(torchrun: int) -> list[int]:
    """The trainers that torchrun has started."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):  # processes come and go
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == torchrun and b"worker.trainer" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return sorted(found)


def set_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setenv("KINDRED_GPUS", str(count))
    settings.cache_clear()


def test_a_stopped_training_goes_on_from_its_checkpoint_to_the_same_labels():
    collection_id = collection_of(24)
    undisturbed = new_run(collection_id, epochs=200, **WHOLE_NETWORK)
    supervise(undisturbed, threading.Event())
    run_id = new_run(collection_id, epochs=200, **WHOLE_NETWORK)
    stop = threading.Event()
    thread = in_background(run_id, stop)
    wait_until_it_trains(run_id)
    stop.set()
    thread.join(30)
    run = read(run_id)
    assert (run.state, run.attempt, run.lost_attempts) == ("queued", 1, 0)
    assert trainers() == []
    before = steps_done(run_id)
    assert 0 < before < 200
    progress = run.progress
    thread = in_background(run_id)
    while thread.is_alive():
        thread.join(0.1)
        run = read(run_id)
        assert run.progress >= progress or run.stage != "training"  # it never begins anew
    run = read(run_id)
    assert (run.state, run.attempt, run.lost_attempts) == ("succeeded", 2, 0)
    assert labels(run_id) == labels(undisturbed)
    assert not (storage.run(run_id) / "checkpoint").exists()


def test_a_trainer_that_somebody_else_stops_is_no_lost_attempt():
    run_id = new_run(collection_of(24), epochs=2000, **WHOLE_NETWORK)
    thread = in_background(run_id)
    wait_until_it_trains(run_id)
    (trainer,) = trainers()
    os.kill(trainer, signal.SIGTERM)
    thread.join(30)
    run = read(run_id)
    assert (run.state, run.lost_attempts) == ("queued", 0)
    assert steps_done(run_id) > 0


def test_a_cancelled_training_keeps_no_checkpoint():
    run_id = new_run(collection_of(24), epochs=2000, **WHOLE_NETWORK)
    thread = in_background(run_id)
    wait_until_it_trains(run_id)
    with open_session() as session:
        runs.cancel(session, run_id)
        session.commit()
    thread.join(20)
    assert read(run_id).state == "cancelled"
    assert trainers() == []
    assert not (storage.run(run_id) / "checkpoint").exists()


def test_a_checkpoint_of_another_version_is_passed_over():
    run_id = new_run(collection_of(24), epochs=2000, **WHOLE_NETWORK)
    stop = threading.Event()
    thread = in_background(run_id, stop)
    wait_until_it_trains(run_id)
    stop.set()
    thread.join(30)
    assert steps_done(run_id) > 0
    with open_session() as session:  # what it trains for is part of a checkpoint's identity
        run = runs.get(session, run_id)
        run.parameters = {**run.parameters, "epochs": 3}
        session.commit()
    supervise(run_id, threading.Event())
    assert read(run_id).state == "succeeded"


def test_two_processes_train_one_network_and_stop_together(monkeypatch: pytest.MonkeyPatch):
    """By gloo on the CPU, as NCCL would on two GPUs."""
    set_gpus(monkeypatch, 2)
    run_id = new_run(collection_of(24), epochs=150, **WHOLE_NETWORK)
    stop = threading.Event()
    thread = in_background(run_id, stop)
    wait_until_it_trains(run_id)
    (torchrun,) = trainers()
    ranks = ranks_of(torchrun)
    assert len(ranks) == 2
    stop.set()
    thread.join(30)
    run = read(run_id)
    assert (run.state, run.lost_attempts) == ("queued", 0)
    before = steps_done(run_id)
    assert before > 0
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), timeout_s=10)
    supervise(run_id, threading.Event())
    assert read(run_id).state == "succeeded"
    with open_session() as session:
        assert sum(results.sizes(session, run_id)) == 24


def test_a_killed_process_of_several_is_a_lost_attempt(monkeypatch: pytest.MonkeyPatch):
    set_gpus(monkeypatch, 2)
    run_id = new_run(collection_of(24), epochs=2000, **WHOLE_NETWORK)
    thread = in_background(run_id)
    wait_until_it_trains(run_id)
    (torchrun,) = trainers()
    os.kill(ranks_of(torchrun)[1], signal.SIGKILL)
    thread.join(60)
    run = read(run_id)
    assert (run.state, run.lost_attempts) == ("queued", 1)
    assert trainers() == []
