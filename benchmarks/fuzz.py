"""Fuzzes what reads strangers' bytes: the archive reader and the image reader.

    pip install atheris
    python -m benchmarks.fuzz archives --seconds 300
    python -m benchmarks.fuzz images --seconds 300

Coverage-guided (atheris, which is libFuzzer) from small valid seeds. A finding is an exception that the ingest
does not expect, a broken promise about names or sizes, a crash, 10 s for one input, or 2 GiB of memory; it is
written to the working folder as `crash-…`, `timeout-…` or `oom-…`, and
`python -m benchmarks.fuzz images FILE` runs it again.
"""

import argparse
import gzip
import io
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# ruff: noqa: PLC0415 - what is to be watched is imported once the fuzzer watches

LIMIT_BYTES = 8 * 1024 * 1024
LIMIT_FILES = 100


def archives(folder: Path) -> Callable[[bytes], None]:
    """Every member of an archive is read to its end, as the ingest does."""
    from worker.archives import MAX_NAME, ArchiveError, DamagedFileError, Limits, entries

    path = folder / "part"
    limits = Limits(files=LIMIT_FILES, unpacked_bytes=LIMIT_BYTES)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        files = total = 0
        try:
            for entry in entries(path, "part", limits):
                if entry.name is None:
                    continue
                files += 1
                if files > LIMIT_FILES:  # the ingest counts tar members itself
                    return
                assert 0 < len(entry.name) <= MAX_NAME
                assert "\x00" not in entry.name
                assert not {"..", "."} & set(entry.name.split("/"))
                assert not entry.name.startswith("/")
                entry.name.encode()  # PostgreSQL's text takes no lone surrogates
                if entry.reader is None:
                    assert entry.code
                    assert entry.reason
                    continue
                try:
                    while (block := entry.reader.read(65536)) != b"":
                        total += len(block)
                        if total > LIMIT_BYTES:
                            return
                except DamagedFileError:
                    pass
        except ArchiveError as error:
            str(error).encode()
            _ = str(error).index("part")  # it names the archive

    return read


def images(folder: Path) -> Callable[[bytes], None]:
    """A picture is accepted with a thumbnail, or rejected with words."""
    import json

    from PIL import Image

    from worker.decode import FORMATS, decode

    source, thumbnail = folder / "picture", folder / "picture.jpg"

    def read(data: bytes) -> None:
        source.write_bytes(data)
        thumbnail.unlink(missing_ok=True)
        answer = decode(str(source), str(thumbnail), max_pixels=2_000_000, thumbnail_pixels=64)
        json.dumps(answer).encode()
        if "code" in answer:
            assert "\x00" not in answer["reason"]
            answer["reason"].encode()
            assert not thumbnail.exists()
            return
        assert answer["format"] in FORMATS
        assert 0 < answer["width"] * answer["height"] <= 2_000_000
        with Image.open(thumbnail, formats=["JPEG"]) as small:
            assert max(small.size) <= 64

    return read


def archive_seeds() -> Iterator[bytes]:
    files = {
        "a/one.png": b"\x89PNG\r\n\x1a\n" + bytes(90),
        "two.jpg": b"\xff\xd8\xff" * 30,
        ".DS_Store": b"",
        "d/": b"",
    }
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
        yield buffer.getvalue()
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(name + ("\N{SNOWMAN}" * 60 if kind == tarfile.PAX_FORMAT else ""))
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        yield buffer.getvalue()
        yield gzip.compress(buffer.getvalue(), mtime=0)


def image_seeds() -> Iterator[bytes]:
    from PIL import Image

    from worker.decode import FORMATS

    exif = Image.Exif()
    exif[0x0112] = 6
    for encoding in FORMATS:
        for mode in ("RGB", "L", "P", "RGBA", "1", "I;16", "F", "CMYK"):
            image = Image.linear_gradient("L").resize((24, 16)).convert("RGB").convert("L" if mode == "I;16" else mode)
            many = {"save_all": True, "append_images": [image.rotate(90)]} if mode == "P" else {}
            for options in ({}, {"exif": exif}, many, {"compression": "tiff_lzw"}, {"progressive": True}):
                buffer = io.BytesIO()
                try:
                    image.save(buffer, encoding, **options)
                except (OSError, KeyError, ValueError, TypeError):
                    continue
                yield buffer.getvalue()


TARGETS: dict[str, tuple[Callable[[Path], Callable[[bytes], None]], Callable[[], Iterator[bytes]], tuple[str, ...]]] = {
    "archives": (archives, archive_seeds, ("worker.archives", "zipfile", "tarfile", "gzip")),
    "images": (images, image_seeds, ("worker.decode", "PIL")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("file", nargs="?", type=Path, help="an input to run once, instead of fuzzing")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--corpus", type=Path, help="folder that keeps what was found to be new")
    chosen = parser.parse_args()
    make, seeds, modules = TARGETS[chosen.target]
    with tempfile.TemporaryDirectory() as folder:
        if chosen.file:
            make(Path(folder))(chosen.file.read_bytes())
            return
        corpus = chosen.corpus or Path(folder) / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
        _fuzz(make, Path(folder), corpus, modules, chosen.seconds)


def _fuzz(make: Callable[[Path], Any], folder: Path, corpus: Path, modules: tuple[str, ...], seconds: int) -> None:
    import atheris

    for name in [name for name in sys.modules if name.split(".")[0] in {module.split(".")[0] for module in modules}]:
        del sys.modules[name]  # what is loaded already would not be watched
    with atheris.instrument_imports(include=list(modules), enable_loader_override=False):
        target = make(folder)
    limits = [
        f"-max_total_time={seconds}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=65536",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *limits, str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
