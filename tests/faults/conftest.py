"""One real stack for all tests that harm it; each leaves it running."""

import os
import time
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.faults.stack import Stack
from tests.faults.table import Seen, seen_by
from tests.pictures import two_kinds, zip_of

# `make test-faults` does all the counts that docs/faults.md names; the ordinary suite a few of each.
FULL = os.environ.get("KINDRED_FAULTS") == "full"
Undisturbed = Callable[..., tuple[str, float]]
only_in_full = pytest.mark.skipif(not FULL, reason="takes minutes; `make test-faults` runs it")


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Seen:
    """`seen(promise, limit, figure)` adds a row to the table at the end."""
    return seen_by(request)


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    root = tmp_path_factory.mktemp("stack")
    root.chmod(0o711)  # where PostgreSQL runs as another user, it passes through
    stack = Stack(root, root / "files")
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def stack(started: Stack) -> Stack:
    """The stack with all its servers running, whatever the test before has done to it."""
    if not started.postgres.running:
        started.start_postgres()
    if not started.valkey.running:
        started.start_valkey()
    if not started.api.running:
        started.start_api()
    started.rows(
        "UPDATE runs SET state = 'cancelled', lease_until = NULL, finished_at = now() "
        "WHERE state IN ('queued', 'running')"
    )
    started.broker().flushall()
    return started


@pytest.fixture(scope="session")
def collection(started: Stack) -> str:
    """24 pictures of two kinds, taken in by a real upload."""
    with started.workers("ingest"):
        upload = started.upload(zip_of(two_kinds(24)))
        assert started.ended(upload["links"]["self"])["state"] == "succeeded"
    return str(upload["collection_id"])


@pytest.fixture(scope="session")
def undisturbed(started: Stack, collection: str) -> Undisturbed:
    """The labels of a run that nobody harms, and the seconds that it lasts: what others are measured against."""

    @cache
    def made(**parameters: object) -> tuple[str, float]:
        with started.workers("train"):
            run_id = started.submit(collection, **parameters)
            began = time.monotonic()
            assert started.ended(f"/v1/runs/{run_id}", 300)["state"] == "succeeded"
            lasts_s = time.monotonic() - began
            return started.labels(run_id), lasts_s

    return made
