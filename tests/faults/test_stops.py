"""SIGTERM, cancel, and clocks that are wrong."""

import signal
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.faults.conftest import FULL, only_in_full
from tests.faults.stack import WHOLE, Stack, is_alive
from tests.faults.table import Seen
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults"), pytest.mark.timeout(600)]
LONG = WHOLE | {"epochs": 10_000}
FAKETIME = next((str(path) for path in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


def test_sigterm_in_a_training(stack: Stack, collection: str, seen: Seen):
    with stack.workers("train", KINDRED_CHECKPOINT_S="3600") as (worker,):  # the only checkpoint is that of the stop
        run_id = stack.submit(collection, **LONG)
        wait_for(lambda: stack.row(run_id)["stage"] == "training")
        (trainer,) = worker.trainers()
        worker.send(signal.SIGTERM)
        asked = time.monotonic()
        wait_for(lambda: stack.row(run_id)["state"] == "queued", 30)
        released_s = time.monotonic() - asked
        worker.wait(30)
        left_s = time.monotonic() - asked
        assert not is_alive(trainer)
    row = stack.row(run_id)
    assert (row["attempt"], row["lost_attempts"]) == (1, 0)
    assert stack.steps_done(run_id) > 0
    assert left_s <= 30
    stack.http.post(f"/v1/runs/{run_id}/cancel").raise_for_status()
    seen(
        "SIGTERM in a training",
        "checkpointed and released <= 30 s, attempt refunded",
        f"released after {released_s:.1f} s, worker gone after {left_s:.1f} s, 0 attempts lost",
    )


def test_a_cancel_frees_the_memory(stack: Stack, collection: str, seen: Seen):
    with stack.workers("train") as (worker,):
        run_id = stack.submit(collection, **LONG)
        wait_for(lambda: stack.steps_done(run_id) > 0)
        (trainer,) = worker.trainers()
        group = trainer.pid  # it leads its own
        held = trainer.memory_info().rss
        stack.http.post(f"/v1/runs/{run_id}/cancel").raise_for_status()
        asked = time.monotonic()
        assert stack.ended(f"/v1/runs/{run_id}", 20)["state"] == "cancelled"
        took_s = time.monotonic() - asked
        assert members(group) == []
        # Cleared away once the end is committed, not before: a moment later.
        left = ("checkpoint", "attempt-*")
        wait_for(lambda: not any(list(stack.folder(run_id).glob(name)) for name in left), 5)
    assert took_s <= 20
    seen(
        "cancel in a training", "stops <= 20 s, memory free", f"{took_s:.1f} s; {held / 2**20:.0f} MiB, no process left"
    )


def members(group: int) -> list[int]:
    """Processes of a group, the unburied left out."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(entry.name))
    return found


@only_in_full
@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime (Debian: apt install libfaketime)")
@pytest.mark.parametrize("offset", ["+1h", "-1h"] if FULL else ["+1h"])
def test_a_clock_that_is_an_hour_off(stack: Stack, collection: str, seen: Seen, offset: str):
    """One worker lives an hour away. It neither takes what is another's nor loses what is its own."""
    wrong = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    # libfaketime 0.9.10 now and then crashes a Python with threads while it starts.
    with stack.workers("train", tries=5, **wrong) as (elsewhere,), stack.workers("train") as (here,):
        runs = [stack.submit(collection, **WHOLE) for _ in range(2)]
        wait_for(lambda: elsewhere.trainers() and here.trainers())
        for run_id in runs:
            assert stack.ended(f"/v1/runs/{run_id}", 300)["state"] == "succeeded"
    said = next(line for line in elsewhere.log.read_text().splitlines() if "run_claimed" in line)
    its_time = datetime.fromisoformat(said.split("'")[1])
    away = its_time - next(stack.row(run_id)["started_at"] for run_id in runs if run_id in said)
    hour = timedelta(hours=int(offset.removesuffix("h")))
    assert abs(away - hour) < timedelta(minutes=10)  # it did believe in another time
    for run_id in runs:
        row = stack.row(run_id)
        assert (row["attempt"], row["lost_attempts"]) == (1, 0)
        assert abs(row["finished_at"].timestamp() - time.time()) < 600
    assert not elsewhere.said("lease_ran_out")
    seen(f"a worker's clock {offset} off", "no worker's clock is used", "2 runs on 2 workers, 1 attempt each")
