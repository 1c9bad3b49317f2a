"""Archive → checked images, thumbnails and the ledger. One upload at a time in a collection.

It works in batches: files go to the disk and through the decoders, then one transaction makes the whole batch
visible and tells how far it came. Killed in between, the next attempt goes on behind the last batch.
"""

import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import queue, storage
from app.config import settings
from app.db.session import open_session
from app.db.tables import Run, Upload
from app.errors import Invalid
from app.services import jobs, ledger, runs
from app.services.images import count
from app.services.ledger import LedgerEntry, NewImage
from worker.archives import ArchiveError
from worker.command import INTERNAL_ERROR
from worker.decoders import Answer, DecoderPool
from worker.intake import Batch, Intake
from worker.sweep import lose
from worker.transactions import is_away, settle

log = structlog.get_logger(__name__)


class _LostError(Exception):
    """The upload is no longer this attempt's."""


class _StoppingError(Exception):
    """The worker is told to stop."""


def ingest(upload_id: uuid.UUID, stop: threading.Event) -> None:
    """Execute one attempt of an upload, unless somebody else has it, it is over, or it must wait."""
    with open_session() as session:
        upload = jobs.claim(session, Upload, upload_id)
        if upload is None:
            log.info("nothing_to_claim", upload=str(upload_id))
            return
        attempt = _Ingest(session, upload, stop)
        session.commit()
    log.info("upload_claimed", upload=str(upload_id), attempt=upload.attempt)
    started = time.monotonic()
    try:
        if upload.lost_attempts >= settings().max_attempts:
            attempt.fail("worker_lost", jobs.LOST_DETAIL.format(upload.lost_attempts))
        else:
            attempt.work()
    except _LostError:
        log.warning("upload_lost", upload=str(upload_id), attempt=upload.attempt)
        return
    except _StoppingError:
        _give_back(upload, stop)
        return
    except Exception as error:
        # What was committed stands, and the next attempt goes on behind it.
        if is_away(error):
            _give_back(upload, stop)
            return
        if attempt.is_lost():
            # The next attempt has cleared this one's files away.
            return
        log.exception("ingest_broke", upload=str(upload_id), attempt=upload.attempt)
        if not jobs.is_last(upload):
            lose(Upload, upload_id, upload.attempt, stop)
            return
        attempt.fail(**INTERNAL_ERROR)
    seconds = time.monotonic() - started
    log.info("upload_over", upload=str(upload_id), seconds=round(seconds, 1), **attempt.counts)
    _ring_for_what_waited(upload)


def _give_back(upload: Upload, stop: threading.Event) -> None:
    """Release the upload unharmed, as soon as the database answers."""
    settle(lambda session: jobs.release(session, Upload, upload.id, upload.attempt), stop)
    queue.ring_upload(upload.id)
    log.info("upload_released", upload=str(upload.id), attempt=upload.attempt)


def _ring_for_what_waited(upload: Upload) -> None:
    with open_session() as session:
        following = ledger.next_upload(session, upload.collection_id)
        if following is None:  # which may bring more images
            _refuse_what_has_too_few(session, upload)
        waiting = ledger.waiting_runs(session, upload.id)
        session.commit()
    for run_id in waiting:
        queue.ring_run(run_id)
    if following is not None:
        queue.ring_upload(following)


def _refuse_what_has_too_few(session: Session, upload: Upload) -> None:
    """Say it now: the worker for runs may be busy for hours."""
    found = count(session, upload.collection_id)
    for run_id in ledger.waiting_runs(session, upload.id):
        try:
            runs.check_enough(runs.get(session, run_id).parameters["clusters"], found)
        except Invalid as error:
            jobs.refuse(session, Run, run_id, {"code": error.code, "detail": error.detail})
            log.info("run_refused", run=str(run_id), code=error.code)


class _Ingest:
    def __init__(self, session: Session, upload: Upload, stop: threading.Event) -> None:
        self._id, self._attempt, self._collection = upload.id, upload.attempt, upload.collection_id
        self._parts, self._stop = ledger.parts(session, upload.id), stop
        self.counts = ledger.counts(session, upload.id)
        self._may_repeat = ledger.has_images(session, upload.collection_id)
        self._limits = settings()
        # A folder for each attempt: one that was lost, and does not know yet, must not touch the files of the next.
        self._staging = storage.staging(upload.collection_id) / f"{upload.id}-{upload.attempt}"
        self._intake = Intake(
            upload.id,
            self._parts,
            total_bytes=upload.bytes,
            done=ledger.positions(session, upload.id),
            staging=self._staging,
            keep_alive=self._go_on,
        )
        self._folders = _Folders(upload.collection_id)
        self._known: dict[str, uuid.UUID] = {}
        self._refused: dict[str, Answer] = {}
        self._last_report = time.monotonic()
        self._published = False  # whether this attempt gave files their names

    def work(self) -> None:
        """Take in every file, then end the upload, well or not."""
        try:
            self._take_all()
            self._finish()
        except ArchiveError as error:
            self.fail(error.code, str(error))
        except OSError as error:
            if not storage.is_full(error):
                raise
            self.fail("storage-full", "The service has no room left for these images.")

    def _take_all(self) -> None:
        storage.remove(self._staging.parent)
        self._staging.mkdir(parents=True)
        try:
            with DecoderPool(self._limits) as pool:
                self._work(pool)
        finally:
            storage.remove(self._staging)

    def _work(self, pool: DecoderPool) -> None:
        """One batch is decoded while the next is read and the last is stored."""
        decoding: Batch | None = None
        broken: ArchiveError | None = None
        try:
            for batch in self._intake.batches():
                self._recognise(batch)
                batch.answers = pool.submit([(f.path, f.thumbnail) for f in batch.files if f.path is not None])
                if decoding is not None:
                    self._store(decoding)
                decoding = batch
        except ArchiveError as error:
            broken = error
        # What was read of a broken archive is judged too: the ledger tells of the files that were rejected.
        if decoding is not None:
            self._store(decoding)
        if broken is not None:
            raise broken

    def _recognise(self, batch: Batch) -> None:
        """Spare the decoders what the collection has already."""
        if not self._may_repeat:
            return
        wanted = {file.sha256 for file in batch.files if file.path is not None}
        with open_session() as session:
            self._known.update(ledger.known_images(session, self._collection, wanted))
        for file in batch.files:
            if file.path is not None and file.sha256 in self._known:
                os.unlink(file.path)  # noqa: PTH108
                file.path = None

    def _store(self, batch: Batch) -> None:
        """Make a decoded batch visible: files under their names, then rows, in one transaction."""
        answers = iter([answer for future in batch.answers for answer in self._result(future)])
        decoded = {file.position: next(answers) for file in batch.files if file.path is not None}
        images, rows, moves = self._judge(batch, decoded)
        counts = dict(self.counts)
        for row in rows:
            counts[row.outcome] += 1
        with open_session() as session:
            # First, since it locks the row: nobody can take the upload over while files get their names.
            self._report(session, counts, stage="ingest", progress=batch.progress, ignored=batch.ignored)
            self._published = True
            storage.publish(moves)
            ledger.add(session, self._collection, self._id, images, rows)
            session.commit()
        self.counts = counts
        if self._stop.is_set():
            raise _StoppingError

    def _judge(
        self, batch: Batch, decoded: dict[int, Answer]
    ) -> tuple[list[NewImage], list[LedgerEntry], list[tuple[str, str]]]:
        images: list[NewImage] = []
        rows: list[LedgerEntry] = []
        moves: list[tuple[str, str]] = []
        for file in batch.files:
            entry: dict[str, Any] = {"position": file.position, "filename": file.name, "bytes": file.bytes}
            answer = decoded.get(file.position) or self._refused.get(file.sha256) or {}
            code = file.code or answer.get("code")
            known = self._known.get(file.sha256)
            if code is not None:
                if answer:  # the same content again gets the same answer
                    self._refused[file.sha256] = answer
                reason = file.reason or answer["reason"]
                rows.append(LedgerEntry(**entry, outcome="rejected", reason_code=code, reason=reason))
            elif known is not None:
                rows.append(LedgerEntry(**entry, outcome="duplicate", image_id=known))
            else:
                assert file.path is not None  # noqa: S101 - neither rejected nor known: it was written
                image_id = self._known[file.sha256] = uuid.uuid4()
                images.append(NewImage(id=image_id, sha256=file.sha256, filename=file.name, bytes=file.bytes, **answer))
                rows.append(LedgerEntry(**entry, outcome="accepted", image_id=image_id))
                original, thumbnail = self._folders.paths(file.sha256)
                moves += (file.path, original), (file.thumbnail, thumbnail)
        return images, rows, moves

    def _result(self, future: Future[list[Answer]]) -> list[Answer]:
        """Wait for decoders, and keep the lease meanwhile."""
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                self._go_on()

    def _go_on(self) -> None:
        """Keep the lease, unless the worker is told to stop: what is not stored yet is done again then."""
        if self._stop.is_set():
            raise _StoppingError
        self._keep_alive()

    def _keep_alive(self) -> None:
        """Renew the lease when it is time. A database that is away is tried again later."""
        if time.monotonic() - self._last_report < self._limits.heartbeat_s:
            return
        try:
            with open_session() as session:
                self._report(session, self.counts)
                session.commit()
        except SQLAlchemyError as error:
            log.warning("heartbeat_failed", upload=str(self._id), error=type(error).__name__)
            self._last_report = time.monotonic()

    def _report(self, session: Session, counts: dict[str, int], **values: Any) -> None:
        received = sum(counts.values())
        if not jobs.heartbeat(session, Upload, self._id, self._attempt, received=received, **counts, **values):
            raise _LostError
        self._last_report = time.monotonic()

    def is_lost(self) -> bool:
        with open_session() as session:
            lost = not jobs.heartbeat(session, Upload, self._id, self._attempt)
            session.commit()
        return lost

    def _finish(self) -> None:
        received = sum(self.counts.values())
        if self.counts["accepted"] + self.counts["duplicate"] == 0:
            name = self._parts[0].filename
            if received == 0:
                raise ArchiveError("empty-archive", f"{name} holds no files.")
            raise ArchiveError(
                "no-images",
                f"{name} holds no picture that can be read (JPEG, PNG, WebP, GIF, BMP, TIFF); the ledger says why, "
                f"for each file of the {received} received.",
            )
        with open_session() as session:
            values = {"received": received, "ignored": self._intake.ignored, **self.counts}
            if not jobs.finish(session, Upload, self._id, self._attempt, **values):
                raise _LostError
            ledger.forget_parts(session, self._id)
            # While the row is locked: decoders of an attempt that was killed may have outlived it by a moment.
            storage.remove(self._staging.parent)
            session.commit()
        storage.remove(storage.incoming(self._id))

    def fail(self, code: str, detail: str) -> None:
        """End the upload and take back what it brought; a run that waits for it ends with it."""
        counts = {**dict.fromkeys(self.counts, 0), "rejected": self.counts["rejected"]}
        with open_session() as session:
            self._report(session, counts)  # first, since it locks the row
            removed = ledger.undo(session, self._id)
            session.commit()
        self.counts = counts
        storage.remove(self._staging.parent)
        # While the upload still runs, no other can bring the same contents into the collection.
        for sha256 in removed:
            self._keep_alive()
            for path in self._folders.paths(sha256):
                storage.remove(Path(path))
        if self._published or self._attempt > 1:
            self._remove_strangers()
        with open_session() as session:
            problem = {"code": code, "detail": detail}
            values = {"received": self.counts["rejected"], "ignored": self._intake.ignored, **self.counts}
            if not jobs.fail(session, Upload, self._id, self._attempt, problem, **values):
                return
            ledger.forget_parts(session, self._id)
            jobs.fail_runs_of_failed_uploads(session)
            session.commit()
        storage.remove(storage.incoming(self._id))

    def _remove_strangers(self) -> None:
        """Remove files without a row: a kill between the two, or a full disk, may have left some."""
        for shelf in self._folders.shelves():
            self._keep_alive()
            names = [path for path in shelf.iterdir() if path.is_file()] if shelf.is_dir() else []
            with open_session() as session:
                known = ledger.known_images(session, self._collection, {path.name[:64] for path in names})
            for path in names:
                if path.name[:64] not in known:
                    storage.remove(path)


class _Folders:
    """Where a collection's files go, asked of the storage once for each folder and not for each file."""

    def __init__(self, collection_id: uuid.UUID) -> None:
        self._collection = collection_id
        self._by_prefix: dict[str, tuple[Path, Path]] = {}

    def paths(self, sha256: str) -> tuple[str, str]:
        """Of the original and of the thumbnail. As text: path objects cost more than the renaming."""
        shelves = self._by_prefix.get(sha256[:2])
        if shelves is None:
            original = storage.original(self._collection, sha256)
            thumbnail = storage.thumbnail(self._collection, sha256)
            shelves = self._by_prefix[sha256[:2]] = original.parent, thumbnail.parent
        return f"{shelves[0]}/{sha256}", f"{shelves[1]}/{sha256}.jpg"

    def shelves(self) -> Iterator[Path]:
        for number in range(256):
            prefix = f"{number:02x}"
            self.paths(prefix)
            yield from self._by_prefix[prefix]
