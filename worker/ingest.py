"""Archive → checked images, thumbnails and the ledger. One upload at a time in a collection.

It works in batches: files go to the disk and through the decoders, then one transaction makes the whole batch
visible and tells how far it came. Killed in between, the next attempt goes on behind the last batch.
"""

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import queue, storage
from app.config import settings
from app.db.session import open_session
from app.db.tables import Upload
from app.services import jobs, ledger
from app.services.ledger import LedgerEntry, NewImage
from worker.archives import (
    NESTED,
    ArchiveError,
    DamagedFileError,
    Entry,
    Limits,
    Reader,
    entries,
    is_archive,
    is_picture,
)
from worker.decode import NOT_AN_IMAGE
from worker.decoders import Answer, DecoderPool
from worker.transactions import is_away, settle

log = structlog.get_logger(__name__)

_BATCH_FILES = 2000
_BATCH_BYTES = 64 * 1024 * 1024
_BLOCK = 1024 * 1024


@dataclass(kw_only=True)
class _File:
    """A file on its way: rejected already, a duplicate, or written and to be decoded."""

    position: int
    name: str
    bytes: int = 0
    sha256: str = ""
    path: str | None = None
    code: str | None = None
    reason: str | None = None

    @property
    def thumbnail(self) -> str:
        return f"{self.path}.jpg"


@dataclass(kw_only=True)
class _Batch:
    files: list[_File] = field(default_factory=list)
    answers: list[Future[list[Answer]]] = field(default_factory=list)
    ignored: int = 0
    progress: float = 0.0


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
    except SQLAlchemyError as error:
        if not is_away(error):
            raise
        # What was committed stands, and the next attempt goes on behind it.
        _give_back(upload, stop)
        return
    except OSError:
        if attempt.is_lost():
            # The next attempt has cleared this one's files away.
            return
        raise
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
        runs = ledger.waiting_runs(session, upload.id)
        following = ledger.next_upload(session, upload.collection_id)
    for run_id in runs:
        queue.ring_run(run_id)
    if following is not None:
        queue.ring_upload(following)


class _Ingest:
    def __init__(self, session: Session, upload: Upload, stop: threading.Event) -> None:
        self._id, self._attempt, self._collection = upload.id, upload.attempt, upload.collection_id
        self._total_bytes = max(1, upload.bytes)
        self._parts, self._stop = ledger.parts(session, upload.id), stop
        self.counts = ledger.counts(session, upload.id)
        self._done = ledger.positions(session, upload.id)
        self._may_repeat = ledger.has_images(session, upload.collection_id)
        self._limits = settings()
        self._ignored = 0
        self._unpacked = 0
        # A folder for each attempt: one that was lost, and does not know yet, must not touch the files of the next.
        self._staging = storage.staging(upload.collection_id) / f"{upload.id}-{upload.attempt}"
        self._shelves: dict[int, str] = {}
        self._folders = _Folders(upload.collection_id)
        self._seen: set[str] = set()
        self._known: dict[str, uuid.UUID] = {}
        self._refused: dict[str, Answer] = {}
        self._last_report = time.monotonic()

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
        decoding: _Batch | None = None
        broken: ArchiveError | None = None
        try:
            for batch in self._batches():
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

    def _batches(self) -> Iterator[_Batch]:
        batch, size = _Batch(), 0
        try:
            for position, entry, progress in self._numbered():
                self._keep_alive()
                if position is None:
                    self._ignored += 1
                    continue
                if position in self._done:
                    continue
                file = self._take(position, entry)
                batch.files.append(file)
                batch.progress, batch.ignored = progress, self._ignored
                size += file.bytes
                if len(batch.files) >= _BATCH_FILES or size >= _BATCH_BYTES:
                    yield batch
                    batch, size = _Batch(), 0
        except ArchiveError:
            yield batch
            raise
        if batch.files:
            yield batch

    def _numbered(self) -> Iterator[tuple[int | None, Entry, float]]:
        """Every entry of every part with its position in the ledger (None for junk) and the progress so far."""
        position, before = 0, 0
        limit = self._limits.max_upload_files
        limits = Limits(
            files=limit,
            unpacked_bytes=self._limits.max_unpacked_bytes,
            ratio=self._limits.max_compression_ratio,
        )
        for part in self._parts:
            if not storage.incoming_part(self._id, part.part).exists():
                raise ArchiveError("upload-lost", f"What was received as {part.filename} is gone; send it again.")
            for entry in entries(storage.incoming_part(self._id, part.part), part.filename, limits):
                if entry.name is None:
                    yield None, entry, 0.0
                    continue
                if position >= limit:
                    raise ArchiveError("too-many-files", f"The upload holds more than {limit} files.")
                yield position, entry, min(0.999, (before + entry.read_so_far) / self._total_bytes)
                position += 1
            before += part.bytes

    def _take(self, position: int, entry: Entry) -> _File:
        """Write and hash one file, unless its content is here already."""
        assert entry.name is not None  # noqa: S101 - junk has no position
        file = _File(position=position, name=entry.name, bytes=entry.size)
        if entry.reader is None:
            file.code, file.reason = entry.code, entry.reason
            return file
        path = f"{self._shelf(position)}/{position}{storage.TEMPORARY_SUFFIX}"
        try:
            written = self._write(file, entry.reader, path)
        except DamagedFileError as error:
            file.code, file.reason, written = "damaged", str(error), os.path.lexists(path)
        if file.code is None and file.sha256 not in self._seen:
            self._seen.add(file.sha256)
            file.path = path
        elif written:
            os.unlink(path)  # noqa: PTH108 - here and below: path objects cost more than the calls
        return file

    def _shelf(self, position: int) -> str:
        """A folder for each batch: reading, decoding and publishing would wait for each other in the same one."""
        number = position // _BATCH_FILES
        if number not in self._shelves:
            folder = self._staging / str(number)
            folder.mkdir()
            self._shelves[number] = str(folder)
        return self._shelves[number]

    def _write(self, file: _File, reader: Reader, path: str) -> bool:
        """Whether a file was written. Bytes are counted as they are read: an archive may lie about its sizes."""
        limit = self._limits.max_image_bytes
        if file.bytes > limit:
            self._count(file, 0)
            file.code, file.reason = "too-many-bytes", f"It has more than {limit} bytes."
            return False
        block = reader.read(_BLOCK)
        if not block or not is_picture(block):
            file.code, file.reason = _no_picture(block)
            self._unpacked += len(block)
            return False
        digest = hashlib.sha256(block)
        file.bytes = 0
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            while block:
                self._count(file, len(block))
                if file.bytes > limit:
                    file.code, file.reason = "too-many-bytes", f"It has more than {limit} bytes."
                    return True
                _write_all(descriptor, block)
                if (block := reader.read(_BLOCK)) != b"":
                    digest.update(block)
                    self._keep_alive()
        finally:
            os.close(descriptor)
        file.sha256 = digest.hexdigest()
        return True

    def _count(self, file: _File, read: int) -> None:
        file.bytes += read
        self._unpacked += read
        whole = self._limits.max_unpacked_bytes
        if self._unpacked > whole:
            raise ArchiveError("too-large", f"Unpacked, the upload has more than {whole} bytes.")

    def _recognise(self, batch: _Batch) -> None:
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

    def _store(self, batch: _Batch) -> None:
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
            storage.publish(moves)
            ledger.add(session, self._collection, self._id, images, rows)
            session.commit()
        self.counts = counts
        if self._stop.is_set():
            raise _StoppingError

    def _judge(
        self, batch: _Batch, decoded: dict[int, Answer]
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

    def _result(self, future: "Future[list[Answer]]") -> list[Answer]:
        """Wait for decoders, and keep the lease meanwhile."""
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
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
            values = {"received": received, "ignored": self._ignored, **self.counts}
            if not jobs.finish(session, Upload, self._id, self._attempt, **values):
                raise _LostError
            ledger.forget_parts(session, self._id)
            session.commit()
        storage.remove(storage.incoming(self._id))

    def fail(self, code: str, detail: str) -> None:
        """End the upload and take back what it brought; a run that waits for it ends with it."""
        with open_session() as session:
            removed = ledger.undo(session, self._id)
            self.counts = {**dict.fromkeys(self.counts, 0), "rejected": self.counts["rejected"]}
            if not jobs.heartbeat(session, Upload, self._id, self._attempt):
                return
            session.commit()
        storage.remove(self._staging.parent)
        # While the upload still runs, no other can bring the same contents into the collection.
        for sha256 in removed:
            for path in self._folders.paths(sha256):
                storage.remove(Path(path))
        if self._attempt > 1:
            self._remove_strangers()
        with open_session() as session:
            problem = {"code": code, "detail": detail}
            values = {"received": self.counts["rejected"], "ignored": self._ignored, **self.counts}
            if not jobs.fail(session, Upload, self._id, self._attempt, problem, **values):
                return
            ledger.forget_parts(session, self._id)
            jobs.fail_runs_of_failed_uploads(session)
            session.commit()
        storage.remove(storage.incoming(self._id))

    def _remove_strangers(self) -> None:
        """Remove files without a row: an attempt that was killed between the two may have left some."""
        for shelf in self._folders.shelves():
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


def _no_picture(head: bytes) -> tuple[str, str]:
    if not head:
        return "empty-file", "It is empty."
    if is_archive(head):
        return NESTED.code, NESTED.reason
    return "not-an-image", NOT_AN_IMAGE


def _write_all(descriptor: int, block: bytes) -> None:
    written = os.write(descriptor, block)
    while written < len(block):
        written += os.write(descriptor, memoryview(block)[written:])
