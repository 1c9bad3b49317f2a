"""Archives that were made to harm, of our own making."""

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable

from tests.pictures import picture

PICTURE = picture(1)


def tar_entries(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def tar_special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    """One block, whatever its fields say."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


END = bytes(1024)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("pax", len(records), kind) + padded(records)


def record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    size = len(rest)
    while len(str(size)) + len(rest) != size:
        size = len(str(size)) + len(rest)
    return str(size).encode() + rest


def with_pax(records: bytes, name: str = "a.png", content: bytes = PICTURE) -> bytes:
    return pax(records) + header(name, len(content)) + padded(content) + END


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def local_header(name: bytes, crc: int, packed: int, unpacked: int, method: int = 8) -> bytes:
    return struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0, method, 0, 33, crc, packed, unpacked, len(name), 0) + name


def central_header(
    name: bytes, crc: int, packed: int, unpacked: int, offset: int, *, method: int = 8, flags: int = 0
) -> bytes:
    return (
        struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, flags, method, 0, 33, crc, packed, unpacked, len(name), 0, 0, 0,
            0, 0, offset,
        )
        + name
    )  # fmt: skip


def directory(headers: Iterable[bytes], offset: int, *, says: int | None = None) -> bytes:
    """The directory and its end, by ZIP64 where there are more entries than the old form can count."""
    entries = list(headers)
    body = b"".join(entries)
    count = len(entries) if says is None else says
    if count < 0xFFFF:
        return body + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(body), offset, 0)
    return (
        body
        + struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(body), offset)
        + struct.pack("<4sIQI", b"PK\6\7", 0, offset + len(body), 1)
        + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )


def overlap_bomb(members: int, unpacked: int) -> bytes:
    """Many entries of the directory, one kernel: all name the same bytes."""
    zeros = bytes(unpacked)
    kernel, crc = deflated(zeros), zlib.crc32(zeros)
    body = local_header(b"0.png", crc, len(kernel), unpacked) + kernel
    entries = (central_header(b"%d.png" % n, crc, len(kernel), unpacked, 0) for n in range(members))
    return body + directory(entries, len(body))


def quoted_overlap_bomb(members: int, unpacked: int) -> bytes:
    """Each file is a stored block that quotes the header of the next, then the next itself, down to one kernel.

    After David Fifield, A better zip bomb (WOOT 2019): every name and every checksum is right.
    """
    zeros = bytes(unpacked)
    data, crc, size = deflated(zeros), zlib.crc32(zeros), unpacked
    parts: list[tuple[bytes, int, int, int, bytes]] = []
    plain = zeros
    following = b""
    for number in reversed(range(members)):
        name = b"%06d.png" % number
        if following:
            quote = struct.pack("<BHH", 0, len(following), len(following) ^ 0xFFFF) + following
            data = quote + data
            plain = following + plain
            crc, size = zlib.crc32(plain), size + len(following)
        following = local_header(name, crc, len(data), size)
        parts.append((name, crc, len(data), size, following))
        # The next file quotes this one's header, whose bytes come before the data that they describe.
    parts.reverse()
    body = parts[0][4] + data
    offsets, at = [], 0
    for _ in parts:
        offsets.append(at)
        at += 30 + len(parts[0][0]) + 5
    entries = (
        central_header(name, crc, packed, size, offset)
        for (name, crc, packed, size, _), offset in zip(parts, offsets, strict=True)
    )
    return body + directory(entries, len(body))


def many_entries_zip(count: int) -> bytes:
    body = local_header(b"a.png", 0, 0, 0, 0)
    return body + directory([central_header(b"a.png", 0, 0, 0, 0, method=0)] * count, len(body))


def many_entries_tar(count: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar.gz. One flushed piece of a thousand headers, again and again: packing them all would take long."""
    block = header("a.png", 0, kind) * 1000
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    crc = 0
    for _ in range(count // 1000):
        crc = zlib.crc32(block, crc)
    size = len(block) * (count // 1000) + len(END)
    tail = struct.pack("<II", zlib.crc32(END, crc), size & 0xFFFFFFFF)
    return b"\x1f\x8b\x08" + bytes(7) + piece * (count // 1000) + deflated(END) + tail


def encrypted_zip(password: bytes = b"secret") -> bytes:
    """ZipCrypto, as `zip -e` writes it (APPNOTE 6.1)."""
    keys = [0x12345678, 0x23456789, 0x34567890]

    def crc_of(byte: int, crc: int) -> int:
        return zlib.crc32(bytes([byte]), crc ^ 0xFFFFFFFF) ^ 0xFFFFFFFF

    def update(byte: int) -> None:
        keys[0] = crc_of(byte, keys[0])
        keys[1] = ((keys[1] + (keys[0] & 0xFF)) * 134775813 + 1) & 0xFFFFFFFF
        keys[2] = crc_of(keys[1] >> 24, keys[2])

    def encrypt(byte: int) -> int:
        mask = (keys[2] | 2) & 0xFFFF
        update(byte)
        return byte ^ (((mask * (mask ^ 1)) >> 8) & 0xFF)

    for byte in password:
        update(byte)
    crc = zlib.crc32(PICTURE)
    data = bytes(encrypt(byte) for byte in os.urandom(11) + bytes([crc >> 24]) + PICTURE)
    name = b"secret.png"
    local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 1, 0, 0, 33, crc, len(data), len(PICTURE), len(name), 0) + name
    entry = central_header(name, crc, len(data), len(PICTURE), 0, method=0, flags=1)
    body = local + data
    return body + directory([entry], len(body))


def zip_with_names(*names: bytes, flags: int = 0) -> bytes:
    """Good pictures under names of any bytes."""
    body, entries = b"", []
    for number, name in enumerate(names):
        content = picture(100 + number)
        crc = zlib.crc32(content)
        entries.append(central_header(name, crc, len(content), len(content), len(body), method=0, flags=flags))
        body += struct.pack(
            "<4sHHHHHIIIHH", b"PK\3\4", 20, flags, 0, 0, 33, crc, len(content), len(content), len(name), 0
        ) + name + content  # fmt: skip
    return body + directory(entries, len(body))


def gzip_bomb(megabytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = packer.compress(header("zeros.png", megabytes * 1024 * 1024))
    for _ in range(megabytes):
        data += packer.compress(bytes(1024 * 1024))
    return data + packer.compress(END) + packer.flush()
