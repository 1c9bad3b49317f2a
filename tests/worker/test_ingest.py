"""Ingest on real PostgreSQL, with real decoding processes."""

import numpy as np
import pytest
from PIL import Image as Pillow

from app import storage
from app.config import settings
from tests.pictures import encoded, picture, tar_of, two_kinds, zip_of
from tests.worker.ingested import assert_files_match_rows, images, ledger, queued, run

pytestmark = pytest.mark.usefixtures("database")


def test_every_file_gets_its_row():
    jpeg = picture(1, size=(300, 200), encoding="JPEG")
    upload = run(
        queued(
            (
                "all.zip",
                zip_of(
                    {
                        "good/1.png": picture(2),
                        "cut.jpg": jpeg[:3000],
                        "text.jpg": b"hello",
                        "empty.png": b"",
                        "good/same.png": picture(2),
                        "text again.jpg": b"hello",
                        "__MACOSX/x": b"",
                        "../up.png": picture(3),
                        "inner.zip": b"PK",
                        "IMG_1.HEIC": b"\0\0\0\x24ftypheic\0\0\0\0mif1heic",
                    }
                ),
            )
        )
    )
    assert upload.state == "succeeded"
    assert ledger(upload.id) == [
        ("good/1.png", "accepted", None),
        ("cut.jpg", "rejected", "truncated"),
        ("text.jpg", "rejected", "not-an-image"),
        ("empty.png", "rejected", "empty-file"),
        ("good/same.png", "duplicate", None),
        ("text again.jpg", "rejected", "not-an-image"),
        ("up.png", "rejected", "unsafe-name"),
        ("inner.zip", "rejected", "archive-in-archive"),
        ("IMG_1.HEIC", "rejected", "heic-not-read"),
    ]
    assert (upload.received, upload.accepted, upload.duplicate, upload.rejected, upload.ignored) == (9, 1, 1, 7, 1)
    assert_files_match_rows()


def test_many_parts_may_be_images_and_archives():
    upload = run(
        queued(
            ("folder/a.png", picture(1)),
            ("b.tar.gz", tar_of({"x/c.png": picture(2)})),
            ("d.txt", b"hello"),
        )
    )
    assert ledger(upload.id) == [
        ("folder/a.png", "accepted", None),
        ("x/c.png", "accepted", None),
        ("d.txt", "rejected", "not-an-image"),
    ]


def test_sending_it_again_adds_no_image():
    content = zip_of(two_kinds(6))
    first = run(queued(("a.zip", content)))
    second = run(queued(("a.zip", content), collection_id=first.collection_id))
    assert (second.state, second.accepted, second.duplicate) == ("succeeded", 0, 6)
    assert len(images()) == 6
    assert_files_match_rows()


def test_what_another_collection_has_is_no_duplicate():
    content = zip_of(two_kinds(6))
    run(queued(("a.zip", content)))
    other = run(queued(("b.png", picture(100))))
    second = run(queued(("a.zip", content), collection_id=other.collection_id))
    assert (second.state, second.accepted, second.duplicate) == ("succeeded", 6, 0)
    assert len(images()) == 13
    assert_files_match_rows()


def test_a_broken_file_that_comes_twice_is_rejected_twice():
    cut = picture(1, size=(300, 200), encoding="JPEG")[:3000]
    upload = run(queued(("a.zip", zip_of({"cut.jpg": cut, "again.jpg": cut, "good.png": picture(2)}))))
    assert upload.state == "succeeded"
    assert ledger(upload.id) == [
        ("cut.jpg", "rejected", "truncated"),
        ("again.jpg", "rejected", "truncated"),
        ("good.png", "accepted", None),
    ]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("empty.zip", zip_of({}), "empty-archive"),
        ("junk.zip", zip_of({".DS_Store": b""}), "empty-archive"),
        ("texts.zip", zip_of({"a.txt": b"a", "b.jpg": b"b"}), "no-images"),
        ("cut.tar.gz", tar_of(two_kinds(30))[:-500], "archive-damaged"),
        ("cut.zip", zip_of(two_kinds(3))[:-30], "archive-damaged"),
    ],
)
def test_an_upload_that_fails_says_why_and_leaves_nothing(name: str, content: bytes, code: str):
    upload = run(queued((name, content)))
    assert upload.state == "failed"
    assert upload.problem is not None
    assert upload.problem["code"] == code
    assert name in upload.problem["detail"]
    assert images() == []
    assert {outcome for _, outcome, _ in ledger(upload.id)} <= {"rejected"}
    assert upload.rejected == upload.received == len(ledger(upload.id))
    assert_files_match_rows()


@pytest.mark.parametrize(
    ("setting", "value", "code"),
    [("MAX_UPLOAD_FILES", "3", "too-many-files"), ("MAX_UNPACKED_BYTES", "5000", "too-large")],
)
def test_limits_of_an_upload(monkeypatch: pytest.MonkeyPatch, setting: str, value: str, code: str):
    monkeypatch.setenv(f"KINDRED_{setting}", value)
    settings.cache_clear()
    upload = run(queued(("a.zip", zip_of(two_kinds(8)))))
    assert upload.problem is not None
    assert upload.problem["code"] == code
    assert value in upload.problem["detail"]
    assert_files_match_rows()


def test_limits_of_an_image(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINDRED_MAX_IMAGE_PIXELS", "2000")
    monkeypatch.setenv("KINDRED_MAX_IMAGE_BYTES", "9000")
    settings.cache_clear()
    files = {"ok.png": picture(1), "wide.png": picture(2, size=(50, 41)), "fat.png": picture(3, size=(80, 80))}
    upload = run(queued(("a.zip", zip_of(files))))
    assert [row[2] for row in ledger(upload.id)] == [None, "too-many-pixels", "too-many-bytes"]


RED = (200, 30, 40)


@pytest.mark.parametrize(
    ("encoding", "image"),
    [
        ("JPEG", Pillow.new("RGB", (60, 40), RED)),
        ("JPEG", Pillow.new("CMYK", (60, 40), (55, 225, 215, 0))),
        ("PNG", Pillow.new("RGB", (60, 40), RED).convert("P")),
        ("PNG", Pillow.new("RGBA", (60, 40), (*RED, 255))),
        ("WEBP", Pillow.new("RGB", (60, 40), RED)),
        ("GIF", Pillow.new("RGB", (60, 40), RED)),
        ("BMP", Pillow.new("RGB", (60, 40), RED)),
        ("TIFF", Pillow.new("RGB", (60, 40), RED)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_every_format_becomes_an_rgb_thumbnail(encoding: str, image: Pillow.Image):
    upload = run(queued(("picture", encoded(image, encoding))))
    assert ledger(upload.id) == [("picture", "accepted", None)]
    (row,) = images()
    assert (row.format, row.width, row.height) == (encoding, 60, 40)
    with Pillow.open(storage.thumbnail(row.collection_id, row.sha256)) as thumbnail:
        assert (thumbnail.format, thumbnail.mode, thumbnail.size) == ("JPEG", "RGB", (60, 40))
        seen = np.asarray(thumbnail, dtype=int).mean(axis=(0, 1))
    assert np.abs(seen - np.array(RED)).max() < 30


def test_transparency_is_white_and_16_bits_are_gray():
    clear = Pillow.new("RGBA", (10, 10), (0, 0, 0, 0))
    deep = Pillow.fromarray(np.full((10, 10), 0x8000, dtype=np.uint16))
    run(queued(("clear.png", encoded(clear, "PNG")), ("deep.png", encoded(deep, "PNG"))))
    means = []
    for row in images():
        with Pillow.open(storage.thumbnail(row.collection_id, row.sha256)) as thumbnail:
            means.append(float(np.asarray(thumbnail).mean()))
    assert means == pytest.approx([255, 128], abs=2)


def test_orientation_is_applied_and_metadata_left_out():
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    exif[0x010E] = "secret place"
    content = encoded(Pillow.new("RGB", (600, 400), RED), "JPEG", exif=exif)
    run(queued(("turned.jpg", content)))
    (row,) = images()
    assert (row.width, row.height) == (400, 600)
    thumbnail = storage.thumbnail(row.collection_id, row.sha256)
    with Pillow.open(thumbnail) as seen:
        assert seen.size == (171, 256)
        assert not seen.getexif()
    assert b"secret" not in thumbnail.read_bytes()


def test_archives_are_known_by_their_content_and_refused_inside_one():
    inner = zip_of({"a.png": picture(1)})
    upload = run(queued(("a.zip", zip_of({"a.jpg": inner, "b.png": picture(2), "c.png": tar_of({"x": b"y"})}))))
    assert [code for _, _, code in ledger(upload.id)] == ["archive-in-archive", None, "archive-in-archive"]
