"""Ingests that fail, are killed, or lose their upload, their database, their disk."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from PIL import Image as Pillow
from sqlalchemy import text
from sqlalchemy.orm import Session

from app import storage
from app.config import settings
from app.db.session import open_session
from app.db.tables import Run, Upload
from app.services import jobs, uploads
from app.services import ledger as ledger_rows
from tests.pictures import encoded, picture, tar_of, two_kinds, zip_of
from tests.worker.ingested import assert_files_match_rows, images, ledger, queued, read, run
from worker import intake
from worker.ingest import ingest

pytestmark = pytest.mark.usefixtures("database")


def test_a_run_that_waits_for_a_failed_upload_fails_too():
    upload_id = queued(("a.zip", zip_of({"a.txt": b"a"})))
    with open_session() as session:
        collection_id = uploads.get(session, upload_id).collection_id
        waiting = Run(id=uuid.uuid4(), collection_id=collection_id, upload_id=upload_id, parameters={})
        session.add(waiting)
        session.commit()
    problem = run(upload_id).problem
    with open_session() as session:
        failed = session.get(Run, waiting.id)
        assert failed is not None
        assert (failed.state, failed.problem["code"]) == ("failed", "upload-failed")
        assert problem["detail"] in failed.problem["detail"]


@pytest.mark.parametrize("more", [False, True])
def test_a_run_over_too_few_images_fails_as_soon_as_they_are_in(*, more: bool):
    upload_id = queued(("a.zip", zip_of(two_kinds(4))))
    with open_session() as session:
        collection_id = uploads.get(session, upload_id).collection_id
        waiting = Run(id=uuid.uuid4(), collection_id=collection_id, upload_id=upload_id, parameters={"clusters": 5})
        session.add(waiting)
        session.commit()
    if more:  # it may bring the fifth
        queued(("b.zip", zip_of(two_kinds(6))), collection_id=collection_id)
    run(upload_id)
    with open_session() as session:
        refused = session.get_one(Run, waiting.id)
        assert refused.state == ("queued" if more else "failed")
        if not more:
            assert refused.problem["code"] == "too-few-images"
            assert refused.problem["detail"] == "5 clusters need at least 5 images; the collection has 4."


def test_a_disk_that_fills_while_files_get_their_names_keeps_none_of_them(monkeypatch: pytest.MonkeyPatch):
    def full(_folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    upload_id = queued(("a.zip", zip_of(two_kinds(30))))
    monkeypatch.setattr(storage, "_sync_file_system", full)
    upload = run(upload_id)
    assert (upload.state, upload.problem["code"]) == ("failed", "storage-full")
    assert [path for path in storage.collection(upload.collection_id).rglob("*") if path.is_file()] == []


def test_a_worker_that_is_told_to_stop_does_not_wait_for_the_decoders():
    flat = encoded(Pillow.new("RGB", (9000, 9000)), "PNG")  # small, and long to decode
    files = {f"{number}.png": flat + bytes([number]) for number in range(40)}
    upload_id = queued(("a.tar", tar_of(files, "w")))
    stop = threading.Event()
    thread = threading.Thread(target=ingest, args=(upload_id, stop))
    thread.start()
    time.sleep(2)
    stop.set()
    asked = time.monotonic()
    thread.join(60)
    assert time.monotonic() - asked < 10
    upload = read(upload_id)
    assert (upload.state, upload.lost_attempts, upload.received) == ("queued", 0, 0)


def test_a_failed_upload_spares_the_images_of_the_ones_before():
    first = run(queued(("a.zip", zip_of(two_kinds(6)))))
    files = two_kinds(30) | {"text.txt": b"t"}
    content = tar_of(dict(reversed(files.items())))[:-300]
    second = run(queued(("b.tar.gz", content), collection_id=first.collection_id))
    assert second.state == "failed"
    assert len(images()) == 6
    assert ledger(second.id) == [("text.txt", "rejected", "not-an-image")]
    assert (second.received, second.rejected, second.accepted, second.duplicate) == (1, 1, 0, 0)
    assert_files_match_rows()


def leave_strangers(collection_id: uuid.UUID) -> None:
    """Files without a row, as an attempt leaves them that is killed before its rows are there."""
    for path in (storage.original, storage.thumbnail):
        stranger = path(collection_id, "ab" * 32)
        stranger.parent.mkdir(parents=True)
        stranger.write_bytes(b"left")


def test_files_that_an_attempt_left_without_rows_go_with_the_failed_upload():
    upload_id = queued(("a.zip", zip_of({"a.txt": b"a"})))
    with open_session() as session:
        upload = uploads.get(session, upload_id)
        upload.attempt = 1
        session.commit()
    leave_strangers(upload.collection_id)
    assert run(upload_id).state == "failed"
    assert_files_match_rows()


def test_files_that_lost_attempts_left_go_with_the_upload_that_is_given_up():
    upload_id = queued(("a.zip", zip_of(two_kinds(2))))
    with open_session() as session:
        upload = uploads.get(session, upload_id)
        upload.attempt = upload.lost_attempts = settings().max_attempts
        session.commit()
    leave_strangers(upload.collection_id)
    assert run(upload_id).problem["code"] == "worker_lost"
    assert_files_match_rows()


@pytest.mark.parametrize("mended", [False, True])
def test_an_ingest_that_breaks_is_tried_again_at_once_and_then_says_whose_fault_it_is(*, mended: bool):
    upload_id = queued(("a.zip", zip_of(two_kinds(6))))
    with open_session() as session:
        obstacle = storage.collection(uploads.get(session, upload_id).collection_id) / "originals"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_bytes(b"a file where a folder should be")
    for attempt in (1, 2):
        upload = run(upload_id)
        assert (upload.state, upload.attempt, upload.lost_attempts) == ("queued", attempt, attempt)
    if mended:
        obstacle.unlink()
    upload = run(upload_id)
    if mended:
        assert (upload.state, upload.accepted, len(images())) == ("succeeded", 6, 6)
        assert_files_match_rows()
    else:
        assert (upload.state, upload.problem["code"], images()) == ("failed", "internal-error", [])
        assert not storage.incoming(upload_id).exists()


def test_what_is_taken_back_is_taken_back_under_the_lease(monkeypatch: pytest.MonkeyPatch):
    """Removing many files takes longer than a lease; and whoever lost it in between must not remove the next one's."""
    monkeypatch.setenv("KINDRED_HEARTBEAT_S", "0.000001")
    settings.cache_clear()
    whole = tar_of({f"{number}.png": picture(number) for number in range(40)}, "w")
    upload_id = queued(("cut.tar", whole[: len(whole) // 2]))
    leases, removed = [], storage.remove

    def remove(path: Path) -> None:
        removed(path)
        if "originals" in path.parts:
            leases.append(read(upload_id).lease_until)
            if len(leases) == 10:
                with open_session() as session:
                    session.get_one(Upload, upload_id).attempt += 1
                    session.commit()

    monkeypatch.setattr(storage, "remove", remove)
    upload = run(upload_id)
    assert len(set(leases)) == 10
    assert upload.state == "running"
    assert images() == []
    left = [path for path in storage.collection(upload.collection_id).rglob("*") if path.is_file()]
    assert len(left) >= 10


def test_an_attempt_that_lost_its_upload_leaves_everything_to_the_next(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINDRED_HEARTBEAT_S", "0.001")
    settings.cache_clear()
    upload_id = queued(("a.zip", zip_of(two_kinds(200))))
    taken = threading.Event()
    take = intake.Intake._take

    def take_over(self: object, position: int, entry: object) -> object:
        if position == 100 and not taken.is_set():
            taken.set()
            with open_session() as session:
                upload = uploads.get(session, upload_id)
                upload.attempt += 1
                session.commit()
        return take(self, position, entry)

    monkeypatch.setattr(intake.Intake, "_take", take_over)
    lost = run(upload_id)
    assert taken.is_set()
    assert (lost.state, lost.received, ledger(upload_id)) == ("running", 0, [])
    assert storage.incoming_part(upload_id, 0).exists()
    with open_session() as session:
        jobs.expire(session, Upload, upload_id, lost.attempt)
        jobs.requeue_lost(session, Upload)
        session.commit()
    assert run(upload_id).accepted == 200
    assert_files_match_rows()


def test_a_lying_size_is_met_by_counting(monkeypatch: pytest.MonkeyPatch):
    """A stream of zeros behind the start of a picture; the tar says so, a zip would not have to."""
    monkeypatch.setenv("KINDRED_MAX_IMAGE_BYTES", "50000")
    settings.cache_clear()
    content = bytearray(zip_of({"lies.png": picture(1)[:100] + bytes(300_000), "good.png": picture(2)}))
    size = (300_100).to_bytes(4, "little")
    content = content.replace(size, (40_000).to_bytes(4, "little"))
    upload = run(queued(("a.zip", bytes(content))))
    assert [code for name, _, code in ledger(upload.id) if name == "good.png"] == [None]
    assert ledger(upload.id)[0][1] == "rejected"
    assert_files_match_rows()


def test_a_disk_that_is_full_fails_the_upload_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int, block: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(intake, "_write_all", full)
    upload = run(queued(("a.zip", zip_of(two_kinds(6)))))
    assert upload.state == "failed"
    assert upload.problem["code"] == "storage-full"
    assert_files_match_rows()


def decoders_of(parent: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", "worker.decode"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
def test_a_killed_decoder_costs_no_file():
    # Large and of one colour: quick to make, and slow enough that the decoders are at work when one is killed.
    files = {
        f"{n}.png": encoded(Pillow.new("RGB", (4000, 4000), (n, 0, 0)), "PNG", compress_level=1) for n in range(40)
    }
    upload_id = queued(("a.zip", zip_of(files)))
    thread = threading.Thread(target=ingest, args=(upload_id, threading.Event()))
    thread.start()
    deadline = time.monotonic() + 20
    while not (children := decoders_of(os.getpid())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(children[0], signal.SIGKILL)
    thread.join(60)
    upload = read(upload_id)
    assert (upload.state, upload.accepted) == ("succeeded", 40)


def test_a_slow_picture_is_given_up_and_the_rest_go_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINDRED_DECODE_TIMEOUT_S", "1.5")
    settings.cache_clear()
    # 10,000 x 10,000 pixels that compress to little and take long.
    slow = encoded(Pillow.new("RGB", (9900, 9900), (200, 30, 40)), "PNG", compress_level=1)
    upload = run(queued(("slow.png", slow), ("good.png", picture(1))))
    outcomes = {name: code for name, _, code in ledger(upload.id)}
    assert outcomes["good.png"] is None
    assert outcomes["slow.png"] in (None, "decoder-timeout", "too-much-memory")


KILLED_INGEST = """
import sys, threading, uuid
from worker import ingest, intake
intake._BATCH_FILES = 20
ingest.ingest(uuid.UUID(sys.argv[1]), threading.Event())
"""


@pytest.mark.slow
def test_an_ingest_that_is_killed_goes_on_without_double_rows(monkeypatch: pytest.MonkeyPatch):
    files = {f"{n}.png": picture(n, size=(300, 300)) for n in range(200)} | {"twice.png": picture(7, size=(300, 300))}
    upload_id = queued(("a.zip", zip_of(files)))
    process = subprocess.Popen([sys.executable, "-c", KILLED_INGEST, str(upload_id)])
    deadline = time.monotonic() + 60
    while read(upload_id).accepted < 20:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    half = read(upload_id)
    assert half.state == "running"
    assert 0 < half.accepted < 200
    with open_session() as session:
        jobs.expire(session, Upload, upload_id, half.attempt)
        jobs.requeue_lost(session, Upload)
        session.commit()
    upload = run(upload_id)
    assert (upload.state, upload.accepted, upload.duplicate) == ("succeeded", 200, 1)
    assert [image.filename for image in images()] == list(files)[:200]
    assert ledger(upload_id) == [(name, "accepted", None) for name in list(files)[:200]] + [
        ("twice.png", "duplicate", None)
    ]
    assert_files_match_rows()


def test_a_database_that_goes_away_while_rows_go_in_gives_the_upload_back(monkeypatch: pytest.MonkeyPatch):
    upload_id = queued(("a.zip", zip_of(two_kinds(6))))
    insert = ledger_rows.insert_rows

    def cut_off(session: Session, statement: str, rows: Iterable[Sequence[object]]) -> None:
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()

        def then_away() -> Iterator[Sequence[object]]:
            yield from rows
            with open_session() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

        insert(session, statement, then_away())

    with monkeypatch.context() as broken:
        broken.setattr(ledger_rows, "insert_rows", cut_off)
        given_back = run(upload_id)
    assert (given_back.state, given_back.lost_attempts, images()) == ("queued", 0, [])
    assert run(upload_id).accepted == 6
    assert_files_match_rows()


def test_what_a_killed_attempt_s_decoders_still_wrote_is_removed(monkeypatch: pytest.MonkeyPatch):
    upload_id = queued(("a.zip", zip_of(two_kinds(6))))
    publish = storage.publish

    def late(moves: list[tuple[str, str]]) -> None:
        late_file = storage.staging(read(upload_id).collection_id) / "of-a-killed-attempt" / "0"
        late_file.parent.mkdir()
        late_file.write_bytes(b"late")
        publish(moves)

    monkeypatch.setattr(storage, "publish", late)
    assert run(upload_id).accepted == 6
    assert_files_match_rows()


def test_a_worker_that_is_told_to_stop_gives_the_upload_back():
    upload_id = queued(("a.zip", zip_of(two_kinds(6))))
    stop = threading.Event()
    stop.set()
    ingest(upload_id, stop)
    assert read(upload_id).state == "queued"
    assert run(upload_id).accepted == 6
    assert_files_match_rows()


def test_a_folder_that_is_gone_is_said(tmp_path: Path):
    upload_id = queued(("a.zip", zip_of(two_kinds(2))))
    storage.remove(storage.incoming(upload_id))
    upload = run(upload_id)
    assert upload.problem is not None
    assert upload.problem["code"] == "upload-lost"
