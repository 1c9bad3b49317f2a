"""Pictures made to harm, of our own making, through the real ingest: each gets its row, and no process dies of it."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import PngImagePlugin

from tests.pictures import encoded, picture, zip_of
from tests.worker.ingested import assert_files_match_rows, ledger, queued, run

pytestmark = pytest.mark.usefixtures("database")

SMALL = Pillow.new("RGB", (20, 12), (200, 30, 40))
ACCEPTED = None


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*extra: bytes, width: int = 4, height: int = 4, rows: bytes | None = None) -> bytes:
    """Eight-bit gray."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = zlib.compress((b"\0" + bytes(width)) * height if rows is None else rows)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 1, 1, 0, 0)
    )


def gif(width: int, height: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0;"


def tiff(*entries: tuple[int, int, int, int], next_directory: int = 0) -> bytes:
    """One directory: tag, type, count, value."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + body + struct.pack("<I", next_directory)


def tiff_of(width: int, height: int) -> bytes:
    return tiff(
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 0),
        (277, 3, 1, 1),
        (279, 4, 1, 2**31 - 1),
    )


def jpeg_that_claims(width: int, height: int) -> bytes:
    content = bytearray(encoded(SMALL, "JPEG"))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def many_frames(encoding: str, count: int) -> bytes:
    frames = [Pillow.fromarray(np.full((2, 2), n % 256, np.uint8)) for n in range(count)]
    return encoded(frames[0], encoding, save_all=True, append_images=frames[1:])


def with_exif(data: bytes) -> bytes:
    content = encoded(SMALL, "JPEG")
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 8) + b"Exif\0\0" + data + content[2:]


def loop_of_directories() -> bytes:
    content = bytearray(tiff_of(2, 2))
    content[-4:] = struct.pack("<I", 8)
    return bytes(content)


def text_bomb(kind: bytes) -> bytes:
    return chunk(kind, b"Comment\0\0" + zlib.compress(bytes(80 * 1024 * 1024), 9))


def metadata(size: int) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("note", "x" * size)
    return info


TOO_MANY = {"too-many-pixels"}
BROKEN = {"damaged", "truncated", "not-an-image", "too-much-memory"}


def pictures() -> dict[str, tuple[bytes, set[str] | None]]:
    """What every picture may be rejected for. Made when asked for: it takes seconds, and every process imports this."""
    return {
        # Floods: a header of some bytes that asks for gigabytes.
        "flood.png": (png(width=60_000, height=60_000, rows=b""), TOO_MANY),
        "flood-2.png": (png(width=2**31 - 1, height=2**31 - 1, rows=b""), TOO_MANY | BROKEN),
        "flood.bmp": (bmp(40_000, 40_000), TOO_MANY),
        "flood-upside-down.bmp": (bmp(40_000, -40_000), TOO_MANY),
        "flood-negative.bmp": (bmp(-5, 5), TOO_MANY),
        "flood.gif": (gif(65_535, 65_535), TOO_MANY),
        "flood.tif": (tiff_of(2**31 - 1, 2**31 - 1), TOO_MANY | BROKEN),
        "flood.jpg": (jpeg_that_claims(65_000, 65_000), TOO_MANY),
        "flood-nearly.png": (png(width=9_999, height=9_999, rows=b""), BROKEN),
        "no-width.png": (png(width=0, height=5, rows=b""), BROKEN),
        # Bombs beside the pixels.
        "text-bomb.png": (png(text_bomb(b"zTXt")), BROKEN),
        "profile-bomb.png": (png(text_bomb(b"iCCP")), BROKEN),
        "many-texts.png": (png(*[chunk(b"tEXt", b"k%d\0" % n + b"x" * 900_000) for n in range(80)]), BROKEN),
        "rows-without-end.png": (png(rows=bytes(50 * 1024 * 1024)), None),
        "one-long-text.png": (encoded(SMALL, "PNG", pnginfo=metadata(500_000)), ACCEPTED),
        # Cut, damaged, or something else.
        "cut.jpg": (picture(1, size=(300, 200), encoding="JPEG")[:2000], BROKEN),
        "cut.png": (picture(1, size=(300, 200))[:2000], BROKEN),
        "only-a-signature.png": (b"\x89PNG\r\n\x1a\n", BROKEN),
        "only-a-signature.webp": (b"RIFF\xff\xff\xff\xffWEBPVP8 ", BROKEN),
        "renamed-png.jpg": (encoded(SMALL, "PNG"), ACCEPTED),
        "renamed-jpeg": (encoded(SMALL.rotate(90), "JPEG"), ACCEPTED),
        "page.png": (b"<html><script>alert(1)</script>", {"not-an-image"}),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", {"not-an-image"}),
        "printed.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", {"not-an-image"}),
        "icon.ico": (encoded(SMALL, "ICO"), {"not-an-image"}),
        "page-in-a-gif.gif": (encoded(SMALL, "GIF") + b"<script>alert(1)</script>", ACCEPTED),
        # Loops, frames and metadata.
        "loop.tif": (loop_of_directories(), ACCEPTED),
        "frames.gif": (many_frames("GIF", 3000), ACCEPTED),
        "frames.png": (many_frames("PNG", 2000), ACCEPTED),
        "frames.tif": (many_frames("TIFF", 500), ACCEPTED),
        "frames.webp": (many_frames("WEBP", 500), ACCEPTED),
        "exif-cut.jpg": (with_exif(b"II*\0"), ACCEPTED),
        "exif-noise.jpg": (with_exif(bytes(range(256)) * 3), ACCEPTED),
        "exif-loop.jpg": (with_exif(tiff((0x8769, 4, 1, 8), next_directory=8)), ACCEPTED),
        "exif-far.jpg": (with_exif(tiff((0x0112, 3, 2**31, 2**31))), ACCEPTED),
        "exif-orientation-99.jpg": (with_exif(tiff((0x0112, 3, 1, 99))), ACCEPTED),
        "nan.tif": (encoded(Pillow.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), {"damaged"}),
        "infinite.tif": (encoded(Pillow.fromarray(np.full((4, 4), np.inf, np.float32)), "TIFF"), {"damaged"}),
        "largest.tif": (encoded(Pillow.fromarray(np.full((4, 4), 3e38, np.float32)), "TIFF"), ACCEPTED),
        "one-pixel.png": (encoded(Pillow.new("1", (1, 1)), "PNG"), ACCEPTED),
        "thin.png": (encoded(Pillow.new("L", (60_000, 1)), "PNG"), ACCEPTED),
        "good.png": (picture(5), ACCEPTED),
    }  # fmt: skip


def test_each_picture_gets_its_row_and_no_process_dies():
    odd = pictures()
    upload = run(queued(("odd.zip", zip_of({name: content for name, (content, _) in odd.items()}))))
    assert upload.state == "succeeded"
    found = {name: code for name, _, code in ledger(upload.id)}
    assert list(found) == list(odd)
    wrong = {
        name: code
        for name, code in found.items()
        if (code not in wanted if (wanted := odd[name][1]) else code is not ACCEPTED)
    }
    assert wrong == {}
    assert_files_match_rows()


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_with_any_byte_changed_is_accepted_or_rejected(encoding: str):
    """Two hundred of each format; the ingest goes on through all of them."""
    whole = encoded(Pillow.open(io.BytesIO(picture(3, size=(32, 24)))), encoding)
    random = np.random.default_rng(7)
    files = {}
    for number in range(200):
        content = bytearray(whole)
        for place in random.integers(4, len(content), 3):
            content[place] ^= int(random.integers(1, 256))
        files[f"{number}.bin"] = bytes(content)
    upload = run(queued(("changed.zip", zip_of(files | {"good.png": picture(5)}))))
    assert upload.state == "succeeded"
    assert upload.received == 201
    assert {code for _, _, code in ledger(upload.id)} <= {None, "too-many-pixels", *BROKEN}
    assert_files_match_rows()
