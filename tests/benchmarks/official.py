"""Small files in the official formats of the benchmarks, written byte by byte."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def python2_pickle(batch: dict[str, object]) -> bytes:
    """A dictionary as Python 2's cPickle writes it in protocol 2: byte strings for text, NumPy's old names.

    The opcodes are those of CIFAR's own files; https://docs.python.org/3/library/pickletools.html names them.
    """
    body = b"".join(_value(key) + _value(value) for key, value in batch.items())
    return b"\x80\x02}(" + body + b"u."


def _value(value: object) -> bytes:
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode("ascii")
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_value, value)) + b"e"
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.uint8
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(map(_value, value.shape)) + b"t"
    raw = value.tobytes()
    return empty + b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"


def small_pictures(images: int, *, pixels: int = 32, seed: int = 0) -> np.ndarray:
    """Random pixels_NHWC, so that no two pictures, rows, columns or colours are alike."""
    return np.random.default_rng(seed).integers(0, 256, (images, pixels, pixels, 3)).astype(np.uint8)


def planes(pixels_NHWC: np.ndarray) -> np.ndarray:
    """CIFAR's rows: red, green, blue, each row by row."""
    return np.stack([np.concatenate([picture[:, :, colour].ravel() for colour in range(3)]) for picture in pixels_NHWC])


def write_cifar10(folder: Path, pixels_NHWC: np.ndarray, labels: list[int], *, binary: bool = False) -> None:
    """Six batches of equal size in a new folder."""
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for part, name in enumerate(names):
        rows = slice(part * len(labels) // 6, (part + 1) * len(labels) // 6)
        data = planes(pixels_NHWC[rows])
        if binary:
            record = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels[rows], data, strict=True))
            (folder / f"{name}.bin").write_bytes(record)
            continue
        batch = {
            "batch_label": f"training batch {part + 1} of 5",
            "labels": labels[rows],
            "data": data,
            "filenames": [f"picture_s_{row:06d}.png" for row in range(len(data))],
        }
        (folder / name).write_bytes(python2_pickle(batch))


def write_cifar100(folder: Path, pixels_NHWC: np.ndarray, fine: list[int], coarse: list[int], *, binary: bool) -> None:
    """The first two thirds as `train`, the rest as `test`."""
    folder.mkdir(parents=True)
    for name, rows in (("train", slice(0, len(fine) * 2 // 3)), ("test", slice(len(fine) * 2 // 3, None))):
        data = planes(pixels_NHWC[rows])
        if binary:
            labels = zip(coarse[rows], fine[rows], data, strict=True)
            (folder / f"{name}.bin").write_bytes(b"".join(bytes([c, f]) + row.tobytes() for c, f, row in labels))
            continue
        batch = {
            "filenames": ["bos_taurus_s_000507.png"] * len(data),
            "batch_label": "training batch 1 of 1",
            "fine_labels": fine[rows],
            "coarse_labels": coarse[rows],
            "data": data,
        }
        (folder / name).write_bytes(python2_pickle(batch))


def write_stl10(folder: Path, train: np.ndarray, test: np.ndarray, unlabelled: np.ndarray, labels: list[int]) -> None:
    """`labels` from 1 to 10 for train, then test. Pixels one after the other, as the page of STL-10 describes them."""
    folder.mkdir(parents=True)
    for name, pixels_NHWC in (("train", train), ("test", test), ("unlabeled", unlabelled)):
        content = bytearray()
        for picture in pixels_NHWC:
            for colour in range(3):
                for column in range(96):
                    content += picture[:, column, colour].tobytes()
        (folder / f"{name}_X.bin").write_bytes(content)
    (folder / "train_y.bin").write_bytes(bytes(labels[: len(train)]))
    (folder / "test_y.bin").write_bytes(bytes(labels[len(train) :]))


def write_pictures(folder: Path, names: list[str], *, pixels: int = 64) -> None:
    folder.mkdir(parents=True)
    for seed, name in enumerate(names):
        Image.fromarray(small_pictures(1, pixels=pixels, seed=seed)[0]).save(folder / name, "JPEG")


def tar_gz(path: Path, folder: Path) -> None:
    """The folder as the official archives hold it, below its own name."""
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)


def tar_gz_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
