"""Features of a collection: extracted once, kept on disk, resumed after a kill.

Letters in shapes: N images, U images that are not in the cache, B batch, D feature size, S pixels a side, C colours.

The cache is a folder of parts, each a `part-X.npy` with its images' keys in `part-X.keys` beside it. A part
appears whole or not at all, and is found by the digest of the weights, the image size, the preprocessing,
the pooling and the kind of device, whose last digits differ: any of them changed is another folder.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from models import backbones, images, networks
from models.files import write_atomically
from models.progress import Step

log = logging.getLogger(__name__)

Item = TypeVar("Item")

BATCH = 32
PART = 1024


@dataclass(frozen=True, kw_only=True)
class Source:
    """A picture to group. `key` names its content (SHA-256) in the feature cache."""

    key: str
    path: Path


class UnreadableImageError(ValueError):
    """A source that is missing or no picture."""


def extract(
    sources: Sequence[Source],
    *,
    backbone: str,
    weights: str | None = None,
    image_size: int,
    cache_dir: Path | None,
    threads: int,
    device: str,
) -> Generator[Step, None, np.ndarray]:
    """Features of every source as `float16` of shape (N, D); only those that the cache lacks are computed.

    They are float16 with and without a cache, so that a run does not depend on whether it had one.

    Raises:
        UnreadableImageError: a source cannot be decoded.
        BackboneError: the weights do not fit the backbone.

    """
    cache = None
    if cache_dir is not None:
        digest = networks.digest(backbone, weights)[:16]
        cache = (
            cache_dir / f"{backbone.replace('/', '-')}-{digest}-{image_size}-{images.PREPROCESSING}-{networks.POOLING}"
            f"{'' if device == 'cpu' else '-cuda'}"
        )
    row_of = {source.key: row for row, source in enumerate({s.key: s for s in sources}.values())}
    features_UD = np.empty((len(row_of), networks.feature_size(backbone, image_size=image_size)), np.float16)
    found = set(read_parts(cache, row_of, features_UD)) if cache else set()
    missing = [s for s in {s.key: s for s in sources}.values() if s.key not in found]
    yield Step(done=len(found), total=len(row_of))

    if missing:
        encode = backbones.encoder(backbone, weights=weights, image_size=image_size, threads=threads, device=device)

        def features(batch: Sequence[Source]) -> np.ndarray:
            # Every batch has the same shape: what an image becomes must not depend on its company.
            pixels_BSSC = np.zeros((BATCH, image_size, image_size, 3), np.uint8)
            decode_into(pixels_BSSC, batch)
            return encode(pixels_BSSC)[: len(batch)]

        started, since_part, done = time.monotonic(), 0, 0
        for batch, features_BD in by_threads(features, missing, threads=threads):
            features_UD[[row_of[source.key] for source in batch]] = features_BD
            done += len(batch)
            if cache and (done - since_part >= PART or done == len(missing)):
                keys = [source.key for source in missing[since_part:done]]
                write_part(cache, keys, features_UD[[row_of[key] for key in keys]])
                since_part = done
            rate = done / max(time.monotonic() - started, 1e-9)
            yield Step(done=len(found) + done, total=len(row_of), details={"images_per_s": rate})
    return features_UD[[row_of[source.key] for source in sources]]


def by_threads(
    work: Callable[[Sequence[Item]], np.ndarray], items: Sequence[Item], *, threads: int
) -> Iterator[tuple[Sequence[Item], np.ndarray]]:
    """Batches of items with what `work` makes of each, in order; every thread has a batch of its own."""
    with ThreadPoolExecutor(threads, thread_name_prefix="batch") as pool:
        ahead: deque[tuple[Sequence[Item], Future[np.ndarray]]] = deque()
        try:
            for start in range(0, len(items), BATCH):
                batch = items[start : start + BATCH]
                ahead.append((batch, pool.submit(work, batch)))
                if len(ahead) > 2 * threads:
                    ready, future = ahead.popleft()
                    yield ready, future.result()
            while ahead:
                ready, future = ahead.popleft()
                yield ready, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def decode_into(pixels_BSSC: np.ndarray, batch: Sequence[Source]) -> None:
    """The pixels of the sources into the first rows.

    Raises:
        UnreadableImageError: a source cannot be decoded.

    """
    for source, pixels_SSC in zip(batch, pixels_BSSC, strict=False):
        try:
            pixels_SSC[:] = images.decode(source.path, len(pixels_SSC))
        except images.UnreadableError as error:
            raise UnreadableImageError(f"image {source.path.name} cannot be read: {error}") from error


def read_parts(cache: Path, row_of: dict[str, int], into_UD: np.ndarray) -> Iterator[str]:
    """Copy what the cache holds of the wanted keys into their rows, and name the keys found."""
    for keys_path in sorted(cache.glob("part-*.keys")):
        keys = keys_path.read_text().split("\n")
        wanted = [(position, row_of[key]) for position, key in enumerate(keys) if key in row_of]
        if not wanted:
            continue
        positions, rows = zip(*wanted, strict=True)
        try:
            part_PD = np.load(keys_path.with_suffix(".npy"), mmap_mode="r")
            into_UD[list(rows)] = part_PD[list(positions)]
        except (ValueError, EOFError, IndexError, FileNotFoundError) as error:
            log.warning("%s is damaged (%s); its features are made again", keys_path.with_suffix(".npy"), error)
            keys_path.unlink(missing_ok=True)
            continue
        yield from (keys[position] for position in positions)


def write_part(cache: Path, keys: Sequence[str], features_PD: np.ndarray) -> None:
    """The features first, the keys after: a part exists from the moment its keys do."""
    cache.mkdir(parents=True, exist_ok=True)
    text = "\n".join(keys)
    part = cache / f"part-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npy"
    write_atomically(part, lambda file: np.save(file, features_PD))
    write_atomically(part.with_suffix(".keys"), lambda file: file.write(text.encode()))
