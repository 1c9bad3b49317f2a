"""Where bytes live. The only file that knows a path.

    {data_dir}/incoming/{upload}/{part}                      request parts, until they are ingested
    {data_dir}/collections/{collection}/originals/ab/abcd…   by SHA-256
    {data_dir}/collections/{collection}/thumbnails/ab/abcd…  JPEG
    {data_dir}/collections/{collection}/staging/              files that an ingest is checking
    {data_dir}/collections/{collection}/features/            the trainer's cache
    {data_dir}/runs/{run}/                                   a finished run's artefacts, the trainers' log
    {data_dir}/runs/{run}/attempt-{n}/                       what an attempt makes, until it is a result
    {data_dir}/runs/{run}/checkpoint/                        what the next attempt goes on from
    {data_dir}/deletions/{collection}                        what goes with a collection that is being deleted
    {data_dir}/deleted/                                      folders on their way out
    {data_dir}/metrics/{worker}.prom                         what a worker counts
    {data_dir}/weights/                                      weights files that users bring, or {weights_dir}

A file is written under a temporary name in the folder it is for, made durable, then renamed; only a
committed row makes it visible.
"""

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import BinaryIO

from app.config import settings

TEMPORARY_SUFFIX = ".part"
SCRATCH_IN_MEMORY = 2**20


def _root() -> Path:
    return settings().data_dir.resolve()


def incoming(upload_id: uuid.UUID) -> Path:
    return _root() / "incoming" / str(upload_id)


def incoming_part(upload_id: uuid.UUID, part: int) -> Path:
    return incoming(upload_id) / f"{part:06d}"


def collection(collection_id: uuid.UUID) -> Path:
    return _root() / "collections" / str(collection_id)


def original(collection_id: uuid.UUID, sha256: str) -> Path:
    return collection(collection_id) / "originals" / sha256[:2] / sha256


def thumbnail(collection_id: uuid.UUID, sha256: str) -> Path:
    return collection(collection_id) / "thumbnails" / sha256[:2] / f"{sha256}.jpg"


def staging(collection_id: uuid.UUID) -> Path:
    """Where an ingest writes before it knows a file's name; emptied by each attempt."""
    return collection(collection_id) / "staging"


def features(collection_id: uuid.UUID) -> Path:
    return collection(collection_id) / "features"


def run(run_id: uuid.UUID) -> Path:
    return _root() / "runs" / str(run_id)


def attempt(run_id: uuid.UUID, number: int) -> Path:
    """Each attempt writes to a folder of its own: one that was lost, and does not know yet, harms no other."""
    return run(run_id) / f"attempt-{number}"


def checkpoint(run_id: uuid.UUID) -> Path:
    return run(run_id) / "checkpoint"


def run_leftovers(run_id: uuid.UUID) -> list[Path]:
    """What only attempts still to come could need: the checkpoint, and the folders of attempts that were killed."""
    return [checkpoint(run_id), *run(run_id).glob("attempt-*")]


def remove_run_leftovers(run_id: uuid.UUID) -> None:
    """Clear a run up that has ended."""
    for path in run_leftovers(run_id):
        remove(path)


def _weights_dir() -> Path:
    return (settings().weights_dir or _root() / "weights").resolve()


def weights_files() -> list[str]:
    """The names of the weights files that users brought, in order."""
    folder = _weights_dir()
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def weights(name: str) -> Path:
    """The weights file of a name that is one of `weights_files()`."""
    return _weights_dir() / name


def levels(run_id: uuid.UUID) -> Path:
    """The table of a finished run that has the group of every image at each level of the merge tree."""
    return run(run_id) / "levels.csv"


def all_incoming() -> Iterator[Path]:
    folder = _root() / "incoming"
    if folder.is_dir():
        yield from folder.iterdir()


def all_runs() -> Iterator[Path]:
    folder = _root() / "runs"
    if folder.is_dir():
        yield from folder.iterdir()


def now() -> float:
    """The time of the file system, which ages are measured by: this machine's clock may be another."""
    root = _root()
    os.utime(root)  # needs no room, where a file might find none
    return root.stat().st_mtime


def is_full(error: Exception) -> bool:
    """Whether there was no room left, on the disk or in a quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def metrics() -> Path:
    """Where workers write what they count."""
    return _root() / "metrics"


def scratch() -> SpooledTemporaryFile[bytes]:
    """A file without a name, in memory while it is small; it goes when it is closed, or with its process."""
    _root().mkdir(parents=True, exist_ok=True)
    return SpooledTemporaryFile(max_size=SCRATCH_IN_MEMORY, dir=str(_root()))


def try_to_write() -> None:
    """Raise `OSError` unless a file can be written."""
    path = _root() / f"writable.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(4096))
    finally:
        path.unlink(missing_ok=True)


def free_bytes() -> int:
    root = _root()
    root.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(root).free


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under `path` only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def publish(pairs: Iterable[tuple[str, str]]) -> None:
    """Give finished temporary files their names, then wait once until all of it is on the disk.

    One wait for a batch costs what one `fsync` costs, where thousands of small files would each wait.
    Names come before the wait, since only a row committed after it makes them visible.
    """
    for temporary, final in pairs:
        try:
            os.replace(temporary, final)  # noqa: PTH105 - path objects cost more than the call
        except FileNotFoundError:
            Path(final).parent.mkdir(parents=True, exist_ok=True)
            Path(temporary).replace(final)
    _sync_file_system(_root())


def make_durable(folder: Path) -> None:
    """Wait until all files written below `folder` are on the disk."""
    _sync_file_system(folder)


def _sync_file_system(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), "syncfs failed", str(folder))
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def deletion(collection_id: uuid.UUID, runs: Sequence[uuid.UUID]) -> Iterator[list[Path]]:
    """Inside, the rows of a collection and of its runs go for good; at the end, their folders are out of sight.

    They are in the list that it gives, to be removed afterwards: that takes long where there are many files.
    What is to go is written down first: should this process end in between, a sweeper looks whether the rows are gone.
    Folders that no row names say nothing, since the rows may be in another database than the one that is asked.
    """
    plan = _root() / "deletions" / str(collection_id)
    with suppress(OSError), atomic_write(plan) as file:  # on a full disk, deleting is what makes room
        file.write("\n".join(map(str, runs)).encode())
    graves: list[Path] = []
    yield graves
    graves += carry_out(collection_id, runs)


def carry_out(collection_id: uuid.UUID, runs: Sequence[uuid.UUID]) -> list[Path]:
    """The second half of a deletion: what is left to be removed, or will be by a sweeper."""
    graves = [_bury(path) for path in (collection(collection_id), *map(run, runs)) if path.exists()]
    forget_deletion(collection_id)
    return [grave for grave in graves if grave is not None]


def forget_deletion(collection_id: uuid.UUID) -> None:
    remove(_root() / "deletions" / str(collection_id))


def all_deletions() -> Iterator[tuple[uuid.UUID, list[uuid.UUID], float]]:
    """Of every deletion under way, or cut short: the collection, its runs, and when it began by `now()`."""
    folder = _root() / "deletions"
    for plan in list(folder.iterdir()) if folder.is_dir() else []:
        with suppress(ValueError, FileNotFoundError):  # not yet whole; ended meanwhile
            runs = [uuid.UUID(line) for line in plan.read_text().split()]
            yield uuid.UUID(plan.name), runs, plan.stat().st_mtime


def _bury(path: Path) -> Path | None:
    grave = _root() / "deleted" / f"{path.name}-{uuid.uuid4().hex}"
    try:
        grave.parent.mkdir(exist_ok=True)
        path.rename(grave)
    except OSError:  # a full disk may have no room for another name, and deleting is what makes room
        remove(path)
        return None
    return grave


def all_discarded() -> Iterator[Path]:
    folder = _root() / "deleted"
    if folder.is_dir():
        yield from folder.iterdir()


def remove(path: Path) -> None:
    """Remove a folder or file, whether or not it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
