import copy
import errno
import gzip
import io
import os
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pictures import tar_of, zip_of
from worker.archives import (
    MAX_NAME,
    ArchiveError,
    DamagedFileError,
    Limits,
    _TarReader,
    display_name,
    entries,
    is_junk,
)  # fmt: skip

LIMITS = Limits(files=1000, unpacked_bytes=10**9)


def listed(tmp_path: Path, content: bytes) -> list[tuple[str | None, bytes | str]]:
    """Name and content, or name and code, of every entry."""
    path = tmp_path / "part"
    path.write_bytes(content)
    found: list[tuple[str | None, bytes | str]] = []
    for entry in entries(path, "part.bin", LIMITS):
        if entry.reader is None:
            found.append((entry.name, entry.code))
            continue
        data = b""
        while block := entry.reader.read(1000):
            data += block
        found.append((entry.name, data))
    return found


FILES = {"a/one.png": b"1" * 5000, "b c/\N{SNOWMAN}.png": b"2", "n" * 300 + ".png": b""}


@pytest.mark.parametrize("content", [zip_of(FILES), tar_of(FILES), tar_of(FILES, "w")], ids=["zip", "tar.gz", "tar"])
def test_members_keep_their_names_and_bytes(tmp_path: Path, content: bytes):
    assert listed(tmp_path, content) == list(FILES.items())


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_reading_past_a_large_member_is_heard_of(tmp_path: Path, mode: str):
    path = tmp_path / "part"
    path.write_bytes(tar_of({"a.png": b"1", "film.mp4": bytes(2**24), "b.png": b"2"}, mode))
    heard = 0

    def hear() -> None:
        nonlocal heard
        heard += 1

    before = {
        entry.name: heard for entry in entries(path, "a.tar", Limits(files=9, unpacked_bytes=10**9, ratio=1e9), hear)
    }
    assert before["b.png"] - before["film.mp4"] > 10


def test_a_part_that_is_no_archive_is_one_file(tmp_path: Path):
    assert listed(tmp_path, b"anything") == [("part.bin", b"anything")]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "etc/passwd"),
        ("/abs/x.png", "abs/x.png"),
        ("C:\\Users\\x.png", "Users/x.png"),
        ("a/./b/../c.png", "a/b/c.png"),
        ("a\x00b\nc.png", "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c.png"),
        ("..", "unnamed"),
        ("x" * 300 + ".png", "x" * 300 + ".png"),
        ("\udc80.png", "\N{REPLACEMENT CHARACTER}.png"),
    ],
)
def test_names_are_made_harmless_for_display(name: str, shown: str):
    assert display_name(name) == shown


def test_an_endless_name_is_cut_and_keeps_its_suffix():
    shown = display_name("y" * 5000 + ".jpeg")
    assert len(shown) == MAX_NAME
    assert shown.endswith(".jpeg")


@pytest.mark.parametrize(
    "name", ["__MACOSX/a.png", "a/._b.png", ".DS_Store", "x/Thumbs.db", "desktop.ini", ".git/config", "a\\.b\\c.png"]
)
def test_junk_is_known(name: str):
    assert is_junk(name)
    for kept in ("a/picture.png", "../picture.png", "./a.png", "a\\b.png", "a.b/c.png", "not__MACOSX/a.png"):
        assert not is_junk(kept)


def test_links_devices_and_nested_archives_are_refused_not_followed(tmp_path: Path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("null", tarfile.CHRTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        entry = tarfile.TarInfo("inner.zip")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"abc"))
    assert listed(tmp_path, buffer.getvalue()) == [
        ("link", "not-a-file"),
        ("hard", "not-a-file"),
        ("null", "not-a-file"),
        ("inner.zip", "archive-in-archive"),
    ]


def test_an_encrypted_member_is_refused(tmp_path: Path):
    content = bytearray(zip_of({"a.png": b"x" * 10, "b.png": b"y"}))
    # The encryption bit in the central directory's entry of the first member.
    content[content.index(b"PK\x01\x02") + 8] |= 1
    assert listed(tmp_path, bytes(content)) == [("a.png", "encrypted"), ("b.png", b"y")]


def test_a_damaged_member_spares_the_others(tmp_path: Path):
    content = bytearray(zip_of({"a.png": b"x" * 100, "b.png": b"y"}))
    content[content.index(b"x" * 100) + 50] ^= 1
    path = tmp_path / "part"
    path.write_bytes(content)
    found = entries(path, "part.zip", LIMITS)
    first = next(found)
    assert first.reader is not None
    with pytest.raises(DamagedFileError, match="damaged"):
        first.reader.read(1000)
    second = next(found)
    assert second.reader is not None
    assert second.reader.read(10) == b"y"


@pytest.mark.parametrize(
    "content",
    [
        tar_of(FILES)[:-40],
        tar_of({f"{n}": bytes(range(256)) * 40 for n in range(20)})[:900],
        tar_of(FILES, "w")[:3000],
        tar_of(FILES, "w")[:1024],
        zip_of(FILES)[:-30],
        b"\x1f\x8bgarbage",
    ],
)
def test_a_cut_archive_is_an_error_that_names_it(tmp_path: Path, content: bytes):
    with pytest.raises(ArchiveError, match=r"part\.bin is damaged or cut short") as caught:
        listed(tmp_path, content)
    assert caught.value.code == "archive-damaged"


@pytest.mark.parametrize("content", [zip_of({}), tar_of({})], ids=["zip", "tar.gz"])
def test_an_empty_archive_is_an_error_that_names_it(tmp_path: Path, content: bytes):
    with pytest.raises(ArchiveError, match=r"part\.bin is an empty archive") as caught:
        listed(tmp_path, content)
    assert caught.value.code == "empty-archive"


def test_a_member_is_read_in_the_amounts_asked_for(tmp_path: Path):
    """64 MiB of zeros, of which a thousand bytes are taken."""
    path = tmp_path / "part"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("zeros.png", "w") as member:
        for _ in range(64):
            member.write(bytes(1024 * 1024))
    (entry,) = [
        entry for entry in entries(path, "part.zip", LIMITS) if entry.reader is not None and entry.reader.read(1000)
    ]
    assert entry.name == "zeros.png"


def write_zip(path: Path, **options: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path, "w", **options)


def refusal(path: Path, limits: Limits = LIMITS) -> ArchiveError:
    def read_all() -> None:
        for entry in entries(path, "part.zip", limits):
            while entry.reader is not None and entry.reader.read(1024 * 1024):
                pass

    with pytest.raises(ArchiveError) as caught:
        read_all()
    return caught.value


def test_a_zip_of_very_many_entries_is_refused_before_it_is_listed(tmp_path: Path):
    path = tmp_path / "part"
    with write_zip(path) as archive:
        for number in range(20_000):
            archive.writestr(f"{number}/", b"")
    started = time.perf_counter()
    error = refusal(path)
    assert error.code == "too-many-files"
    assert "1000" in str(error)
    assert time.perf_counter() - started < 1


def test_too_many_files_are_counted_in_the_directory(tmp_path: Path):
    path = tmp_path / "part"
    path.write_bytes(zip_of({f"{n}.png": b"x" for n in range(11)} | {".junk": b""}))
    assert "holds 11 files; at most 10" in str(refusal(path, Limits(files=10, unpacked_bytes=10**9)))


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_as_many_files_as_are_allowed_are_read(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]):
    path = tmp_path / "part"
    path.write_bytes(pack({f"{n}.png": b"x" for n in range(10)}))
    assert len(list(entries(path, "part.bin", Limits(files=10, unpacked_bytes=10**9)))) == 10


def test_a_zip_that_says_it_is_a_bomb_is_refused_unread(tmp_path: Path):
    path = tmp_path / "part"
    content = bytearray(zip_of({"a.png": b"x" * 100}))
    size_field = content.index(b"PK\x01\x02") + 24
    content[size_field : size_field + 4] = (4 * 10**9).to_bytes(4, "little")
    path.write_bytes(content)
    assert refusal(path).code == "too-large"
    assert "200 times" in str(refusal(path, Limits(files=10, unpacked_bytes=10**12)))


def test_members_that_share_their_bytes_are_refused(tmp_path: Path):
    """The bomb of overlapping members: one kernel, many directory entries."""
    path = tmp_path / "part"
    with write_zip(path) as archive:
        archive.writestr("kernel.png", bytes(100_000))
        kernel = archive.infolist()[0]
        for number in range(50):
            other = copy.copy(kernel)
            other.filename = f"{number}.png"
            archive.filelist.append(other)
    assert "overlap" in str(refusal(path))


def test_a_tar_gz_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("worker.archives._BOMB_BYTES", 10 * 1024 * 1024)
    path = tmp_path / "part"
    path.write_bytes(tar_of({"a.png": bytes(40 * 1024 * 1024)}))
    assert refusal(path).code == "too-large"


def test_zeros_behind_the_end_of_a_tar_are_counted(tmp_path: Path):
    path = tmp_path / "part"
    path.write_bytes(gzip.compress(tar_of({"a.png": b"1"}, "w") + bytes(20_000_000)))
    assert refusal(path, Limits(files=10, unpacked_bytes=10_000_000)).code == "too-large"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_decompressors_of_bounded_memory_are_used(tmp_path: Path, method: int):
    path = tmp_path / "part"
    with write_zip(path, compression=method) as archive:
        archive.writestr("a.png", b"1")
    assert listed(tmp_path, path.read_bytes()) == [("a.png", "unsupported-compression")]


def test_a_link_in_a_zip_is_refused(tmp_path: Path):
    path = tmp_path / "part"
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with write_zip(path) as archive:
        archive.writestr(link, "/etc/passwd")
    assert listed(tmp_path, path.read_bytes()) == [("link.png", "not-a-file")]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_broken_header_within_a_tar_is_not_its_end(tmp_path: Path, mode: str):
    content = bytearray(tar_of({f"{n}.png": b"x" * 600 for n in range(9)}, "w"))
    content[3 * 1536 + 5] ^= 0xFF  # within the fourth header
    with pytest.raises(ArchiveError, match="header"):
        listed(tmp_path, bytes(content) if mode == "w" else gzip.compress(content))


def test_a_tar_without_its_end_is_damaged(tmp_path: Path):
    whole = tar_of({f"{n}.png": b"x" * 512 for n in range(3)}, "w")
    for content in (whole[: 3 * 1024], whole[: 2 * 1024]):
        with pytest.raises(ArchiveError, match="damaged or cut short"):
            listed(tmp_path, content)


def test_a_tar_header_of_gigabytes_is_not_read_into_memory(tmp_path: Path):
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, 5 * 1024**3
    with pytest.raises(ArchiveError, match="more than 1048576 bytes"):
        listed(tmp_path, entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024 * 1024))


@pytest.mark.parametrize("content", [b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07\x01\0", b"BZh9"])
def test_archives_of_other_kinds_are_named(tmp_path: Path, content: bytes):
    with pytest.raises(ArchiveError, match=r"zip, tar or tar\.gz") as caught:
        listed(tmp_path, content)
    assert caught.value.code == "not-an-archive"


def test_a_text_that_calls_itself_a_zip_is_no_archive(tmp_path: Path):
    path = tmp_path / "part"
    path.write_bytes(b"hello")
    assert refusal(path).code == "not-an-archive"


def test_what_the_machine_says_is_not_the_archives_fault():
    class Unreadable(io.BytesIO):
        def read(self, _size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output error"):
        _TarReader(Unreadable(), 10, "photos.tar").read(10)
