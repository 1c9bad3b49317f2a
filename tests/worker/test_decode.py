"""Decoding: every mode and orientation against known colours, and children that stall, die or starve."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from app.config import Settings
from tests.pictures import picture as sample
from worker import decoders
from worker.decode import RejectedError, picture
from worker.decoders import ClosedError, Decoder, DecoderPool, DecoderStartError

RED = (200, 30, 40)


def encoded(image: Pillow.Image, encoding: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


def thumbnail(content: bytes, *, max_pixels: int = 10**8, side: int = 64) -> tuple[dict[str, object], np.ndarray]:
    answer, small = picture(io.BytesIO(content), max_pixels=max_pixels, thumbnail_pixels=side)
    with Pillow.open(io.BytesIO(small)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        return answer, np.asarray(image, dtype=int)


def quarters(mode: str = "RGB") -> Pillow.Image:
    """Red top left, green top right, blue below left, white below right; 60 x 40."""
    image = Pillow.new("RGB", (60, 40), "white")
    for box, colour in (((0, 0, 30, 20), "red"), ((30, 0, 60, 20), "lime"), ((0, 20, 30, 40), "blue")):
        image.paste(colour, box)
    return image.convert(mode)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_each_orientation_is_undone(encoding: str, orientation: int):
    turn = {
        2: Pillow.Transpose.FLIP_LEFT_RIGHT,
        3: Pillow.Transpose.ROTATE_180,
        4: Pillow.Transpose.FLIP_TOP_BOTTOM,
        5: Pillow.Transpose.TRANSPOSE,
        6: Pillow.Transpose.ROTATE_90,  # what the camera did; the reader turns it back
        7: Pillow.Transpose.TRANSVERSE,
        8: Pillow.Transpose.ROTATE_270,
    }.get(orientation)
    stored = quarters() if turn is None else quarters().transpose(turn)
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    answer, pixels = thumbnail(encoded(stored, encoding, exif=exif))
    assert (answer["width"], answer["height"]) == (60, 40)
    wanted = np.asarray(quarters(), dtype=int)
    for y, x in ((10, 15), (10, 45), (30, 15), (30, 45)):
        assert np.abs(pixels[y, x] - wanted[y, x]).max() < 40


def test_a_big_picture_keeps_its_size_on_paper():
    answer, pixels = thumbnail(encoded(Pillow.new("RGB", (1600, 800), RED), "JPEG"))
    assert answer == {"width": 1600, "height": 800, "format": "JPEG"}
    assert pixels.shape == (32, 64, 3)
    assert np.abs(pixels - np.array(RED)).max() < 6


def test_a_thin_picture_keeps_a_pixel():
    _, pixels = thumbnail(encoded(Pillow.new("RGB", (5000, 2), RED), "PNG"))
    assert pixels.shape == (1, 64, 3)


@pytest.mark.parametrize(
    ("encoding", "image", "gray"),
    [
        ("PNG", Pillow.new("1", (20, 20), 1), 255),
        ("PNG", Pillow.new("L", (20, 20), 90), 90),
        ("PNG", Pillow.new("LA", (20, 20), (0, 0)), 255),
        ("PNG", Pillow.new("LA", (20, 20), (90, 255)), 90),
        ("PNG", Pillow.new("RGBA", (20, 20), (0, 0, 0, 128)), 127),
        ("PNG", Pillow.fromarray(np.full((20, 20), 0x8000, np.uint16)), 128),
        ("TIFF", Pillow.fromarray(np.full((20, 20), 0x4000, np.uint16)), 64),
        ("TIFF", Pillow.fromarray(np.full((300, 200), 0x4000, np.uint16)), 64),
        ("TIFF", Pillow.fromarray(np.repeat([[-2.0, 6.0]], 200, 0).repeat(100, 1).astype(np.float32)), 127),
        ("TIFF", Pillow.fromarray(np.repeat([[-7, 9]], 200, 0).repeat(100, 1).astype(np.int32)), 127),
        ("TIFF", Pillow.new("CMYK", (20, 20), (0, 0, 0, 255)), 0),
        ("TIFF", Pillow.new("YCbCr", (20, 20), (90, 128, 128)), 90),
        ("TIFF", Pillow.new("LAB", (20, 20), (255, 128, 128)), 255),
    ],
    ids=lambda value: value.mode if isinstance(value, Pillow.Image) else str(value),
)
def test_modes(encoding: str, image: Pillow.Image, gray: int):
    assert thumbnail(encoded(image, encoding))[1].mean() == pytest.approx(gray, abs=3)


def test_a_transparent_palette_colour_is_white():
    image = Pillow.new("P", (20, 20), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    assert thumbnail(encoded(image, "PNG", transparency=0))[1].mean() == pytest.approx(255, abs=1)
    assert thumbnail(encoded(image, "GIF", transparency=0))[1].mean() == pytest.approx(255, abs=1)


def test_of_an_animation_the_first_frame():
    frames = [Pillow.new("RGB", (20, 20), colour) for colour in (RED, "blue", "green")]
    for encoding in ("GIF", "WEBP", "PNG", "TIFF"):
        content = encoded(frames[0], encoding, save_all=True, append_images=frames[1:])
        assert np.abs(thumbnail(content)[1].mean(axis=(0, 1)) - np.array(RED)).max() < 12


def test_the_thumbnail_tells_nothing_of_the_original():
    exif = Pillow.Exif()
    exif[0x010E] = "SECRET"
    content = encoded(quarters(), "JPEG", exif=exif, comment=b"SECRET", icc_profile=b"SECRET" * 30, dpi=(301, 301))
    _, small = picture(io.BytesIO(content), max_pixels=10**6, thumbnail_pixels=64)
    assert b"SECRET" not in small
    with Pillow.open(io.BytesIO(small)) as image:
        assert image.info.get("dpi") in (None, (72, 72))


def test_too_many_pixels_are_refused_before_they_are_decoded():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RejectedError, match="20000 x 20000 pixels; at most 1000000") as caught:
            picture(io.BytesIO(_png_header(20000, 20000)), max_pixels=10**6, thumbnail_pixels=64)
    assert caught.value.code == "too-many-pixels"


def test_as_many_pixels_as_are_allowed_are_read():
    assert thumbnail(sample(1, size=(50, 40)), max_pixels=2000)[0]["width"] == 50
    with pytest.raises(RejectedError, match="50 x 40 pixels; at most 1999"):
        thumbnail(sample(1, size=(50, 40)), max_pixels=1999)


def _png_header(width: int, height: int) -> bytes:
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_cut_picture_is_refused(tmp_path: Path, encoding: str, share: float):
    whole = sample(1, size=(200, 150), encoding=encoding)
    (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
    with DecoderPool(Settings(ingest_processes=1)) as pool:
        (answer,) = pool.submit([(str(tmp_path / "cut"), str(tmp_path / "small"))])[0].result()
    assert answer["code"] in ("truncated", "damaged", "not-an-image")
    assert answer["reason"].endswith(".")
    assert not (tmp_path / "small").exists()


def jobs(tmp_path: Path, count: int) -> list[tuple[str, str]]:
    for number in range(count):
        (tmp_path / f"{number}").write_bytes(sample(number))
    return [(str(tmp_path / f"{number}"), str(tmp_path / f"{number}.jpg")) for number in range(count)]


@pytest.mark.parametrize(("processes", "shares"), [(0, 1), (2, 2)])
def test_unless_told_otherwise_a_decoder_for_each_core_that_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, shares: int
):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    with DecoderPool(Settings(ingest_processes=processes)) as pool:
        answers = pool.submit(jobs(tmp_path, 4))
        assert len(answers) == shares
        assert sum(len(answer.result()) for answer in answers) == 4


@pytest.mark.slow
def test_a_file_that_stalls_its_decoder_is_given_up_and_the_others_go_on(tmp_path: Path):
    work = jobs(tmp_path, 5)
    os.mkfifo(tmp_path / "stalls")  # opening it waits for a writer that never comes
    work.insert(2, (str(tmp_path / "stalls"), str(tmp_path / "stalls.jpg")))
    decoder = Decoder(Settings(decode_timeout_s=3))
    try:
        answers = decoder.decode(work)
    finally:
        decoder.close()
    assert [answer.get("code") for answer in answers] == [None, None, "decoder-timeout", None, None, None]
    assert "3 s" in answers[2]["reason"]


def decoders_that_run(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(
        decoders,
        "_start",
        lambda _: subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ),
    )


def test_a_decoder_that_always_dies_is_the_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoders_that_run(monkeypatch, "import os; print([], flush=True); input(); os.abort()")
    decoder = Decoder(Settings())
    try:
        answers = decoder.decode(jobs(tmp_path, 2))
    finally:
        decoder.close()
    assert [answer["code"] for answer in answers] == ["decoder-crashed", "decoder-crashed"]


def test_a_decoder_that_never_starts_is_no_fault_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoders_that_run(monkeypatch, "raise SystemExit(3)")
    decoder = Decoder(Settings())
    with pytest.raises(DecoderStartError, match="status 3 before it read a file, 3 times"):
        decoder.decode(jobs(tmp_path, 2))
    decoder.close()


def test_a_picture_that_takes_too_much_memory_is_refused_and_the_next_is_not(tmp_path: Path):
    work = jobs(tmp_path, 2)
    Path(work[0][0]).write_bytes(encoded(Pillow.new("RGB", (9000, 9000)), "PNG", compress_level=1))
    decoder = Decoder(Settings(decode_memory_bytes=256 * 1024 * 1024))
    try:
        answers = decoder.decode(work)
    finally:
        decoder.close()
    assert [answer.get("code") for answer in answers] == ["too-much-memory", None]


def test_a_decoder_that_is_killed_once_costs_no_file(tmp_path: Path):
    work = jobs(tmp_path, 3)
    decoder = Decoder(Settings())
    try:
        decoder.decode(work[:1])
        os.kill(decoder._running().pid, signal.SIGKILL)
        answers = decoder.decode(work)
    finally:
        decoder.close()
    assert all("code" not in answer for answer in answers)


def test_closing_frees_whoever_waits_and_leaves_no_process(tmp_path: Path):
    os.mkfifo(tmp_path / "stalls")
    decoder = Decoder(Settings(decode_timeout_s=60))
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            decoder.decode([(str(tmp_path / "stalls"), str(tmp_path / "x"))])
        except ClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    deadline = time.monotonic() + 10
    while decoder._process is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process = decoder._process
    decoder.kill()
    thread.join(10)
    decoder.close()
    assert not thread.is_alive()
    assert len(raised) == 1
    assert process.poll() is not None


def test_a_thumbnail_that_cannot_be_written_is_no_fault_of_the_file(tmp_path: Path):
    (source, _) = jobs(tmp_path, 1)[0]
    decoder = Decoder(Settings())
    try:
        with pytest.raises(FileNotFoundError):
            decoder.decode([(source, str(tmp_path / "missing" / "x.jpg"))])
    finally:
        decoder.close()
