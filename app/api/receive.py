"""Streams a multipart request to disk, never whole in memory.

Starlette's own form parser keeps a spooled file open for every part and stops at 1,000 of them; an upload may
bring 100,000. The parsing itself is python-multipart's push parser, which keeps a part's headers small.
"""

import errno
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from app import storage
from app.config import settings
from app.errors import Invalid, StorageFull, TooLarge
from app.services.uploads import ReceivedPart

_FEED_BYTES = 1024 * 1024
_MAX_FIELD_BYTES = 64 * 1024
_MAX_FIELDS = 100
_MAX_FILENAME = 4096

FORMATS = "an archive (zip, tar, tar.gz) or a picture (JPEG, PNG, WebP, GIF, BMP, TIFF)"
_SIGNATURES = (
    b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM",
    b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
)  # fmt: skip


@dataclass(kw_only=True)
class Received:
    upload_id: uuid.UUID
    parts: list[ReceivedPart] = field(default_factory=list)
    fields: dict[str, str] = field(default_factory=dict)

    def discard(self) -> None:
        storage.remove(storage.incoming(self.upload_id))


async def receive(request: Request) -> Received:
    """Write the `file` parts of `request` under `storage.incoming`; on any error nothing is kept.

    Raises `Invalid`, `TooLarge` or `StorageFull`, naming the part and the limit.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise Invalid(
            "Send multipart/form-data with one or more `file` parts.",
            code="not-multipart",
            fields={"Content-Type": "multipart/form-data with a boundary"},
        )
    _check_declared_length(request.headers.get("content-length"))
    received = Received(upload_id=uuid.uuid4())
    writer = _PartWriter(received, boundary)
    complete = False
    try:
        await run_in_threadpool(writer.open_folder)
        pending = bytearray()
        async for chunk in request.stream():
            pending += chunk
            if len(pending) >= _FEED_BYTES:
                await run_in_threadpool(writer.feed, bytes(pending))
                pending.clear()
        await run_in_threadpool(writer.feed, bytes(pending))
        await run_in_threadpool(writer.finish)
        complete = True
    except (MultipartParseError, ClientDisconnect) as error:
        raise Invalid(f"The request's multipart body is broken: {error}", code="broken-multipart") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("The service has no room left for this upload.", code="storage-full") from error
        raise
    finally:
        if not complete:
            writer.abandon()
            received.discard()
    return received


def _check_declared_length(declared: str | None) -> None:
    limit = settings().max_upload_bytes
    if declared is not None and declared.isdigit():
        if int(declared) > limit:
            raise _too_large(limit)
        if int(declared) > storage.free_bytes():
            raise StorageFull("The service has no room left for this upload.", code="storage-full")


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"An upload may have at most {limit} bytes.", code="upload-too-large")


class _PartWriter:
    """Callbacks of the push parser: each `file` part to a file, each other part to a field."""

    def __init__(self, received: Received, boundary: bytes) -> None:
        self._received = received
        self._folder: Path = storage.incoming(received.upload_id)
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )
        self._total = 0
        self._ended = False
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""
        self._field: str | None = None
        self._text = bytearray()
        self._file: BinaryIO | None = None
        self._filename = ""
        self._bytes = 0

    def open_folder(self) -> None:
        self._folder.mkdir(parents=True)

    def feed(self, data: bytes) -> None:
        self._total += len(data)
        limit = settings().max_upload_bytes
        if self._total > limit:
            raise _too_large(limit)
        if data:
            self._parser.write(data)

    def finish(self) -> None:
        if not self._ended:
            raise MultipartParseError("it ends before its closing boundary")
        parts = self._received.parts
        if not parts:
            raise Invalid(
                "The request brings no file; send one or more `file` parts.",
                code="no-files",
                fields={"file": f"at least one: {FORMATS}"},
            )
        if len(parts) == 1:
            _check_signature(storage.incoming_part(self._received.upload_id, 0), parts[0].filename)
        storage.make_durable(self._folder)

    def abandon(self) -> None:
        """Close without a word: on a full disk, what is still to be written cannot be."""
        with suppress(OSError):
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _part_begin(self) -> None:
        self._headers = {}
        self._name = self._value = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if filename is None:
            if len(self._received.fields) >= _MAX_FIELDS:
                raise Invalid(f"A form may have at most {_MAX_FIELDS} fields.", code="too-many-fields")
            self._field, self._text = name, bytearray()
            return
        if name != "file":
            raise Invalid(
                f"Files come in parts named `file`, not {name!r}.",
                code="invalid-input",
                fields={name: "unknown"},
            )
        number, limit = len(self._received.parts), settings().max_upload_files
        if number >= limit:
            raise TooLarge(f"An upload may have at most {limit} files.", code="too-many-files")
        self._field = None
        self._filename = _clean(filename.decode("utf-8", "replace")) or f"file-{number + 1}"
        self._bytes = 0
        self._file = storage.incoming_part(self._received.upload_id, number).open("wb")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
            self._bytes += end - start
            return
        self._text += data[start:end]
        if len(self._text) > _MAX_FIELD_BYTES:
            raise Invalid(
                f"The form field {self._field!r} has more than {_MAX_FIELD_BYTES} bytes.",
                code="field-too-large",
            )

    def _part_end(self) -> None:
        if self._file is not None:
            self.close()
            self._received.parts.append(ReceivedPart(filename=self._filename, bytes=self._bytes))
        elif self._field is not None:
            if self._field in self._received.fields:
                raise Invalid(
                    f"The form field {self._field!r} comes twice.",
                    code="invalid-input",
                    fields={self._field: "must be sent once"},
                )
            self._received.fields[self._field] = self._text.decode("utf-8", "replace")

    def _end(self) -> None:
        self._ended = True


def _clean(filename: str) -> str:
    return filename.replace("\x00", "\N{REPLACEMENT CHARACTER}")[:_MAX_FILENAME]


def _check_signature(path: Path, filename: str) -> None:
    """Refuse at once a single file that is nothing we could read; the worker looks closer."""
    with path.open("rb") as file:
        head = file.read(512)
    known = head.startswith(_SIGNATURES) or head[257:262] == b"ustar" or (head[:4] + head[8:12]) == b"RIFFWEBP"
    if known:
        return
    what = "is empty" if not head else f"is not {FORMATS}"
    raise Invalid(f"{filename} {what}.", code="not-an-archive", fields={"file": f"must be {FORMATS}"})
