"""A full disk: the files of the service lie on a small one of their own."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import only_in_full
from tests.faults.stack import WHOLE, Stack
from tests.faults.table import Seen
from tests.pictures import picture, two_kinds, zip_of
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults"), pytest.mark.timeout(600)]
MIB = 2**20
LONGER = WHOLE | {"epochs": 300}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose files lie on 64 MiB of their own; PostgreSQL has room elsewhere."""
    root = tmp_path_factory.mktemp("small")
    root.chmod(0o711)
    files = root / "files"
    files.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", files], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small file system ({mounted.stderr.strip()})")
    try:
        stack = Stack(root, files)
        try:
            stack.start()
            yield stack
        finally:
            stack.stop()
    finally:
        subprocess.run(["umount", "-l", files], check=True)


def fill(stack: Stack, leave: int) -> Path:
    """Take all room of the disk but `leave` bytes."""
    ballast = stack.files / "ballast"
    free = os.statvfs(stack.files)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - leave))
    return ballast


def drafts(stack: Stack) -> list[str]:
    """Files that are half there."""
    found = [path for path in stack.files.rglob("*") if path.is_file()]
    return [str(path) for path in found if path.name.endswith(".part") or path.name.startswith(".")]


def noise(count: int, size: int) -> dict[str, bytes]:
    return {f"{number}.png": picture(number, kind=1, size=(size, size)) for number in range(count)}


def test_a_disk_that_is_full_during_an_upload(small: Stack, seen: Seen):
    collection = small.http.post("/v1/collections", json={"name": "small"}).json()["id"]
    content = zip_of(noise(8, 700))
    assert len(content) > 4 * MIB

    def streamed() -> Iterator[bytes]:  # of a length that nobody knows beforehand
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\n'
        yield from (content[at : at + 65536] for at in range(0, len(content), 65536))
        yield b"\r\n--x--\r\n"

    # At the start, in the middle, and at the last bytes, which wait in a buffer until the part ends.
    for leave in (0, MIB, len(content) - 100_000, len(content) - 4096):
        ballast = fill(small, leave)
        answer = small.http.post(
            f"/v1/collections/{collection}/uploads",
            content=streamed(),
            headers={"Content-Type": "multipart/form-data; boundary=x"},
        )
        assert (answer.status_code, answer.json()["type"]) == (507, "/problems/storage-full"), leave
        incoming = small.files / "incoming"
        assert not incoming.exists() or list(incoming.iterdir()) == []
        assert small.http.get("/healthz").status_code == 200
        ballast.unlink()
        assert small.answers()
    assert small.rows("SELECT count(*) FROM uploads")[0]["count"] == 0

    # Received, but no room to unpack it.
    ballast = fill(small, len(content) + 2 * MIB)
    upload = small.upload(content, collection)
    with small.workers("ingest") as (worker,):
        ended = small.ended(upload["links"]["self"])
        assert (ended["state"], ended["problem"]["code"]) == ("failed", "storage-full")
        assert worker.running
        wait_for(lambda: not list((small.files / "incoming").iterdir()), 10)
        ours = (ballast.name, "metrics")  # what workers count is no file of a user
        left = [path for top in small.files.iterdir() if top.name not in ours for path in top.rglob("*")]
        left = [path for path in left if path.is_file()]
        assert left == []
        assert small.rows("SELECT count(*) FROM images")[0]["count"] == 0
        ballast.unlink()
        again = small.ended(small.upload(content, collection)["links"]["self"])
        assert (again["state"], again["counts"]["accepted"]) == ("succeeded", 8)
    small.http.delete(f"/v1/collections/{collection}").raise_for_status()
    seen("disk full during an upload", "507, nothing partial, recovers", "507 at 4 points of it; ingest: storage-full")


@only_in_full
def test_a_disk_that_is_full_during_a_training(small: Stack, seen: Seen):
    with small.workers("ingest"):
        upload = small.upload(zip_of(two_kinds(24)))
        assert small.ended(upload["links"]["self"])["state"] == "succeeded"
    collection = upload["collection_id"]
    with small.workers("train") as (worker,):
        undisturbed = small.submit(collection, **LONGER)
        assert small.ended(f"/v1/runs/{undisturbed}", 300)["state"] == "succeeded"

        # A checkpoint that finds no room is left out; the training goes on to the same end.
        run_id = small.submit(collection, **LONGER)
        wait_for(lambda: small.steps_done(run_id) > 0)
        ballast = fill(small, 0)
        kept, before = small.steps_done(run_id), small.run(run_id)["progress"]
        wait_for(lambda: small.run(run_id)["progress"] > before + 0.2)  # checkpoints are 0.5 s apart
        assert small.run(run_id)["stage"] == "training"
        assert 0 < small.steps_done(run_id) <= kept + 1
        ballast.unlink()
        assert small.ended(f"/v1/runs/{run_id}", 300)["state"] == "succeeded"
        assert small.labels(run_id) == small.labels(undisturbed)
        assert drafts(small) == []

        # At the finish there is nothing to leave out: the run fails, and says why.
        run_id = small.submit(collection, **LONGER)
        wait_for(lambda: small.steps_done(run_id) > 0)
        ballast = fill(small, 0)
        failed = small.ended(f"/v1/runs/{run_id}", 300)
        assert (failed["state"], failed["problem"]["code"]) == ("failed", "storage-full")
        left = {path.name for path in small.folder(run_id).rglob("*") if path.is_file()}
        assert left <= {"trainer.log"}
        assert drafts(small) == []
        assert small.rows("SELECT count(*) FROM assignments WHERE run_id = %s", run_id)[0]["count"] == 0
        # Nor can one start.
        ballast.unlink()
        ballast = fill(small, 0)
        refused = small.ended(f"/v1/runs/{small.submit(collection, method='kmeans')}")
        assert (refused["state"], refused["problem"]["code"]) == ("failed", "storage-full")
        ballast.unlink()
        again = small.ended(f"/v1/runs/{small.submit(collection, **LONGER)}", 300)
        assert again["state"] == "succeeded"
        assert worker.running
    seen("disk full during a checkpoint", "nothing partial, recovers", "goes on without it; same labels")
    seen("disk full at the finish of a run", "nothing partial, recovers", "fails as storage-full; the next succeeds")
