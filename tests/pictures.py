"""Small real pictures, and archives of them."""

import io
import tarfile
import zipfile

import numpy as np
from PIL import Image


def picture(seed: int = 0, *, size: tuple[int, int] = (40, 30), encoding: str = "PNG", kind: int = 0) -> bytes:
    """An encoded picture; kinds look different (warm stripes, cool noise), seeds differ in detail."""
    random = np.random.default_rng(seed)
    width, height = size
    pixels = random.integers(0, 60, (height, width, 3))
    if kind == 0:
        pixels[:, (np.arange(width) // 5) % 2 == 0] += np.array([180, 120, 0])
    else:
        pixels += np.array([0, 60, 190])
    return encoded(Image.fromarray(pixels.astype("uint8")), encoding)


def encoded(image: Image.Image, encoding: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, encoding, **options)
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    """The same bytes for the same files: no time of day goes in."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def tar_of(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def two_kinds(count: int) -> dict[str, bytes]:
    """`count` pictures, in the folders `stripes` and `noise` by turns."""
    return {
        f"{'stripes' if number % 2 == 0 else 'noise'}/{number:03d}.png": picture(number, kind=number % 2)
        for number in range(count)
    }
