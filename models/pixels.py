"""Decoded images of a collection in one array, kept on disk: decoded once, mapped into memory ever after.

Letters in shapes: N images, S pixels a side, C colours.

The file `X.npy` is named by the images' contents in their order, its folder by size and preprocessing. It grows as
`X.draft`, with the number of finished rows in `X.rows`, and gets its name when it is whole; a killed decoding goes
on from the last count. One process at a time writes a draft; others wait for it.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import numpy as np

from models import images
from models.features import Source, by_threads, decode_into
from models.files import write_atomically
from models.progress import Step

# Images between counts: what a kill can cost.
PART = 2048
WAIT_S = 0.5


def gather(
    sources: Sequence[Source], *, image_size: int, cache_dir: Path | None, threads: int
) -> Generator[Step, None, np.ndarray]:
    """Pixels of every source, uint8 of shape (N, S, S, C); a read-only memory map where there is a cache.

    Raises:
        UnreadableImageError: a source cannot be decoded.
        OSError: the disk is full.

    """
    shape = (len(sources), image_size, image_size, 3)
    if cache_dir is None:
        pixels_NSSC = np.empty(shape, np.uint8)
        for done in fill(pixels_NSSC, sources, first=0, threads=threads):
            yield Step(done=done, total=len(sources))
        return pixels_NSSC

    path = address(sources, image_size=image_size, cache_dir=cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        while not path.exists() and not locked(lock.fileno()):
            yield Step(done=0, total=len(sources))
            time.sleep(WAIT_S)
        if not path.exists():
            yield from write(path, sources, shape, threads=threads)
    yield Step(done=len(sources), total=len(sources))
    whole: np.ndarray = np.load(path, mmap_mode="r")
    return whole


def address(sources: Sequence[Source], *, image_size: int, cache_dir: Path) -> Path:
    keys = "\n".join(source.key for source in sources)
    folder = cache_dir / f"pixels-{image_size}-{images.PREPROCESSING}"
    return folder / f"{hashlib.sha256(keys.encode()).hexdigest()[:32]}.npy"


def write(
    path: Path, sources: Sequence[Source], shape: tuple[int, ...], *, threads: int
) -> Generator[Step, None, None]:
    """Decode into the draft from the last count on, then give it its name."""
    draft, count = path.with_suffix(".draft"), path.with_suffix(".rows")
    if not (draft.exists() and count.exists()):
        count.unlink(missing_ok=True)
        allocate(draft, shape)
    first = int(count.read_text()) if count.exists() else 0
    pixels_NSSC = np.lib.format.open_memmap(draft, mode="r+")
    counted = first
    yield Step(done=first, total=len(sources))
    for done in fill(pixels_NSSC, sources, first=first, threads=threads):
        if done - counted >= PART or done == len(sources):
            pixels_NSSC.flush()  # the rows first, their count after
            write_atomically(count, lambda file, done=done: file.write(str(done).encode()))  # type: ignore[misc]
            counted = done
        yield Step(done=done, total=len(sources))
    del pixels_NSSC
    draft.replace(path)
    count.unlink(missing_ok=True)


def allocate(path: Path, shape: tuple[int, ...]) -> None:
    """An empty array with all its room on the disk: a full disk is an error here, and a dead process later."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        os.fsync(file.fileno())


def fill(pixels_NSSC: np.ndarray, sources: Sequence[Source], *, first: int, threads: int) -> Iterator[int]:
    """Decode the sources from `first` on into their rows; yields how many rows are done."""

    def pixels(batch: Sequence[Source]) -> np.ndarray:
        pixels_BSSC = np.empty((len(batch), *pixels_NSSC.shape[1:]), np.uint8)
        decode_into(pixels_BSSC, batch)
        return pixels_BSSC

    done = first
    for batch, pixels_BSSC in by_threads(pixels, sources[first:], threads=threads):
        pixels_NSSC[done : done + len(batch)] = pixels_BSSC
        done += len(batch)
        yield done


def locked(descriptor: int) -> bool:
    """Whether this process now has the lock; it ends with the process, however that ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
