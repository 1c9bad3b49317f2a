"""One real stack for all tests that harm it; each leaves it running."""

import os
from collections.abc import Iterator

import pytest

from tests.faults.stack import Stack
from tests.faults.table import Seen, seen_by
from tests.pictures import two_kinds, zip_of

# `make test-faults` does all the counts that docs/faults.md names; the ordinary suite a few of each.
FULL = os.environ.get("KINDRED_FAULTS") == "full"
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
