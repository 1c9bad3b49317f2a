"""Redis and PostgreSQL killed, emptied and started again under work."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.faults.conftest import FULL, Undisturbed, only_in_full
from tests.faults.stack import REAL, WHOLE, Stack
from tests.faults.table import Seen
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults"), pytest.mark.timeout(1500)]


@pytest.mark.parametrize("append_only", [True, False] if FULL else [False])
def test_redis_is_killed_under_work(
    stack: Stack, collection: str, undisturbed: Undisturbed, seen: Seen, *, append_only: bool
):
    """Killed in a training, away for a while, and back with or without what it knew."""
    wanted, _ = undisturbed(**WHOLE)
    settings = REAL if FULL else {}
    with stack.workers("train", **settings) as (worker,):
        running = stack.submit(collection, **WHOLE)
        wait_for(lambda: stack.steps_done(running) > 0)
        stack.valkey.kill()
        asked = time.monotonic()
        queued = stack.submit(collection, method="kmeans")
        answered_s = time.monotonic() - asked
        assert stack.http.get("/readyz").status_code == 200
        # The training ends well without a broker, as if nothing was.
        assert stack.ended(f"/v1/runs/{running}", 300)["state"] == "succeeded"
        stack.forget_messages(append_only=append_only)
        stack.start_valkey()
        back = time.monotonic()
        wait_for(lambda: stack.run(queued)["state"] != "queued", 90)
        started_s = time.monotonic() - back
        assert stack.ended(f"/v1/runs/{queued}")["state"] == "succeeded"
        assert worker.running
    for run_id in (running, queued):
        row = stack.row(run_id)
        assert (row["attempt"], row["lost_attempts"]) == (1, 0)
    assert stack.labels(running) == wanted
    assert started_s <= 60
    which = "with its log" if append_only else "without its log"
    seen(f"Redis killed, back {which}", "202; running work unaffected", f"202 after {answered_s:.1f} s; 1 attempt")
    seen("  queued work after that", "starts <= 60 s after it is back", f"{started_s:.1f} s")


@only_in_full
def test_redis_is_emptied(stack: Stack, collection: str, seen: Seen):
    waiting = [stack.submit(collection, method="kmeans") for _ in range(3)]
    assert stack.broker().llen("train") == 3
    with stack.workers("train", **(REAL if FULL else {})):
        wait_for(lambda: stack.run(waiting[0])["state"] == "running")
        stack.broker().flushall()
        emptied = time.monotonic()
        wait_for(lambda: stack.run(waiting[1])["state"] != "queued", 90)
        started_s = time.monotonic() - emptied
        for run_id in waiting:
            assert stack.ended(f"/v1/runs/{run_id}")["state"] == "succeeded"
            assert stack.row(run_id)["attempt"] == 1
    assert started_s <= 60
    seen("Redis emptied, 2 runs waiting", "they start <= 60 s later", f"{started_s:.1f} s, behind the run at work")


@contextmanager
def asking(stack: Stack) -> Iterator[list[tuple[str, int | str]]]:
    """What the API answers meanwhile, as a client sees it: path and status, or how the connection broke."""
    answers: list[tuple[str, int | str]] = []
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=stack.url, timeout=30, trust_env=False) as http:
            while not over.wait(0.1):
                for path in ("/healthz", "/readyz", "/v1/collections"):
                    try:
                        answers.append((path, http.get(path).status_code))
                    except httpx.TransportError as error:
                        answers.append((path, repr(error)))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()


def test_postgresql_is_stopped_in_immediate_mode(stack: Stack, collection: str, seen: Seen):
    """At random moments of claims, trainings and finishes; nothing is doubled, lost or stuck."""
    stops = 20 if FULL else 3
    with stack.workers("train", "train") as workers, asking(stack) as answers:
        submitted = [stack.submit(collection, method="kmeans", seed=seed) for seed in range(2)]
        for number in range(stops):
            # Runs of some seconds, so that stops meet claims, heartbeats and finishes.
            submitted.append(stack.submit(collection, method="kmeans", seed=number))
            time.sleep(random.uniform(0.0, 4.0))
            stack.stop_postgres()
            time.sleep(0.2)
            assert stack.http.get("/healthz").status_code == 200
            assert stack.http.get("/readyz").status_code == 503
            refused = stack.http.post(f"/v1/collections/{collection}/runs", json={"clusters": 2})
            assert (refused.status_code, refused.json()["type"]) == (503, "/problems/database-away")
            time.sleep(random.uniform(0.0, 2.0))
            stack.start_postgres()
            wait_for(stack.answers)
        back = time.monotonic()
        ended = [stack.ended(f"/v1/runs/{run_id}", 180) for run_id in submitted]
        settled_s = time.monotonic() - back
        assert all(worker.running for worker in workers)
    assert [run["state"] for run in ended] == ["succeeded"] * len(submitted), [run["problem"] for run in ended]
    for run_id in submitted:
        assert stack.rows("SELECT count(*) FROM assignments WHERE run_id = %s", run_id)[0]["count"] == 24
    assert stack.rows("SELECT count(*) FROM runs WHERE state IN ('queued', 'running')")[0]["count"] == 0
    said = {path: {status for asked, status in answers if asked == path} for path in ("/healthz", "/readyz")}
    assert said["/healthz"] == {200}
    assert said["/readyz"] == {200, 503}
    assert {status for _, status in answers} <= {200, 503}, stack.api.log.read_text()[-5000:]
    lost = sum(stack.row(run_id)["lost_attempts"] for run_id in submitted)
    seen(
        f"PostgreSQL stopped in immediate mode {stops} times",
        "503, not ready, alive; nothing doubled or stuck",
        f"all {len(submitted)} runs succeeded, {lost} attempts lost; {len(answers)} answers, all 200 or 503",
    )
    seen("  the last run after that", "nothing stuck", f"{settled_s:.1f} s")


def test_postgresql_is_away_when_a_run_finishes(stack: Stack, collection: str, seen: Seen):
    """Stopped as soon as the trainer is done, for longer than the lease: the result is not lost, nor made again."""
    with stack.workers("train") as (worker,):
        run_id = stack.submit(collection, method="kmeans")
        (trainer,) = wait_for(worker.trainers)
        done = stack.folder(run_id) / "attempt-1" / "result.json"
        wait_for(done.exists, every_s=0.005)
        stack.stop_postgres()
        wait_for(lambda: not trainer.is_running() or trainer.status() == "zombie")
        time.sleep(8)  # the lease is 6 s
        stack.start_postgres()
        run = stack.ended(f"/v1/runs/{run_id}")
    row = stack.row(run_id)
    assert (run["state"], row["attempt"], row["lost_attempts"]) == ("succeeded", 1, 0)
    seen("PostgreSQL away at the finish, longer than a lease", "nothing doubled or stuck", "1 attempt, stored once")
