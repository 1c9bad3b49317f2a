"""What an upload brings: the files in its parts, streamed, named for display, never extracted.

Nothing here writes a file, and no name from outside is ever used as a path.
"""

import errno
import gzip
import io
import itertools
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol, Self, cast

from app.letters import controls
from worker.tar_headers import Archive, Member, holds_more_than

MAX_NAME = 1024
# A part of the path that is `__MACOSX` or begins with a dot (but for `.` and `..`); what Windows adds to folders.
_JUNK_NAME = re.compile(
    r"(?:^|[/\\])(?:__MACOSX(?:[/\\]|$)|\.(?!\.?(?:[/\\]|$))|(?:thumbs\.db|desktop\.ini)$)", re.IGNORECASE
)
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".gz", ".7z", ".rar", ".bz2", ".xz", ".zst")
_ZIP = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
_GZIP = b"\x1f\x8b"
_OTHER_ARCHIVES = (b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
_PICTURES = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM",
    b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+",
)  # fmt: skip
# What unpacks to less is no bomb, however well it shrinks: a few flat drawings do that.
_BOMB_BYTES = 256 * 1024**2
# Folders and what systems add stand in the directory of a zip besides its files.
_ENTRIES_PER_FILE = 3
_SPARE_ENTRIES = 1000


class ArchiveError(Exception):
    """An archive that cannot be read to its end; `code` and the message are for its sender."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class DamagedFileError(Exception):
    """One file of an archive is broken; the others can be read."""


class Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    files: int
    unpacked_bytes: int
    ratio: float = 200.0
    """Pictures hardly shrink: a whole archive that unpacks to more times its size is a bomb, once it is large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file of an upload: bytes to read, or the reason why it is none; `None` for junk that is only counted.

    `size` is what the archive says, and may be a lie.
    """

    name: str | None
    size: int = 0
    reader: Reader | None = None
    code: str = ""
    reason: str = ""
    read_so_far: int = 0

    def named(self, name: str, size: int) -> Self:
        return replace(self, name=name, size=size)


_JUNK = Entry(name=None)
_OUTSIDE = Entry(
    name=None, code="unsafe-name", reason="Its name leads out of the archive: it is absolute, or has `..` in it."
)
NESTED = Entry(name=None, code="archive-in-archive", reason="It is an archive inside the archive; send it on its own.")


def is_picture(head: bytes) -> bool:
    """Whether a file with these first bytes can be a picture in a format that is read."""
    return head.startswith(_PICTURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def is_archive(head: bytes) -> bool:
    return head.startswith((*_ZIP, _GZIP, *_OTHER_ARCHIVES)) or head[257:262] == b"ustar"


def entries(
    path: Path, filename: str, limits: Limits, keep_alive: Callable[[], None] = lambda: None
) -> Iterator[Entry]:
    """The files of one part: the members of an archive, or the part itself.

    Read each entry before asking for the next. `keep_alive` is called now and then while a tar is read, also where
    nobody asked for what is read. Raises `ArchiveError`, and what `keep_alive` raises.
    """
    with path.open("rb") as file:
        head = file.read(512)
    name = display_name(filename)
    if head.startswith(_ZIP):
        found = _zip_entries(path, name, limits)
    elif head.startswith(_GZIP) or _is_tar(head):
        found = _tar_entries(path, name, limits, keep_alive, compressed=head.startswith(_GZIP))
    elif not is_picture(head) and (is_archive(head) or name.lower().endswith(_ARCHIVE_SUFFIXES)):
        raise ArchiveError("not-an-archive", f"{name} is not an archive that is read: zip, tar or tar.gz.")
    elif is_junk(filename):
        yield _JUNK
        return
    else:
        with path.open("rb") as file:
            yield Entry(name=name, size=path.stat().st_size, reader=file)
        return
    try:
        yield from found
    except (
        tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RecursionError,
        NotImplementedError,
    ) as error:  # fmt: skip
        _raise_ours(error)
        raise _damaged(name, error) from error


def _is_tar(head: bytes) -> bool:
    if head[257:262] == b"ustar":
        return True
    try:  # the oldest tars have no signature, only a checksum
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _Directory(io.BufferedReader):
    """Refuses a zip's directory that is too large before `zipfile` makes an object of each of its entries."""

    def __init__(self, path: Path, filename: str, limits: Limits) -> None:
        super().__init__(path.open("rb", buffering=0))
        self._most = _ENTRIES_PER_FILE * limits.files + _SPARE_ENTRIES
        self._refusal = _too_many(filename, limits)
        self.read_by_zipfile = False

    def read(self, size: int | None = -1, /) -> bytes:
        if self.read_by_zipfile:
            return super().read(size)
        if size is not None and size > self._most * 1024:
            raise self._refusal
        data = super().read(size)
        if data.count(b"PK\1\2") > self._most:
            raise self._refusal
        return data


def _too_many(filename: str, limits: Limits) -> ArchiveError:
    return ArchiveError("too-many-files", f"{filename} holds more than {limits.files} files.")


def _zip_entries(path: Path, filename: str, limits: Limits) -> Iterator[Entry]:
    with _Directory(path, filename, limits) as file, zipfile.ZipFile(file) as archive:
        file.read_by_zipfile = True
        members = archive.infolist()
        if not members:
            raise ArchiveError("empty-archive", f"{filename} is an empty archive.")
        _check_directory(members, path.stat().st_size, filename, limits)
        for member in members:
            if _is_folder(member) or is_junk(member.filename):
                yield _JUNK
                continue
            name = display_name(_zip_name(member))
            mode = member.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                yield _not_a_file(name)
            elif leads_out(member.orig_filename):
                yield _OUTSIDE.named(name, member.file_size)
            elif member.flag_bits & 0x1:
                yield Entry(
                    name=name, size=member.file_size, code="encrypted",
                    reason="It is encrypted; send it without a password.",
                )  # fmt: skip
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # The decompressors of the others take as much memory as a file tells them to.
                yield Entry(
                    name=name, size=member.file_size, code="unsupported-compression",
                    reason="It is compressed by a method that is not read; use deflate, or none.",
                )  # fmt: skip
            elif name.lower().endswith(_ARCHIVE_SUFFIXES):
                yield NESTED.named(name, member.file_size)
            else:
                yield from _zip_member(archive, member, name)


def _zip_name(member: zipfile.ZipInfo) -> str:
    """Names are CP437 unless a bit says UTF-8, which not all who write UTF-8 set."""
    name = member.orig_filename
    if not member.flag_bits & 0x800:
        with suppress(UnicodeError):
            return name.encode("cp437").decode("utf-8")
    return name


def _is_folder(member: zipfile.ZipInfo) -> bool:
    """`ZipInfo.is_dir` of Python 3.11 fails for a name of no characters."""
    return member.filename.endswith("/")


def _check_directory(members: list[zipfile.ZipInfo], size: int, filename: str, limits: Limits) -> None:
    """What the directory itself gives away; sizes that lie are met by whoever counts the bytes."""
    files = sum(not _is_folder(member) and not is_junk(member.filename) for member in members)
    if files > limits.files:
        raise ArchiveError("too-many-files", f"{filename} holds {files} files; at most {limits.files} are taken.")
    if sum(member.compress_size for member in members) > size:
        raise ArchiveError("archive-damaged", f"{filename} is damaged: its members overlap.")
    _check_unpacked(sum(member.file_size for member in members), size, filename, limits)


def _check_unpacked(unpacked: int, packed: int, filename: str, limits: Limits) -> None:
    if unpacked > limits.unpacked_bytes:
        raise ArchiveError("too-large", f"{filename} unpacks to more than {limits.unpacked_bytes} bytes.")
    if unpacked > max(_BOMB_BYTES, packed * limits.ratio):
        raise ArchiveError(
            "too-large", f"{filename} unpacks to more than {limits.ratio:g} times its size; pictures do not do that."
        )


def _zip_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> Iterator[Entry]:
    """One member; a broken one is a rejected file, and the others go on."""
    try:
        reader = archive.open(member)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError, EOFError) as error:
        reason = f"The archive's entry is damaged: {_printable(str(error))}"
        yield Entry(name=name, size=member.file_size, code="damaged", reason=reason)
        return
    with reader:
        so_far = member.header_offset + member.compress_size
        yield Entry(name=name, size=member.file_size, reader=_ZipReader(reader), read_so_far=so_far)


class _ZipReader:
    __slots__ = ("_reader",)

    def __init__(self, reader: IO[bytes]) -> None:
        self._reader = reader

    def read(self, size: int, /) -> bytes:
        try:
            return self._reader.read(size)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise DamagedFileError(f"The archive's entry is damaged: {_printable(str(error))}") from error


class _Heard:
    """A stream that says with each block that it is being read: behind a large member comes nothing for minutes."""

    __slots__ = ("_keep_alive", "_stream", "tell")

    def __init__(self, stream: IO[bytes], keep_alive: Callable[[], None]) -> None:
        self._stream, self._keep_alive, self.tell = stream, keep_alive, stream.tell

    def read(self, size: int = -1, /) -> bytes:
        self._keep_alive()
        return self._stream.read(size)


def _tar_entries(
    path: Path, filename: str, limits: Limits, keep_alive: Callable[[], None], *, compressed: bool
) -> Iterator[Entry]:
    """Members in stream order, so that a tar of any size takes the memory of one header."""
    empty, packed = True, path.stat().st_size
    # A damaged one is met, and told, by the reading below.
    with suppress(EOFError, OSError, zlib.error), gzip.open(path) if compressed else path.open("rb") as look:
        if holds_more_than(limits.files, look):
            raise _too_many(filename, limits)
    with ExitStack() as stack:
        raw: IO[bytes] = stack.enter_context(path.open("rb"))
        unpacked = cast("IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=raw))) if compressed else raw
        stream = cast("IO[bytes]", _Heard(unpacked, keep_alive))
        with closing(Archive.open(fileobj=stream, mode="r|")) as archive:
            for member in _members(archive, filename, limits):
                empty = False
                _check_unpacked(member.offset_data + member.size, packed, filename, limits)
                if member.isdir() or is_junk(member.name):
                    yield _JUNK
                    continue
                name = display_name(member.name)
                if not member.isreg() or member.sparse_file:
                    yield _not_a_file(name)
                elif leads_out(member.name):
                    yield _OUTSIDE.named(name, member.size)
                elif name.lower().endswith(_ARCHIVE_SUFFIXES):
                    yield NESTED.named(name, member.size)
                else:
                    reader = archive.extractfile(member)  # a stream; nothing is written
                    yield Entry(
                        name=name, size=member.size, read_so_far=raw.tell(),
                        reader=_TarReader(reader, member.size, filename),
                    )  # fmt: skip
        _drain(stream, packed, filename, limits)
    if empty:
        raise ArchiveError("empty-archive", f"{filename} is an empty archive.")


def _members(archive: Archive, filename: str, limits: Limits) -> Iterator[Member]:
    most = _ENTRIES_PER_FILE * limits.files + _SPARE_ENTRIES
    for number in itertools.count():
        archive.header_bytes = 0
        if (member := archive.next()) is None:
            return
        if number >= most:
            raise _too_many(filename, limits)
        archive.members.clear()  # type: ignore[attr-defined] # it would keep every header
        assert isinstance(member, Member)  # noqa: S101 - it was told to make these
        yield member


def _drain(stream: IO[bytes], packed: int, filename: str, limits: Limits) -> None:
    """Read behind the last member: only there does gzip's checksum stand."""
    unpacked = stream.tell()
    while block := stream.read(1024 * 1024):
        unpacked += len(block)
        _check_unpacked(unpacked, packed, filename, limits)


class _TarReader:
    """A tar member that must have all its bytes: tarfile itself ends a cut one early without a word."""

    __slots__ = ("_filename", "_left", "_reader")

    def __init__(self, reader: IO[bytes] | None, size: int, filename: str) -> None:
        self._reader, self._left, self._filename = reader, size, filename

    def read(self, size: int, /) -> bytes:
        try:
            data = b"" if self._reader is None else self._reader.read(size)
            self._left -= len(data)
            if not data and self._left > 0:
                raise EOFError(f"{self._left} bytes are missing")  # noqa: TRY301
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            _raise_ours(error)
            raise _damaged(self._filename, error) from error
        return data


def _raise_ours(error: Exception) -> None:
    """What the machine says (too many open files, a disk that cannot be read) is not the archive's fault."""
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        raise error


def _damaged(filename: str, error: Exception) -> ArchiveError:
    return ArchiveError("archive-damaged", f"{filename} is damaged or cut short: {_printable(str(error))}.")


def _not_a_file(name: str) -> Entry:
    return Entry(name=name, code="not-a-file", reason="It is a link or a device, not a file.")


def _printable(message: str) -> str:
    """An error's text, which may quote bytes of the archive."""
    return "".join(letter if letter.isprintable() else "?" for letter in message[:200])


def is_junk(name: str) -> bool:
    """What systems leave in archives and nobody means to send."""
    return _JUNK_NAME.search(name) is not None


def leads_out(name: str) -> bool:
    """Whether a member's name is absolute or climbs; nothing of it is used as a path, but nobody means well by it."""
    name = name.replace("\\", "/")
    return name.startswith("/") or re.match(r"[A-Za-z]:", name) is not None or ".." in name.split("/")


def display_name(name: str) -> str:
    """A name that can be shown and stored: relative, without `..`, characters that control or broken encoding."""
    if not name.isprintable():
        bad = {ord(letter) for letter in name if controls(letter)}
        name = name.translate(dict.fromkeys(bad, "\N{REPLACEMENT CHARACTER}"))
    name = re.sub(r"^[A-Za-z]:", "", name.replace("\\", "/"))
    name = "/".join(part for part in name.split("/") if part not in ("", ".", "..")) or "unnamed"
    if len(name) > MAX_NAME:
        tail = 64  # keeps the extension
        name = name[: MAX_NAME - tail - 1] + "\N{HORIZONTAL ELLIPSIS}" + name[-tail:]
    return name
