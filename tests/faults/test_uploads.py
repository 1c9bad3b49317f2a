"""Uploads whose API or ingest worker dies."""

import os
import random
import select
import socket
import time
from typing import Any

import pytest

from tests.faults.conftest import FULL
from tests.faults.stack import Stack, is_past
from tests.faults.table import Seen
from tests.pictures import picture, zip_of
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults"), pytest.mark.timeout(600)]


def test_the_api_is_killed_in_the_middle_of_an_upload(stack: Stack, collection: str, seen: Seen):
    before = stack.rows("SELECT count(*) FROM uploads")[0]["count"]
    incoming = stack.files / "incoming"
    with socket.create_connection(("127.0.0.1", stack.port)) as sending:
        sending.sendall(
            f"POST /v1/collections/{collection}/uploads HTTP/1.1\r\n"
            f"Host: 127.0.0.1:{stack.port}\r\nContent-Length: 100000000\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            '--x\r\nContent-Disposition: form-data; name="file"; filename="a.zip"\r\n\r\nPK\x03\x04'.encode()
        )
        for _ in range(50):
            sending.sendall(b"0" * 65536)
        assert not select.select([sending], [], [], 0.5)[0], sending.recv(4096)  # it has nothing to say yet
        (half,) = wait_for(lambda: incoming.exists() and list(incoming.iterdir()))
        wait_for(lambda: (half / "000000").exists() and (half / "000000").stat().st_size > 2**20)
        stack.api.kill()
    stack.start_api()
    assert stack.rows("SELECT count(*) FROM uploads")[0]["count"] == before
    assert half.exists()
    with stack.workers("ingest") as (worker,):
        # A young one may be a request under way; so may one that grows, however old its folder is.
        _let_pass(half, 25)
        _let_pass(half / "000000", 22)
        time.sleep(3)  # sweeps come every second
        assert half.exists()
        _let_pass(half / "000000", 24)
        wait_for(lambda: not half.exists(), 10)
        assert worker.said("orphan_removed") == 1
    seen("API killed in mid-upload", "nothing listed; gone within a day", "0 rows; files gone 23 h after the last byte")


def _let_pass(path: os.PathLike[str], hours: float) -> None:
    then = time.time() - hours * 3600
    os.utime(path, (then, then))


def test_an_ingest_is_killed_in_the_middle(stack: Stack, seen: Seen):
    """Again and again, at random moments; each attempt goes on behind the last batch of the one before."""
    wanted = 10 if FULL else 2
    names = [f"{number:04d}.png" for number in range(3000)]
    content = zip_of({name: picture(number % 2900, size=(48, 48)) for number, name in enumerate(names)})  # some twice
    kills = lost = uploads = 0
    with stack.workers("ingest", KINDRED_MAX_ATTEMPTS="100") as (worker,):
        while kills < wanted:
            upload = stack.upload(content)
            uploads += 1
            attempt = 0
            while kills < wanted:
                wait_for(lambda upload=upload, attempt=attempt: is_past(stack.row(upload["id"], "uploads"), attempt))
                time.sleep(random.uniform(0.0, 1.0))
                worker.kill()
                row = stack.row(upload["id"], "uploads")
                stack.restart(worker)
                if row["state"] != "running":
                    break  # it was done before
                attempt = row["attempt"]
                kills += 1
            ended = stack.ended(upload["links"]["self"])
            assert ended["state"] == "succeeded", ended["problem"]
            wait_for(lambda upload=upload: not (stack.files / "incoming" / upload["id"]).exists(), 10)
            was_taken_in_once(stack, ended, names)
            lost += stack.row(upload["id"], "uploads")["lost_attempts"]
    assert lost == kills
    seen(
        f"ingest killed {kills} times",
        "no double rows",
        f"{uploads} uploads, {lost} attempts lost; each 3,000 files, 3,000 rows, 2,900 images",
    )


def was_taken_in_once(stack: Stack, upload: dict[str, Any], names: list[str]) -> None:
    assert upload["counts"] == {"received": 3000, "accepted": 2900, "duplicate": 100, "rejected": 0, "ignored": 0}
    rows = stack.rows("SELECT filename FROM upload_files WHERE upload_id = %s ORDER BY position", upload["id"])
    assert [row["filename"] for row in rows] == names
    folder = stack.files / "collections" / upload["collection_id"]
    assert sum(1 for found in (folder / "originals").rglob("*") if found.is_file()) == 2900
    assert not list(folder.glob("staging/*"))


def test_an_upload_whose_worker_always_dies_takes_back_what_it_brought(stack: Stack, seen: Seen):
    files = {f"{number:04d}.png": picture(number, size=(64, 64)) for number in range(4500)}
    with stack.workers("ingest") as (worker,):
        upload = stack.upload(zip_of(files))
        upload_id = upload["id"]
        for attempt in range(1, 4):
            wait_for(lambda attempt=attempt: stack.row(upload_id, "uploads")["attempt"] == attempt)
            if attempt == 1:  # once there is something to take back
                wait_for(lambda: stack.row(upload_id, "uploads")["accepted"] > 0, every_s=0.01)
            worker.kill()
            stack.restart(worker)
        ended = stack.ended(upload["links"]["self"])
        wait_for(lambda: not (stack.files / "incoming" / upload_id).exists())
    assert (ended["state"], ended["problem"]["code"]) == ("failed", "worker_lost")
    assert "3 times" in ended["problem"]["detail"]
    assert stack.rows("SELECT count(*) FROM images WHERE upload_id = %s", upload_id)[0]["count"] == 0
    folder = stack.files / "collections" / ended["collection_id"]
    assert [found for found in folder.rglob("*") if found.is_file()] == []
    seen("an ingest that dies every time", "failed after 3 attempts, nothing kept", "worker_lost; 0 images, 0 files")
