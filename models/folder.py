"""The command line: group the pictures of a folder, with no service around it."""

import argparse
import csv
import hashlib
import io
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from joblib import cpu_count

from models import images
from models.config import BACKBONES, METHODS, PRESETS, Config, InputError
from models.features import Source
from models.files import write_atomically
from models.progress import Progress
from models.train import Grouping, group, save_model

COLUMNS = ("filename", "cluster", "confidence", "runner_up", "margin", "consensus")


def main(arguments: Sequence[str] | None = None) -> int:
    """Group a folder; 0 when done, 2 with one line on stderr when the input is at fault."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (InputError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    description = "Group the pictures of a folder by what they show."
    parser = OneLineParser(prog="python -m models.train", description=description)
    parser.add_argument("images", type=Path, metavar="IMAGES_DIR", help="folder, searched recursively")
    parser.add_argument(
        "--clusters", type=number, required=True, metavar="K", help="number of groups, 2 to 4096, or auto"
    )
    parser.add_argument("--method", default="scl", help=f"one of: {', '.join(METHODS)}; default scl")
    parser.add_argument(
        "--train",
        default="head",
        help="head: the backbone is frozen; finetune: then it learns what the head found; full: it trains",
    )
    parser.add_argument("--backbone", default="efficientnet_lite0", help=f"{', '.join(BACKBONES)} or timm/NAME")
    parser.add_argument("--weights", metavar="FILE", help="of the backbone; or random, to train in full from nothing")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same groups; default 0")
    parser.add_argument("--truth", choices=["folder"], help="names of folders are true labels, for the report")
    parser.add_argument("--preset", choices=list(PRESETS), help="fast: smaller input and fewer restarts")
    parser.add_argument("--image-size", type=int, metavar="P", help="pixels a side; default 224")
    parser.add_argument("--epochs", type=int, metavar="E", help="default: the method's own")
    parser.add_argument("--restarts", type=int, metavar="R", help="default: the method's own")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep features here for the next run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the answer is written")
    return parser


def number(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else int(text)


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad command line in the same one line as a bad input."""

    def error(self, message: str) -> None:  # type: ignore[override]  # exit() does not return
        self.exit(2, f"error: {message}\n")


def run(options: argparse.Namespace) -> None:
    settings = ("clusters", "method", "train", "backbone", "weights", "seed", "image_size", "epochs", "restarts")
    said = {name: getattr(options, name) for name in settings if getattr(options, name) is not None}
    config = Config(**{**PRESETS.get(options.preset, {}), **said})
    root: Path = options.images
    if not root.is_dir():
        raise InputError(f"{root} is no folder")
    prepare(options.out)
    sources, skipped = read_folder(root, besides=options.out)
    if not sources:
        raise InputError(f"{root} holds no readable images ({len(skipped)} other files)")
    names = [source.path.relative_to(root).as_posix() for source in sources]
    truth = true_labels(names) if options.truth else None

    show = progress_line()
    steps = group(config, sources, cache_dir=options.cache, truth=truth)
    while True:
        try:
            show(next(steps))
        except StopIteration as end:
            grouping: Grouping = end.value
            break
    sys.stderr.write("\n")
    save_model(grouping, config, options.out)
    report = {
        "config": asdict(config.resolved()),
        "images": len(sources),
        "skipped": {"count": len(skipped), "files": skipped},
        "clusters": [
            {"cluster": k, "size": size, "cohesion": float(cohesion), "representatives": [names[i] for i in rows]}
            for k, (size, cohesion, rows) in enumerate(
                zip(grouping.metrics["sizes"], grouping.cohesion_K, grouping.representatives, strict=True)
            )
        ],
        "metrics": grouping.metrics,
    }
    write_text(
        options.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n", errors="backslashreplace"
    )
    write_text(options.out / "labels.csv", labels_csv(names, grouping))
    write_text(options.out / "levels.csv", levels_csv(names, grouping))


def prepare(out: Path) -> None:
    """Make the folder of the answer, and say before hours of training if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{out} cannot be written to: {error.strerror}") from error


def read_folder(root: Path, *, besides: Path) -> tuple[list[Source], list[str]]:
    """The readable images below a folder, in the order of their names, and the names of all else.

    Links to folders are followed, unless they lead where something was read already. What lies in `besides`, if that
    is inside of the folder, is left out.
    """
    out, seen = besides.resolve(), set()
    inside = out != root.resolve() and out.is_relative_to(root.resolve())
    unread: list[str] = []
    files: list[Path] = []
    tops = [root]
    for top in tops:  # grows by the links that are found
        for folder, folders, names in os.walk(top, onerror=lambda error: unread.append(error.filename)):
            here = Path(folder).resolve()
            if here in seen or (inside and here.is_relative_to(out)):
                folders.clear()
                continue
            seen.add(here)
            folders.sort()
            tops += [path for path in (Path(folder) / name for name in folders) if path.is_symlink()]
            files += [path for path in (Path(folder) / name for name in names) if path.is_file()]
    files.sort()
    with ThreadPoolExecutor(cpu_count()) as pool:
        keys = list(pool.map(key_of_readable, files))
    sources = [Source(key=key, path=path) for path, key in zip(files, keys, strict=True) if key]
    skipped = [*map(Path, unread), *(path for path, key in zip(files, keys, strict=True) if not key)]
    return sources, [path.relative_to(root).as_posix() for path in skipped]


def key_of_readable(path: Path) -> str | None:
    """SHA-256 of a picture that can be decoded, None for any other file."""
    try:
        images.decode(path, 32)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (images.UnreadableError, OSError):
        return None


def true_labels(names: Sequence[str]) -> list[str]:
    """The folder that every file lies in."""
    loose = [name for name in names if "/" not in name]
    if loose:
        raise InputError(f"--truth folder: {loose[0]} lies in no folder that could name its class")
    return [name.split("/")[-2] for name in names]


def progress_line() -> Callable[[Progress], None]:
    """Shows progress on stderr: one line that is rewritten on a terminal, a line every tenth elsewhere."""
    tenth = -1

    def show(progress: Progress) -> None:
        nonlocal tenth
        line = f"{progress.fraction:4.0%} {progress.stage} {progress.done}/{progress.total}"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{line:<60}")
        elif int(progress.fraction * 10) > tenth:
            tenth = int(progress.fraction * 10)
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    return show


def labels_csv(names: Sequence[str], grouping: Grouping) -> str:
    rows = (
        [
            name,
            grouping.labels_N[row],
            f"{grouping.confidence_N[row]:.6f}",
            grouping.runner_up_N[row],
            f"{grouping.margin_N[row]:.6f}",
            str(bool(grouping.consensus_N[row])).lower(),
        ]
        for row, name in enumerate(names)
    )
    return table(COLUMNS, rows)


def levels_csv(names: Sequence[str], grouping: Grouping) -> str:
    columns = (column.tolist() for column in grouping.levels.values())
    return table(["filename", *grouping.levels], zip(names, *columns, strict=True))


def table(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """CSV whose lines end with a line feed alone; a name may hold any letter."""
    lines = []
    for row in (heading, *rows):
        line = io.StringIO()
        csv.writer(line, lineterminator="\r\n").writerow(row)  # quotes both letters of its terminator
        lines.append(line.getvalue().removesuffix("\r\n"))
    return "\n".join([*lines, ""])


def write_text(path: Path, text: str, *, errors: str = "surrogateescape") -> None:
    """In UTF-8; `errors` says what becomes of the bytes of a name that are none: by default they stay as they are."""
    write_atomically(path, lambda file: file.write(text.encode(errors=errors)))
