"""Archives made to harm, through the real upload and the real ingest.

Each is refused within 5 s, as a whole or file by file with a reason; nothing lies outside the data folder, and
nothing of what was refused is kept.
"""

import gzip
import re
import resource
import struct
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.config import settings
from app.db.session import open_session
from app.db.tables import Upload
from app.main import create_app
from app.services import uploads
from tests.pictures import picture, tar_of, zip_of
from tests.worker import hostile
from tests.worker.hostile import END, PICTURE, header, padded, pax, record, with_pax
from tests.worker.ingested import assert_files_match_rows, ledger
from worker.archives import ArchiveError, DamagedFileError, Limits, entries
from worker.ingest import ingest

pytestmark = pytest.mark.usefixtures("database")

LIMIT_S = 5.0


def cpu_seconds() -> float:
    """Of this process and of the decoders it has ended; a busy machine does not add to it."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def sent(content: bytes, tmp_path: Path) -> Upload:
    """The upload once it is over; what is outside of the data folder is as it was."""
    before = {path for path in tmp_path.iterdir() if path.name != "data"}
    with TestClient(create_app(), base_url="http://localhost") as api:
        collection = api.post("/v1/collections", json={"name": "hostile"}).json()["id"]
        answer = api.post(f"/v1/collections/{collection}/uploads", files={"file": ("bad.bin", content)})
        assert answer.status_code == 202, answer.text
        started = cpu_seconds()
        ingest(answer.json()["id"], threading.Event())
        seconds = cpu_seconds() - started
        found = api.get(answer.headers["location"]).json()
    assert found["state"] in ("succeeded", "failed")
    assert seconds < LIMIT_S
    assert {path for path in tmp_path.iterdir() if path.name != "data"} == before
    assert_files_match_rows()
    with open_session() as session:
        return uploads.get(session, found["id"])


ESCAPES = [
    "../../escape.png",
    "/tmp/escape.png",
    "..\\..\\escape.png",
    "C:\\escape.png",
    "a/../../escape.png",
    "\\escape.png",
]


@pytest.mark.parametrize("pack", [zip_of, tar_of], ids=["zip", "tar.gz"])
def test_names_that_lead_out_are_refused_file_by_file(tmp_path: Path, pack):
    content = pack({name: picture(number) for number, name in enumerate(ESCAPES)} | {"good.png": PICTURE})
    upload = sent(content, tmp_path)
    assert [code for _, _, code in ledger(upload.id)] == ["unsafe-name"] * len(ESCAPES) + [None]
    assert all(".." not in name and not name.startswith("/") for name, _, _ in ledger(upload.id))
    assert upload.accepted == 1
    assert not list(Path("/tmp").glob("escape*"))


def test_links_devices_and_sparse_files_are_refused_file_by_file(tmp_path: Path):
    special = [
        hostile.tar_special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        hostile.tar_special("up.png", tarfile.SYMTYPE, "../../../etc"),
        hostile.tar_special("hard.png", tarfile.LNKTYPE, "/etc/passwd"),
        hostile.tar_special("null.png", tarfile.CHRTYPE),
        hostile.tar_special("disk.png", tarfile.BLKTYPE),
        hostile.tar_special("pipe.png", tarfile.FIFOTYPE),
    ]
    content = hostile.tar_entries(*special, (tarfile.TarInfo("link.png/through.png"), PICTURE))
    upload = sent(content, tmp_path)
    assert [code for _, _, code in ledger(upload.id)] == ["not-a-file"] * len(special) + [None]


def old_sparse(maps: int) -> bytes:
    """GNU's old form: the map begins in the header and goes on in blocks that say whether more follow."""
    block = bytearray(header("sparse.png", len(PICTURE), tarfile.GNUTYPE_SPARSE))
    block[482] = 1 if maps else 0
    block[483:495] = b"77777777777\0"  # a real size of 8 GiB
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    more = bytes(504) + b"\1" + bytes(7)
    last = bytes(512) if maps else b""
    return bytes(block) + more * max(0, maps - 1) + last + padded(PICTURE)


@pytest.mark.parametrize(
    "member",
    [
        old_sparse(0),
        old_sparse(3),
        pax(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.realsize", "9" * 18))
        + header("sparse.png", 512) + padded(b"999999999\n" + b"0\n" * 200),
        pax(record("GNU.sparse.size", "9" * 18) + record("GNU.sparse.offset", "0") + record("GNU.sparse.numbytes", "0"))
        + header("sparse.png", len(PICTURE)) + padded(PICTURE),
        pax(record("GNU.sparse.map", "0,1," * 1000 + "0,1") + record("GNU.sparse.name", "sparse.png"))
        + header("other.png", len(PICTURE)) + padded(PICTURE),
    ],
    ids=["old", "old-more-maps", "1.0", "0.0", "0.1"],
)  # fmt: skip
def test_sparse_files_are_refused_and_what_follows_is_read(tmp_path: Path, member: bytes):
    upload = sent(member + header("good.png", len(PICTURE)) + padded(PICTURE) + END, tmp_path)
    assert ledger(upload.id) == [("sparse.png", "rejected", "not-a-file"), ("good.png", "accepted", None)]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(old_sparse(0)[:482] + b"\1" + old_sparse(0)[483:512] + (bytes(504) + b"\1" + bytes(7)) * 100_000),
        with_pax(record("size", "-1")),
        with_pax(record("size", "1e9")),
        with_pax(record("size", "9" * 18)),
        with_pax(record("size", "9" * 5000)),
        with_pax(b"9" * 400_000),
        with_pax(b"999 path=a\n"),
        with_pax(b"0 path=a\n"),
        with_pax(b"-5 path=a\n"),
        with_pax(b"12 path=a.png"),
        header("g", 2**20 + 1, tarfile.XGLTYPE) + bytes(2**21),
        (pax(record("comment", "x" * 60_000), tarfile.XGLTYPE) * 20) + header("a.png", 0) + END,
        pax(record("path", "x")) * 3000 + END,
        header("a.png", -512) + END,
        header("a.png", 2**40) + padded(PICTURE),
        with_pax(record("path", "a" * 2**21)),
    ],
    ids=[
        "endless-sparse-map", "negative-size", "size-no-number", "size-beyond-the-end", "size-of-digits", "only-digits",
        "length-beyond", "length-zero", "length-negative", "no-line-feed", "global-header-too-long",
        "global-headers-in-a-row", "headers-without-end", "size-negative", "size-beyond", "name-of-megabytes",
    ],
)  # fmt: skip
def test_headers_that_lie_end_the_archive(tmp_path: Path, content: bytes):
    upload = sent(content, tmp_path)
    assert upload.state == "failed"
    assert upload.problem["code"] in ("archive-damaged", "too-large")
    assert "bad.bin" in upload.problem["detail"]
    assert ledger(upload.id) == []


def test_global_headers_do_not_pile_up_in_memory(tmp_path: Path):
    """Sixty of 900 kB each, between files."""
    path = tmp_path / "part"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for number in range(60):
            file.write(pax(record(f"comment{number}", "x" * 900_000), tarfile.XGLTYPE) + header("a.png", 0))
        file.write(END)
    tracemalloc.start()
    try:
        found = sum(entry.name == "a.png" for entry in entries(path, "part", Limits(files=100, unpacked_bytes=10**9)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == 60
    assert peak < 16 * 1024**2


def nested(first: str, second: str) -> bytes:
    return zip_of({first: hostile.overlap_bomb(10, 10**6), second: hostile.gzip_bomb(20)})


# Made when the test runs: they take seconds, and every process imports this.
BOMBS = {
    "overlap": (lambda: hostile.overlap_bomb(1000, 3_000_000), "overlap"),
    "quoted-overlap": (lambda: hostile.quoted_overlap_bomb(60, 2_000_000), "overlap"),
    "tar.gz": (lambda: hostile.gzip_bomb(300), "more than 200 times its size"),
    "behind-the-end": (
        lambda: gzip.compress(tar_of({"a.png": PICTURE}, "w") + bytes(300 * 1024**2), 9),
        "more than 200 times its size",
    ),
    "nested": (lambda: nested("a.zip", "b.tar.gz"), "no picture"),
    "nested-renamed": (lambda: nested("a.png", "b.jpg"), "no picture"),
}


@pytest.mark.parametrize(("bomb", "words"), BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused(tmp_path: Path, bomb: Callable[[], bytes], words: str):
    upload = sent(bomb(), tmp_path)
    assert upload.state == "failed"
    assert words in upload.problem["detail"]


def test_the_ratio_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("worker.archives._BOMB_BYTES", 1000)
    monkeypatch.setenv("KINDRED_MAX_COMPRESSION_RATIO", "20")
    settings.cache_clear()
    content = gzip.compress(tar_of({"a.bmp": picture(1, encoding="BMP") + bytes(100_000)}, "w"))
    assert "more than 20 times its size" in sent(content, tmp_path).problem["detail"]
    monkeypatch.setenv("KINDRED_MAX_COMPRESSION_RATIO", "2000")
    settings.cache_clear()
    assert sent(content, tmp_path).accepted == 1


@pytest.mark.parametrize("count", [201_000, 1_000_000])
@pytest.mark.parametrize("pack", [hostile.many_entries_zip, hostile.many_entries_tar], ids=["zip", "tar.gz"])
def test_archives_of_very_many_entries_are_refused(tmp_path: Path, pack, count: int):
    upload = sent(pack(count), tmp_path)
    assert upload.state == "failed"
    assert upload.problem["code"] == "too-many-files"
    assert "200000" in upload.problem["detail"]
    assert ledger(upload.id) == []


def test_a_tar_of_very_many_folders_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINDRED_MAX_UPLOAD_FILES", "1000")
    settings.cache_clear()
    upload = sent(hostile.many_entries_tar(100_000, tarfile.DIRTYPE), tmp_path)
    assert upload.problem["code"] == "too-many-files"


def lying(content: bytes, unpacked: int, says: int) -> bytes:
    """A zip whose headers tell another size of one member."""
    old, new = unpacked.to_bytes(4, "little"), says.to_bytes(4, "little")
    assert content.count(old) >= 2
    return content.replace(old, new)


@pytest.mark.parametrize("says", [0, 1, 1000, 10**8, 2**32 - 2])
def test_a_zip_that_lies_about_a_size_spares_its_other_files(tmp_path: Path, says: int):
    upload = sent(lying(zip_of({"lies.png": PICTURE, "good.png": picture(2)}), len(PICTURE), says), tmp_path)
    if upload.state == "failed":  # the sum of what it says is beyond a limit, or members overlap
        assert upload.problem["code"] in ("too-large", "archive-damaged")
    else:
        (lies, good) = ledger(upload.id)
        assert good == ("good.png", "accepted", None)
        assert lies[1] == "rejected" or says == len(PICTURE)


def test_zip64_is_read_and_its_lies_are_not_believed(tmp_path: Path):
    whole = hostile.many_entries_zip(1)
    end = whole.index(b"PK\5\6")
    body = whole[:end]
    offset = body.index(b"PK\1\2")

    def with_end(count: int, size: int, at: int) -> bytes:
        return (
            body
            + struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, at)
            + struct.pack("<4sIQI", b"PK\6\7", 0, len(body), 1)
            + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
        )

    size = len(body) - offset
    honest = sent(with_end(1, size, offset), tmp_path)
    assert ledger(honest.id) == [("a.png", "rejected", "empty-file")]
    for lie in (
        with_end(2**63, size, offset),
        with_end(1, 2**62, offset),
        with_end(1, size, 2**63 - 1),
        with_end(1, 2**33, 0),
    ):
        upload = sent(lie, tmp_path)
        assert upload.state == "failed"
        assert upload.problem["code"] in ("archive-damaged", "too-many-files", "no-images")


def test_encrypted_members_are_refused_file_by_file(tmp_path: Path):
    upload = sent(hostile.encrypted_zip(), tmp_path)
    assert ledger(upload.id) == [("secret.png", "rejected", "encrypted")]
    assert upload.problem["code"] == "no-images"


def test_a_member_without_a_name_is_read(tmp_path: Path):
    """`zipfile` itself fails for one; found by fuzzing."""
    upload = sent(hostile.zip_with_names(b"", b"a.png"), tmp_path)
    assert ledger(upload.id) == [("unnamed", "accepted", None), ("a.png", "accepted", None)]


@pytest.mark.parametrize(
    "content",
    [zip_of({"a.png": PICTURE, "b.png": picture(2)}), tar_of({"a.png": PICTURE}), tar_of({"a.png": PICTURE}, "w")],
    ids=["zip", "tar.gz", "tar"],
)
def test_an_archive_cut_anywhere_is_refused_or_read_as_far_as_it_goes(tmp_path: Path, content: bytes):
    path = tmp_path / "part"
    for end in range(1, len(content), 7):
        path.write_bytes(content[:end])
        try:
            for entry in entries(path, "part.zip", Limits(files=10, unpacked_bytes=10**7)):
                while entry.reader is not None and entry.reader.read(4096):
                    pass
        except (ArchiveError, DamagedFileError):
            continue


NAMES = {
    "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png": "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png",
    "cafe\N{COMBINING ACUTE ACCENT}.png": "cafe\N{COMBINING ACUTE ACCENT}.png",
    "photo\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe": "photo\N{REPLACEMENT CHARACTER}gpj.exe",
    "\N{LEFT-TO-RIGHT ISOLATE}b.png": "\N{REPLACEMENT CHARACTER}b.png",
    "a\x1b[31m\x07\r\n.png": "a\N{REPLACEMENT CHARACTER}[31m" + "\N{REPLACEMENT CHARACTER}" * 3 + ".png",
    "x" * 300 + ".png": "x" * 300 + ".png",
    "\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET}.png": "\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET}.png",
    "<script>alert(1)<\\script>.png": "<script>alert(1)</script>.png",
    "=cmd|' /C calc'!A0.png": "=cmd|' /C calc'!A0.png",
    "CON": "CON",
    "\N{GRINNING FACE}.png": "\N{GRINNING FACE}.png",
}  # fmt: skip


@pytest.mark.parametrize("pack", [zip_of, tar_of], ids=["zip", "tar.gz"])
def test_names_are_kept_as_far_as_they_can_be_shown(tmp_path: Path, pack):
    upload = sent(pack({name: picture(number) for number, name in enumerate(NAMES)}), tmp_path)
    shown = [name for name, _, _ in ledger(upload.id)]
    assert shown == list(NAMES.values())
    assert upload.accepted == len(NAMES)


def test_names_of_a_zip_in_old_encodings(tmp_path: Path):
    """CP437 by the standard, UTF-8 by many who forget to say so, and bytes that are neither."""
    utf8 = "caf\N{LATIN SMALL LETTER E WITH ACUTE}2.png".encode()
    upload = sent(hostile.zip_with_names(b"caf\x82.png", utf8, b"\xff\xfe.png"), tmp_path)
    assert [name for name, _, _ in ledger(upload.id)] == [
        "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png",
        "caf\N{LATIN SMALL LETTER E WITH ACUTE}2.png",
        "\N{NO-BREAK SPACE}\N{BLACK SQUARE}.png",
    ]


def test_names_that_are_not_the_utf8_they_say_they_are(tmp_path: Path):
    upload = sent(hostile.zip_with_names(b"\xff\xfe.png", flags=0x800), tmp_path)
    assert upload.state == "failed"
    assert upload.problem["code"] == "archive-damaged"
    assert re.search(r"utf-?8", upload.problem["detail"])


def test_the_crc_of_a_tar_gz_is_checked(tmp_path: Path):
    content = bytearray(tar_of({"a.png": PICTURE}))
    content[-6] ^= 1
    upload = sent(bytes(content), tmp_path)
    assert upload.problem["code"] == "archive-damaged"
    assert ledger(upload.id) == []
