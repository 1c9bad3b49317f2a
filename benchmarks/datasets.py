"""Readers for the official files of the deep-clustering field's six benchmarks.

Nothing is unpacked and nothing in a file is trusted: sizes are checked before bytes are read, archives are streamed
for their regular members, pickles go through `benchmarks.pickles`. The counts are arguments only so that small files
in the same formats can be read; `benchmarks.protocols` says which parts of a set the field uses.

Letters in shapes: N images, H and W pixels, C the colours red, green and blue, R the bytes of a record.
"""

import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import pickles

PICTURE_BYTES = 1024**2  # of a small picture's file
PICTURE_SUFFIXES = (".jpeg", ".jpg", ".png")


class DatasetError(ValueError):
    """Files that are missing, of the wrong size or damaged; the message names the file and the limit."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Pictures with their true classes, which are for measuring only."""

    pictures: np.ndarray | tuple[Path, ...]  # pixels_NHWC uint8, or one file each
    labels_N: np.ndarray  # int64, positions in `classes`
    classes: tuple[str, ...]
    unlabelled: np.ndarray | None = None  # more pixels_NHWC without classes

    def __len__(self) -> int:
        return len(self.labels_N)


# CIFAR: https://www.cs.toronto.edu/~kriz/cifar.html

CIFAR_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_20 = (
    "aquatic mammals", "fish", "flowers", "food containers", "fruit and vegetables", "household electrical devices",
    "household furniture", "insects", "large carnivores", "large man-made outdoor things",
    "large natural outdoor scenes", "large omnivores and herbivores", "medium-sized mammals",
    "non-insect invertebrates", "people", "reptiles", "small mammals", "trees", "vehicles 1", "vehicles 2",
)  # fmt: skip
CIFAR_PIXELS = 32
CIFAR_BYTES = 3 * CIFAR_PIXELS**2


def cifar10(root: Path, *, batch_images: int = 10_000) -> Dataset:
    """Train and test: the python or the binary version, or one folder (or zip) with a folder a class.

    Args:
        root: the official folder or `.tar.gz`, a folder that holds one of them, or the folder or zip of classes.
        batch_images: in each of the six files.

    Raises:
        DatasetError: see there.

    """
    folders = class_folders(root, CIFAR_10)
    if folders is not None:
        return folders
    parts = dict.fromkeys((*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"), batch_images)
    places = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
    return cifar(root, places, parts, key="labels", label_bytes=1, classes=CIFAR_10)


def cifar100(root: Path, *, train_images: int = 50_000, test_images: int = 10_000) -> Dataset:
    """Train and test of the python or the binary version, with the 20 superclasses that the files give.

    Raises:
        DatasetError: see there.

    """
    places = ("cifar-100-python", "cifar-100-binary", "cifar-100-python.tar.gz", "cifar-100-binary.tar.gz")
    parts = {"train": train_images, "test": test_images}
    return cifar(root, places, parts, key="coarse_labels", label_bytes=2, classes=CIFAR_20)


def cifar(
    root: Path, places: Sequence[str], parts: Mapping[str, int], *, key: str, label_bytes: int, classes: tuple[str, ...]
) -> Dataset:
    """Both versions hold a picture as 1,024 red bytes, row by row, then green, then blue.

    The binary one puts one byte of label before it, in CIFAR-100 two, of which the first is the superclass.
    """
    record = label_bytes + CIFAR_BYTES
    # A python batch also holds labels and file names: 31 to 33 bytes an image in the official ones.
    limits = {name: (images * CIFAR_BYTES, images * (CIFAR_BYTES + 128) + 4096) for name, images in parts.items()}
    limits |= {f"{name}.bin": (images * record, images * record) for name, images in parts.items()}
    place = find(root, places, list(limits))
    found = read(place, limits)
    binary = not any(name in found for name in parts)
    pixels, labels = [], []
    for name, images in parts.items():
        file = f"{name}.bin" if binary else name
        if file not in found:
            raise DatasetError(f"{place / file} is missing")
        if binary:
            record_NR = found[file].reshape(images, record)
            pixels.append(record_NR[:, label_bytes:])
            labels.append(record_NR[:, 0].astype(np.int64))
        else:
            pixels_NR, labels_N = python_batch(place / file, found[file], images, key)
            pixels.append(pixels_NR)
            labels.append(labels_N)
        check_labels(place / file, labels[-1], len(classes))
    pixels_NCHW = np.concatenate(pixels).reshape(-1, 3, CIFAR_PIXELS, CIFAR_PIXELS)
    return Dataset(
        pictures=np.ascontiguousarray(pixels_NCHW.transpose(0, 2, 3, 1)),
        labels_N=np.concatenate(labels),
        classes=classes,
    )


def python_batch(path: Path, content: np.ndarray, images: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = pickles.load(content.tobytes())
    except pickles.PickleError as error:
        raise DatasetError(f"{path}: {error}") from error
    pixels_NR, labels = batch.get("data"), batch.get(key)
    if not isinstance(pixels_NR, np.ndarray) or pixels_NR.shape != (images, CIFAR_BYTES):
        raise DatasetError(f"{path}: its 'data' is no array of {images} x {CIFAR_BYTES} bytes")
    if not isinstance(labels, list) or len(labels) != images or any(type(label) is not int for label in labels):
        raise DatasetError(f"{path}: its {key!r} is no list of {images} whole numbers")
    # Clipped, because a number of any size may stand there: still outside the classes, and an int64.
    return pixels_NR, np.array([min(max(label, -1), 255) for label in labels], np.int64)


def class_folders(root: Path, classes: tuple[str, ...]) -> Dataset | None:
    """A folder or a zip with a folder of 32 x 32 JPEG or PNG files for each class; None if `root` is neither."""
    if root.suffix.lower() == ".zip":
        members = zip_pictures(root)
    elif all((root / name).is_dir() for name in classes):
        members = folder_pictures(root, classes)
    else:
        return None
    pixels, labels = [], []
    for name, content in members:
        folder = name.split("/", maxsplit=1)[0]
        if folder not in classes:
            raise DatasetError(f"{root}: {name} lies in none of the folders {', '.join(classes)}")
        pixels.append(small_picture(root / name, content))
        labels.append(classes.index(folder))
    if not pixels:
        raise DatasetError(f"{root} holds no pictures")
    return Dataset(pictures=np.stack(pixels), labels_N=np.array(labels, np.int64), classes=classes)


def folder_pictures(root: Path, classes: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for name in classes:
        for path in pictures_in(root / name):
            check_size(path, path.stat().st_size, 1, PICTURE_BYTES)
            yield f"{name}/{path.name}", path.read_bytes()


def zip_pictures(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                if member.filename.lower().endswith(PICTURE_SUFFIXES):
                    check_size(path / member.filename, member.file_size, 1, PICTURE_BYTES)
                    with archive.open(member) as file:
                        yield member.filename, file.read(PICTURE_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise DatasetError(f"{path} cannot be read: {error}") from error


def small_picture(path: Path, content: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            if image.size != (CIFAR_PIXELS, CIFAR_PIXELS):
                raise DatasetError(f"{path} has {image.width} x {image.height} pixels; it must have 32 x 32")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise error if isinstance(error, DatasetError) else DatasetError(f"{path} is no picture: {error}") from error


# STL-10: https://cs.stanford.edu/~acoates/stl10/

STL_10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
STL_PIXELS = 96
STL_BYTES = 3 * STL_PIXELS**2


def stl10(
    root: Path, *, train_images: int = 5_000, test_images: int = 8_000, unlabelled_images: int = 100_000
) -> Dataset:
    """Train and test with their classes, and the unlabelled pictures unless none are asked for.

    Args:
        root: `stl10_binary`, `stl10_binary.tar.gz` or a folder that holds one of them.
        train_images: in `train_X.bin` and `train_y.bin`.
        test_images: in `test_X.bin` and `test_y.bin`.
        unlabelled_images: in `unlabeled_X.bin`; 0 leaves it unread. A folder's file is mapped, not loaded (2.8 GB).

    Raises:
        DatasetError: see there.

    """
    sizes = {"train_X.bin": train_images * STL_BYTES, "train_y.bin": train_images}
    sizes |= {"test_X.bin": test_images * STL_BYTES, "test_y.bin": test_images}
    if unlabelled_images:
        sizes["unlabeled_X.bin"] = unlabelled_images * STL_BYTES
    place = find(root, ("stl10_binary", "stl10_binary.tar.gz"), list(sizes))
    found = read(place, {name: (size, size) for name, size in sizes.items()})
    for name in sizes:
        if name not in found:
            raise DatasetError(f"{place / name} is missing")
    labels_N = np.concatenate([found["train_y.bin"], found["test_y.bin"]]).astype(np.int64) - 1
    check_labels(place / "train_y.bin and test_y.bin", labels_N, len(STL_10))
    return Dataset(
        pictures=np.concatenate([stl10_pixels(found["train_X.bin"]), stl10_pixels(found["test_X.bin"])]),
        labels_N=labels_N,
        classes=STL_10,
        unlabelled=stl10_pixels(found["unlabeled_X.bin"]) if unlabelled_images else None,
    )


def stl10_pixels(content: np.ndarray) -> np.ndarray:
    """A view of shape (N, H, W, C): the file holds one colour after the other, and each column by column."""
    return content.reshape(-1, 3, STL_PIXELS, STL_PIXELS).transpose(0, 3, 2, 1)


# ImageNet's classes are folders named by WordNet ids: https://www.image-net.org

WORDNET_ID = re.compile(r"n\d{8}")


def imagenet(root: Path, classes: Mapping[str, str], *, class_images: int = 1_300) -> Dataset:
    """Some classes of ILSVRC-2012's training images.

    Args:
        root: ILSVRC-2012, its `train` folder, or a folder with these classes alone.
        classes: WordNet id to name.
        class_images: in each folder.

    Raises:
        DatasetError: see there.

    """
    places = ("train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train")
    place = find(root, places, list(classes), is_there=Path.is_dir)
    folders = [place / wordnet_id for wordnet_id in classes]
    return of_folders(folders, tuple(classes.values()), class_images)


def tiny_imagenet(root: Path, *, class_count: int = 200, class_images: int = 500) -> Dataset:
    """The training images of `tiny-imagenet-200` (unzipped).

    Raises:
        DatasetError: see there.

    """
    place, classes = tiny_imagenet_classes(root, class_count)
    return of_folders([place / "train" / wordnet_id / "images" for wordnet_id in classes], classes, class_images)


def tiny_imagenet_validation(root: Path, *, class_count: int = 200, class_images: int = 50) -> Dataset:
    """The validation images, whose classes stand in `val_annotations.txt`: file, WordNet id, box.

    Raises:
        DatasetError: see there.

    """
    place, classes = tiny_imagenet_classes(root, class_count)
    table = place / "val" / "val_annotations.txt"
    rows = [line.split("\t") for line in text_lines(table)]
    if len(rows) != class_count * class_images:
        raise DatasetError(f"{table} has {len(rows)} lines; it must have {class_count * class_images}")
    paths, labels = [], []
    for row in rows:
        if len(row) < 2 or not re.fullmatch(r"val_\d+\.JPEG", row[0]) or row[1] not in classes:
            raise DatasetError(f"{table}: {row[:2]} is not a file of the form val_0.JPEG and a known class")
        paths.append(place / "val" / "images" / row[0])
        labels.append(classes.index(row[1]))
    for path in paths:
        if not path.is_file():
            raise DatasetError(f"{path} is missing")
    return Dataset(pictures=tuple(paths), labels_N=np.array(labels, np.int64), classes=classes)


def tiny_imagenet_classes(root: Path, count: int) -> tuple[Path, tuple[str, ...]]:
    place = find(root, ("tiny-imagenet-200",), ["wnids.txt"])
    classes = tuple(text_lines(place / "wnids.txt"))
    if len(classes) != count or len(set(classes)) != count or not all(map(WORDNET_ID.fullmatch, classes)):
        raise DatasetError(f"{place / 'wnids.txt'} does not hold {count} different WordNet ids, one a line")
    return place, classes


def of_folders(folders: Sequence[Path], classes: tuple[str, ...], class_images: int) -> Dataset:
    paths: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise DatasetError(f"{folder} is missing")
        found = pictures_in(folder)
        if len(found) != class_images:
            raise DatasetError(f"{folder} holds {len(found)} pictures; it must hold {class_images}")
        paths += found
    labels_N = np.repeat(np.arange(len(classes)), class_images)
    return Dataset(pictures=tuple(paths), labels_N=labels_N, classes=classes)


def pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())


def text_lines(path: Path, most: int = 4 * 1024**2) -> list[str]:
    if not path.is_file():
        raise DatasetError(f"{path} is missing")
    check_size(path, path.stat().st_size, 1, most)
    return path.read_text("ascii", "replace").splitlines()


# Files in a folder or in a `.tar.gz`


def find(
    root: Path, places: Sequence[str], names: Sequence[str], *, is_there: Callable[[Path], bool] = Path.is_file
) -> Path:
    """`root` if it is a file or holds one of `names`, else the first of the places below it that does."""
    for place in (root, *(root / name for name in places)):
        if place.is_file() or any(is_there(place / name) for name in names):
            return place
    raise DatasetError(f"{root} holds neither {names[0]} nor {' nor '.join(places)}")


def read(place: Path, limits: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """Those of the files that are there, as bytes (`uint8`); `limits` gives the least and the most bytes of each."""
    if place.is_dir():
        return {name: mapped(place / name, *limits[name]) for name in limits if (place / name).is_file()}
    found: dict[str, np.ndarray] = {}
    # Other members of the official archives are a page and lists of names; what comes after this is no data.
    most = sum(most for _, most in limits.values()) + 64 * 1024**2
    try:
        with tarfile.open(place, "r|gz") as archive:
            for member in archive:
                if member.offset_data + member.size > most:
                    raise DatasetError(f"{place} unpacks to more than {most} bytes")
                name = member.name.rsplit("/", maxsplit=1)[-1]
                if name not in limits or not member.isreg() or name in found:
                    continue
                check_size(place / name, member.size, *limits[name])
                file = archive.extractfile(member)
                content = b"" if file is None else file.read()
                check_size(place / name, len(content), member.size, member.size)
                found[name] = np.frombuffer(content, np.uint8)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DatasetError(f"{place} is no .tar.gz or damaged: {error}") from error
    return found


def mapped(path: Path, least: int, most: int) -> np.ndarray:
    check_size(path, path.stat().st_size, least, most)
    return np.memmap(path, np.uint8, mode="r")


def check_size(path: Path, size: int, least: int, most: int) -> None:
    if not least <= size <= most:
        limit = f"{least}" if least == most else f"{least} to {most}"
        raise DatasetError(f"{path} has {size} bytes; it must have {limit}")


def check_labels(path: Path, labels_N: np.ndarray, classes: int) -> None:
    if labels_N.min() < 0 or labels_N.max() >= classes:
        raise DatasetError(f"{path} holds a label that is none of the {classes} classes")
