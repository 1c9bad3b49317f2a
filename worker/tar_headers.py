"""Tar headers, read strictly, at constant memory.

`tarfile` keeps global headers for good, expands the maps of sparse files into lists, and searches pax headers by
patterns that take quadratic time (CVE-2024-6232, in Python before 3.11.10): a few kilobytes of archive then cost
gigabytes or hours. `_proc_member` is where it lets a subclass read headers its own way.
"""

import io
import tarfile
from typing import Self

# Names and attributes of one member, all its headers together; they are held in memory.
MAX_HEADER_BYTES = 1024**2

_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_MAX_DIGITS = 20
_LOOK_BYTES = 32 * 1024**2


class Member(tarfile.TarInfo):
    """Speaks up, by `EOFError`, where `tarfile` takes a broken or missing header for the end of the archive."""

    sparse_file = False

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0:
            raise EOFError("a header of it tells a negative size")
        return member

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except _EndOfTar:
            raise
        except _HeaderError as error:
            raise EOFError(f"a header of it cannot be read ({error})") from error

    def _proc_member(self, archive: "Archive") -> "Member":
        if self.type in _EXTENSIONS:
            _count(archive, self.size)
        if self.type in _PAX:
            return self._read_pax(archive)
        if self.type == tarfile.GNUTYPE_SPARSE:
            return self._skip_sparse_map(archive)
        found: Member = super()._proc_member(archive)  # type: ignore[misc] # typeshed lacks it
        return found

    def _read_pax(self, archive: "Archive") -> "Member":
        """The name and the size of the next member; what global headers say is of no use here."""
        size: int = self._block(self.size)  # type: ignore[attr-defined]
        records = _records(archive.fileobj.read(size)[: self.size])
        member = self.fromtarfile(archive)
        if self.type == tarfile.XGLTYPE:
            return member
        if any(key.startswith(b"GNU.sparse.") for key in records):
            member.sparse_file = True
        name = records.get(b"GNU.sparse.name", records.get(b"path"))
        if name is not None:
            member.name = name.decode("utf-8", "surrogateescape").rstrip("/")
        if b"size" in records and (member.isreg() or member.type not in tarfile.SUPPORTED_TYPES):
            member.size = _number(records[b"size"])
            archive.offset = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return member

    def _skip_sparse_map(self, archive: "Archive") -> "Member":
        more: bool = self._sparse_structs[1]  # type: ignore[attr-defined]
        while more:
            block = archive.fileobj.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                raise EOFError("it ends within a header")
            _count(archive, len(block))
            more = bool(block[504])
        self.sparse_file = True
        self.offset_data = archive.fileobj.tell()
        archive.offset = self.offset_data + self._block(self.size)  # type: ignore[attr-defined]
        return self


class Archive(tarfile.TarFile):
    tarinfo = Member
    # Of the member that is read; whoever asks for the next one sets it to 0 before.
    header_bytes = 0


def holds_more_than(files: int, stream: io.BufferedIOBase) -> bool:
    """Whether a tar begins with more files than that, told in a hundredth of the time of reading its headers.

    It looks on for as long as members are nearly empty. Larger ones cost their sender more than they cost us, and are
    counted as they are read.
    """
    found = position = 0
    while position <= _LOOK_BYTES + 1024 * found:
        block = stream.read(tarfile.BLOCKSIZE)
        digits = block[124:136].strip(b" \0")
        if len(block) < tarfile.BLOCKSIZE or not digits.isdigit():
            return False
        try:
            size = -(-int(digits, 8) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        except ValueError:
            return False
        if size > _LOOK_BYTES or len(stream.read(size)) < size:
            return False
        position += tarfile.BLOCKSIZE + size
        name = block[:100]
        # What macOS adds is not counted.
        found += block[156:157] in b"0\0" and not name.startswith(b"._") and b"/._" not in name
        if found > files:
            return True
    return False


_HeaderError = tarfile.HeaderError
_EndOfTar: type[Exception] = tarfile.EOFHeaderError  # type: ignore[attr-defined] # typeshed lacks it


def _count(archive: "Archive", size: int) -> None:
    archive.header_bytes += size + tarfile.BLOCKSIZE
    if archive.header_bytes > MAX_HEADER_BYTES:
        raise EOFError(f"the headers of a member have more than {MAX_HEADER_BYTES} bytes")


def _records(data: bytes) -> dict[bytes, bytes]:
    """POSIX.1-2017, pax Extended Header: records `LENGTH KEY=VALUE` and a line feed; the length is the record's own."""
    found: dict[bytes, bytes] = {}
    start = 0
    while start < len(data):
        space = data.find(b" ", start, start + _MAX_DIGITS)
        end = start + _number(data[start : max(space, start)])
        if end <= space or data[end - 1 : end] != b"\n":
            raise EOFError("a pax header of it is broken")
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        found[key] = value
        start = end
    return found


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > _MAX_DIGITS:
        raise EOFError("a pax header of it has no number where one belongs")
    return int(digits)
