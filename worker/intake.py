"""Archive → files on the disk, hashed, in batches, each file with its place in the ledger.

Nothing here decodes a picture or writes to the database.
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from app import storage
from app.config import settings
from app.db.tables import UploadPart
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
from worker.decoders import Answer

_BATCH_FILES = 2000
_BATCH_BYTES = 64 * 1024 * 1024
_BLOCK = 1024 * 1024


@dataclass(kw_only=True)
class File:
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
class Batch:
    files: list[File] = field(default_factory=list)
    answers: list[Future[list[Answer]]] = field(default_factory=list)
    ignored: int = 0
    progress: float = 0.0


class Intake:
    """The files of an upload, taken out of its parts into the folder `staging`.

    `done` are positions that an earlier attempt has stored: they are passed over. `keep_alive` is called often.
    """

    def __init__(
        self,
        upload_id: uuid.UUID,
        parts: Sequence[UploadPart],
        *,
        total_bytes: int,
        done: set[int],
        staging: Path,
        keep_alive: Callable[[], None],
    ) -> None:
        self._id, self._parts, self._total_bytes = upload_id, parts, max(1, total_bytes)
        self._done, self._staging, self._keep_alive = done, staging, keep_alive
        self._limits = settings()
        self.ignored = 0
        self._unpacked = 0
        self._shelves: dict[int, str] = {}
        self._seen: set[str] = set()

    def batches(self) -> Iterator[Batch]:
        batch, size = Batch(), 0
        try:
            for position, entry, progress in self._numbered():
                self._keep_alive()
                if position is None:
                    self.ignored += 1
                    continue
                if position in self._done:
                    continue
                file = self._take(position, entry)
                batch.files.append(file)
                batch.progress, batch.ignored = progress, self.ignored
                size += file.bytes
                if len(batch.files) >= _BATCH_FILES or size >= _BATCH_BYTES:
                    yield batch
                    batch, size = Batch(), 0
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
            for entry in entries(storage.incoming_part(self._id, part.part), part.filename, limits, self._keep_alive):
                if entry.name is None:
                    yield None, entry, 0.0
                    continue
                if position >= limit:
                    raise ArchiveError("too-many-files", f"The upload holds more than {limit} files.")
                yield position, entry, min(0.999, (before + entry.read_so_far) / self._total_bytes)
                position += 1
            before += part.bytes

    def _take(self, position: int, entry: Entry) -> File:
        """Write and hash one file, unless its content is here already."""
        assert entry.name is not None  # noqa: S101 - junk has no position
        file = File(position=position, name=entry.name, bytes=entry.size)
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

    def _write(self, file: File, reader: Reader, path: str) -> bool:
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

    def _count(self, file: File, read: int) -> None:
        file.bytes += read
        self._unpacked += read
        whole = self._limits.max_unpacked_bytes
        if self._unpacked > whole:
            raise ArchiveError("too-large", f"Unpacked, the upload has more than {whole} bytes.")


_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")
HEIC_NOT_READ = (
    "It is a HEIC or AVIF picture, as phones take them, which is not read; save it as JPEG and send that: phones and "
    "photo programs do so when they export."
)


def _is_heif(head: bytes) -> bool:
    """Whether these are the first bytes of a HEIC or AVIF picture: an ISO file whose major brand says so."""
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF


def _no_picture(head: bytes) -> tuple[str, str]:
    if not head:
        return "empty-file", "It is empty."
    if is_archive(head):
        return NESTED.code, NESTED.reason
    if _is_heif(head):
        return "heic-not-read", HEIC_NOT_READ
    return "not-an-image", NOT_AN_IMAGE


def _write_all(descriptor: int, block: bytes) -> None:
    written = os.write(descriptor, block)
    while written < len(block):
        written += os.write(descriptor, memoryview(block)[written:])
