"""`kill -9` of worker and trainer at random moments: one result, that of the undisturbed run."""

import os
import random
import signal
import time
from contextlib import suppress
from typing import Any

import psutil
import pytest

from models.checkpoint import NEWEST
from tests.faults.conftest import FULL, Undisturbed, only_in_full
from tests.faults.stack import QUICK, REAL, WHOLE, Process, Stack, is_alive, is_past
from tests.faults.table import Seen
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults"), pytest.mark.timeout(1500)]

HEAD = {"epochs": 8, "restarts": 2, "seed": 3}
FINETUNE = {"train": "finetune", "image_size": 64, "epochs": 60, "restarts": 2, "seed": 3}
# What a step may take at the worst, its checkpoint included, on a machine with other work.
STEP_S = 1.0
KILLS = {"head": 20, "finetune": 10, "full": 20 if FULL else 2}


def saved_at(stack: Stack, run_id: str) -> float | None:
    """When the run's newest checkpoint was written, in seconds of the clock."""
    with suppress(FileNotFoundError):
        return (stack.folder(run_id) / "checkpoint" / NEWEST).stat().st_mtime
    return None


def lost_work_s(stack: Stack, run_id: str, found: float | None) -> float | None:
    """Seconds of training that a kill would cost now; None where nothing was saved since `found`, or all of it.

    `found` is `saved_at` of when the trainer was new. When it began is no help: psutil knows that to a second only.
    """
    saved = saved_at(stack, run_id)
    if saved in (None, found) or stack.steps_done(run_id) >= stack.row(run_id)["parameters"]["epochs"]:
        return None
    return time.time() - saved


def is_cleared_up(stack: Stack, run_id: str) -> bool:
    """Only what the run keeps is left; a worker removes the rest after the commit that ends the run."""
    folder = stack.folder(run_id)
    return not (folder / "checkpoint").exists() and not list(folder.glob("attempt-*"))


def trainer_of(stack: Stack, worker: Process, run_id: str, attempt: int) -> psutil.Process | None:
    """The trainer of the run's attempt after `attempt`; None once the run is over."""

    def look() -> Any:
        row = stack.row(run_id)
        if row["state"] not in ("queued", "running"):
            return "over"
        return row["attempt"] > attempt and worker.trainers()

    found = wait_for(look, 120)
    return None if found == "over" else found[0]


@pytest.mark.parametrize(
    ("train", "parameters"),
    [
        pytest.param("head", HEAD, marks=only_in_full, id="head"),
        pytest.param("finetune", FINETUNE, marks=only_in_full, id="finetune"),
        pytest.param("full", WHOLE, id="full"),
    ],
)
def test_kills_at_random_moments(
    stack: Stack, collection: str, undisturbed: Undisturbed, seen: Seen, train: str, parameters: dict[str, object]
):
    wanted, lasts_s = undisturbed(**parameters)
    kills, resumed_s, redone_s, runs = 0, [], [], []
    with stack.workers("train", KINDRED_MAX_ATTEMPTS="1000") as (worker,):
        while kills < KILLS[train]:
            run_id = stack.submit(collection, **parameters)
            runs.append(run_id)
            attempt, before = 0, 0
            while kills < KILLS[train]:
                trainer = trainer_of(stack, worker, run_id, attempt)
                if trainer is None:
                    break
                found = saved_at(stack, run_id)
                moment_s = random.uniform(0.0, lasts_s * 0.9)
                with_checkpoint = wait_until(moment_s, lambda run_id=run_id: stack.row(run_id)["state"] != "running")
                row = stack.row(run_id)
                if not with_checkpoint or row["state"] != "running":
                    break
                attempt = row["attempt"]
                age_s = lost_work_s(stack, run_id, found)
                if kills % 2:
                    worker.kill()
                    stack.restart(worker)
                else:
                    os.kill(trainer.pid, signal.SIGKILL)
                killed = time.monotonic()
                wait_for(lambda run_id=run_id, attempt=attempt: is_past(stack.row(run_id), attempt), 60)
                if stack.row(run_id)["attempt"] == attempt:
                    break  # the trainer was done before it was killed
                kills += 1
                if age_s is not None:
                    redone_s.append(age_s)
                assert stack.steps_done(run_id) >= before  # it never begins anew
                before = stack.steps_done(run_id)
                resumed_s.append(time.monotonic() - killed)
            # Undisturbed from here on.
            assert stack.ended(f"/v1/runs/{run_id}", 300)["state"] == "succeeded"
        for run_id in runs:
            assert stack.labels(run_id) == wanted
            wait_for(lambda run_id=run_id: is_cleared_up(stack, run_id), 10)
            assert stack.rows("SELECT count(*) FROM assignments WHERE run_id = %s", run_id)[0]["count"] == 24
    lost = sum(stack.row(run_id)["lost_attempts"] for run_id in runs)
    assert lost <= kills  # and no attempt was lost but to a kill
    limit = f"{kills} kills, every label equal"
    seen(f"kill -9 of worker and trainer, train={train}", limit, f"{len(runs)} runs, {lost} attempts lost, all equal")
    seen(f"resumes, lease 6 s, sweep 1 s, train={train}", "<= 7 s + start", f"<= {max(resumed_s):.1f} s")
    if redone_s:
        interval_s = float(QUICK["KINDRED_CHECKPOINT_S"])
        assert max(redone_s) <= interval_s + STEP_S
        limit = f"<= 1 checkpoint interval ({interval_s} s) and a step"
        seen("work lost to a kill", limit, f"<= {max(redone_s):.2f} s in {len(redone_s)} of the kills")


def wait_until(moment_s: float, over: Any) -> bool:
    """Whether the moment came before the run was over."""
    deadline = time.monotonic() + moment_s
    while time.monotonic() < deadline:
        if over():
            return False
        time.sleep(0.05)
    return True


@only_in_full
def test_a_killed_worker_is_replaced_within_75_s(stack: Stack, collection: str, seen: Seen):
    with stack.workers("train", "train", **REAL) as workers:
        run_id = stack.submit(collection, **WHOLE | {"epochs": 10_000})
        victim = wait_for(lambda: next((worker for worker in workers if worker.trainers()), None))
        wait_for(lambda: stack.steps_done(run_id) > 0)
        time.sleep(random.uniform(0.0, 30.0))
        lost_s, kept = lost_work_s(stack, run_id, None), stack.steps_done(run_id)
        victim.kill()
        killed = time.monotonic()
        assert wait_for(lambda: not victim.trainers() and not stack.trainers(), 5)
        wait_for(lambda: stack.row(run_id)["attempt"] == 2, 80)
        took = time.monotonic() - killed
        wait_for(lambda: stack.steps_done(run_id) > kept)  # it goes on from there
        stack.http.post(f"/v1/runs/{run_id}/cancel").raise_for_status()
        assert stack.ended(f"/v1/runs/{run_id}")["state"] == "cancelled"
    assert took <= 75
    assert lost_s is not None
    assert lost_s <= 30 + STEP_S
    seen("kill -9 of a worker, settings as they come", "resumes <= 75 s", f"{took:.1f} s")
    seen("  work lost to it", "<= 1 checkpoint interval (30 s)", f"{lost_s:.1f} s; it went on from step {kept:,}")


def test_a_trainer_that_dies_every_time(stack: Stack, collection: str, seen: Seen):
    with stack.workers("train") as (worker,):
        run_id = stack.submit(collection, **WHOLE)
        for attempt in range(3):
            trainer = trainer_of(stack, worker, run_id, attempt)
            assert trainer is not None
            if attempt == 1:  # once there is something to go on from
                wait_for(lambda: stack.steps_done(run_id) > 0)
            os.kill(trainer.pid, signal.SIGKILL)
        run = stack.ended(f"/v1/runs/{run_id}")
        assert worker.running
        assert (run["state"], run["problem"]["code"]) == ("failed", "worker_lost")
        wait_for(lambda: is_cleared_up(stack, run_id), 10)
        # Others are none the worse.
        again = stack.submit(collection, method="kmeans")
        assert stack.ended(f"/v1/runs/{again}")["state"] == "succeeded"
    row = stack.row(run_id)
    assert (row["attempt"], row["lost_attempts"]) == (3, 3)
    seen("a trainer that dies every time", "failed after 3 attempts", "worker_lost after 3; no checkpoint left")


def test_a_frozen_worker_writes_nothing(stack: Stack, collection: str, undisturbed: Undisturbed, seen: Seen):
    """SIGSTOP past the lease, SIGCONT once another has finished the run, or while it works on it."""
    lease_s = float(QUICK["KINDRED_LEASE_S"])
    wanted, _ = undisturbed(**WHOLE)
    with stack.workers("train", "train") as workers:
        run_id = stack.submit(collection, **WHOLE)
        frozen = wait_for(lambda: next((worker for worker in workers if worker.trainers()), None))
        (old,) = frozen.trainers()
        wait_for(lambda: stack.steps_done(run_id) > 0)
        frozen.send(signal.SIGSTOP)
        asked = time.monotonic()
        wait_for(lambda: not is_alive(old), lease_s + 3)
        alone = time.monotonic() - asked
        wait_for(lambda: stack.row(run_id)["attempt"] == 2, 60)
        frozen.send(signal.SIGCONT)
        assert stack.ended(f"/v1/runs/{run_id}", 300)["state"] == "succeeded"
        wait_for(lambda: frozen.said("run_lost") + frozen.said("trainer_killed"))
        finished = stack.row(run_id)
        time.sleep(2)
        assert stack.row(run_id) == finished
    assert (finished["attempt"], finished["lost_attempts"]) == (2, 1)
    assert stack.labels(run_id) == wanted
    wait_for(lambda: not (stack.folder(run_id) / "attempt-1").exists(), 10)
    seen(
        "worker frozen past its lease, then thawed",
        "it writes nothing; no two trainers",
        f"its trainer ended itself after {alone:.1f} s (lease {lease_s:.0f} s)",
    )
