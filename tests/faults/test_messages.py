"""A message is a doorbell: it may come fifty times, or never."""

import signal
import threading
import time

import pytest

from tests.faults.stack import Stack
from tests.faults.table import Seen
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]
QUICK_RUN = {"method": "kmeans"}


def test_the_same_message_fifty_times(stack: Stack, collection: str, seen: Seen):
    run_id = stack.submit(collection, **QUICK_RUN)
    (message,) = stack.broker().lrange("train", 0, -1)
    for _ in range(49):
        stack.broker().lpush("train", message)
    with stack.workers("train", "train") as workers:
        assert stack.ended(f"/v1/runs/{run_id}")["state"] == "succeeded"

        def said(words: str) -> int:
            return sum(worker.said(words) for worker in workers)

        wait_for(lambda: said("nothing_to_claim") >= 49)
        claims, refused = said("run_claimed"), said("nothing_to_claim")
        assert stack.broker().llen("train") == 0
        assert said("kindred.train[") // 2 >= 49
    row = stack.row(run_id)
    assert (claims, refused, row["attempt"], row["lost_attempts"]) == (1, 49, 1, 0)
    seen("the same message 50 times", "1 claim, 49 no-ops", f"{claims} claim, {refused} no-ops, 2 workers")


def test_the_api_dies_between_commit_and_doorbell(stack: Stack, collection: str, seen: Seen):
    """A broker that takes the connection and says nothing holds the API at the doorbell, where it is killed."""
    # A connection that stands already would take the message, and the broker would find it when it goes on.
    stack.api.kill()
    stack.start_api()
    stack.broker().delete("train")
    before = {row["id"] for row in stack.rows("SELECT id FROM runs")}
    stack.valkey.send(signal.SIGSTOP)
    posting = threading.Thread(target=lambda: _submit_and_be_cut_off(stack, collection))
    posting.start()
    try:
        new = wait_for(lambda: {row["id"] for row in stack.rows("SELECT id FROM runs")} - before)
        stack.api.kill()
    finally:
        stack.valkey.send(signal.SIGCONT)
    posting.join()
    (run_id,) = map(str, new)
    assert stack.broker().llen("train") == 0
    stack.start_api()
    assert stack.run(run_id)["state"] == "queued"
    with stack.workers("train"):
        started = time.monotonic()
        wait_for(lambda: stack.run(run_id)["state"] != "queued")
        waited = time.monotonic() - started
        assert stack.ended(f"/v1/runs/{run_id}")["state"] == "succeeded"
    assert stack.row(run_id)["attempt"] == 1
    seen("API killed between commit and doorbell", "the run starts", f"{waited:.1f} s after a worker stood (sweep 1 s)")


def _submit_and_be_cut_off(stack: Stack, collection: str) -> None:
    import httpx

    with pytest.raises(httpx.TransportError):
        httpx.post(f"{stack.url}/v1/collections/{collection}/runs", json={"clusters": 2, **QUICK_RUN}, timeout=60)
