"""The readers, on small files in the official formats; torchvision's readers are the second opinion."""

import gzip
import pickle
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torchvision
from PIL import Image

from benchmarks import datasets, pickles
from benchmarks.datasets import DatasetError
from tests.benchmarks.official import (
    python2_pickle,
    small_pictures,
    tar_gz,
    tar_gz_of,
    write_cifar10,
    write_cifar100,
    write_pictures,
    write_stl10,
)
from tests.pictures import picture

PIXELS = small_pictures(12)
LABELS = [3, 9, 0, 1, 2, 8, 7, 6, 5, 4, 4, 0]
FINE = [11, 4, 99, 11, 0, 50]
COARSE = [14, 0, 13, 14, 4, 16]
WORDNET_IDS = {"n02056570": "king penguin", "n02085936": "Maltese dog"}


@pytest.mark.parametrize("binary", [False, True])
def test_cifar10_has_the_pixels_and_labels_that_were_written(tmp_path, binary):
    folder = tmp_path / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    write_cifar10(folder, PIXELS, LABELS, binary=binary)
    for root in (tmp_path, folder):
        found = datasets.cifar10(root, batch_images=2)
        assert np.array_equal(found.pictures, PIXELS)
        assert found.labels_N.tolist() == LABELS
        assert found.classes[found.labels_N[0]] == "cat"


@pytest.mark.parametrize("binary", [False, True])
def test_an_official_archive_is_read_without_unpacking(tmp_path, binary):
    write_cifar10(tmp_path / "cifar-10-batches", PIXELS, LABELS, binary=binary)
    name = "cifar-10-binary.tar.gz" if binary else "cifar-10-python.tar.gz"
    (tmp_path / "root").mkdir()
    tar_gz(tmp_path / "root" / name, tmp_path / "cifar-10-batches")
    for root in (tmp_path / "root", tmp_path / "root" / name):
        found = datasets.cifar10(root, batch_images=2)
        assert np.array_equal(found.pictures, PIXELS)
    assert [path.name for path in (tmp_path / "root").iterdir()] == [name]


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100_takes_the_superclasses_that_stand_in_the_file(tmp_path, binary):
    folder = tmp_path / ("cifar-100-binary" if binary else "cifar-100-python")
    write_cifar100(folder, PIXELS[:6], FINE, COARSE, binary=binary)
    found = datasets.cifar100(tmp_path, train_images=4, test_images=2)
    assert np.array_equal(found.pictures, PIXELS[:6])
    assert found.labels_N.tolist() == COARSE
    assert len(found.classes) == 20


class TrustingCifar10(torchvision.datasets.CIFAR10):
    def _check_integrity(self):
        return True

    def _load_meta(self):
        pass


class TrustingStl10(torchvision.datasets.STL10):
    def _check_integrity(self):
        return True


def test_torchvision_reads_the_same_from_the_same_cifar10(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py", PIXELS, LABELS)
    parts = [TrustingCifar10(tmp_path, train=train) for train in (True, False)]
    found = datasets.cifar10(tmp_path, batch_images=2)
    assert np.array_equal(found.pictures, np.concatenate([part.data for part in parts]))
    assert found.labels_N.tolist() == [label for part in parts for label in part.targets]


def test_torchvision_reads_the_same_from_the_same_stl10(tmp_path):
    pixels = small_pictures(4, pixels=96)
    write_stl10(tmp_path / "stl10_binary", pixels[:2], pixels[2:3], pixels[3:], [1, 10, 7])
    found = datasets.stl10(tmp_path, train_images=2, test_images=1, unlabelled_images=1)
    parts = [TrustingStl10(str(tmp_path), split=split) for split in ("train", "test", "unlabeled")]
    data_NHWC = [part.data.transpose(0, 2, 3, 1) for part in parts]
    assert np.array_equal(found.pictures, np.concatenate(data_NHWC[:2]))
    assert np.array_equal(found.unlabelled, data_NHWC[2])
    assert found.labels_N.tolist() == [*parts[0].labels.tolist(), *parts[1].labels.tolist()]


def test_stl10_columns_come_first(tmp_path):
    """A picture whose upper edge is red and whose left edge is green stays upright."""
    upright = np.zeros((1, 96, 96, 3), np.uint8)
    upright[0, 0, :, 0] = 255
    upright[0, 1:, 0, 1] = 255
    write_stl10(tmp_path / "stl10_binary", upright, upright, upright, [1, 2])
    raw = (tmp_path / "stl10_binary" / "train_X.bin").read_bytes()
    assert raw[:3] == b"\xff\x00\x00"  # down the first column, red at its top alone
    assert raw[96 * 96 : 96 * 96 + 3] == b"\x00\xff\xff"  # the same column in green
    found = datasets.stl10(tmp_path / "stl10_binary", train_images=1, test_images=1, unlabelled_images=0)
    assert np.array_equal(found.pictures[0], upright[0])
    assert found.labels_N.tolist() == [0, 1]
    assert found.unlabelled is None


def test_stl10s_archive(tmp_path):
    pixels = small_pictures(3, pixels=96)
    write_stl10(tmp_path / "stl10_binary", pixels[:1], pixels[1:2], pixels[2:], [1, 2])
    tar_gz(tmp_path / "stl10_binary.tar.gz", tmp_path / "stl10_binary")
    found = datasets.stl10(tmp_path / "stl10_binary.tar.gz", train_images=1, test_images=1, unlabelled_images=1)
    assert np.array_equal(found.pictures, pixels[:2])
    assert np.array_equal(found.unlabelled, pixels[2:])


@pytest.mark.parametrize("place", ["", "train", "ILSVRC/Data/CLS-LOC/train"])
def test_imagenet_classes_are_folders(tmp_path, place):
    for wordnet_id in (*WORDNET_IDS, "n99999999"):
        write_pictures(tmp_path / place / wordnet_id, [f"{wordnet_id}_{number}.JPEG" for number in (10, 2, 3)])
    found = datasets.imagenet(tmp_path, WORDNET_IDS, class_images=3)
    assert [path.name for path in found.pictures[:3]] == [f"n02056570_{number}.JPEG" for number in (10, 2, 3)]
    assert found.labels_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.classes == ("king penguin", "Maltese dog")


def write_tiny_imagenet(folder):
    for wordnet_id in WORDNET_IDS:
        write_pictures(folder / "train" / wordnet_id / "images", [f"{wordnet_id}_{number}.JPEG" for number in range(3)])
        (folder / "train" / wordnet_id / f"{wordnet_id}_boxes.txt").write_text("")
    (folder / "wnids.txt").write_text("n02085936\nn02056570\n")
    write_pictures(folder / "val" / "images", ["val_0.JPEG", "val_1.JPEG"])
    table = "val_0.JPEG\tn02056570\t0\t32\t44\t62\nval_1.JPEG\tn02085936\t52\t55\t57\t59\n"
    (folder / "val" / "val_annotations.txt").write_text(table)


def test_tiny_imagenet_in_the_order_of_its_own_list(tmp_path):
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    train = datasets.tiny_imagenet(tmp_path, class_count=2, class_images=3)
    assert [path.name[:9] for path in train.pictures] == ["n02085936"] * 3 + ["n02056570"] * 3
    assert train.labels_N.tolist() == [0, 0, 0, 1, 1, 1]
    validation = datasets.tiny_imagenet_validation(tmp_path / "tiny-imagenet-200", class_count=2, class_images=1)
    assert [path.name for path in validation.pictures] == ["val_0.JPEG", "val_1.JPEG"]
    assert validation.labels_N.tolist() == [1, 0]


def test_tiny_imagenet_names_what_is_wrong(tmp_path):
    write_tiny_imagenet(tmp_path)
    with pytest.raises(DatasetError, match="images holds 3 pictures; it must hold 4"):
        datasets.tiny_imagenet(tmp_path, class_count=2, class_images=4)
    (tmp_path / "val" / "val_annotations.txt").write_text("../../secret\tn02056570\n" * 2)
    with pytest.raises(DatasetError, match=r"secret.*is not a file of the form"):
        datasets.tiny_imagenet_validation(tmp_path, class_count=2, class_images=1)
    (tmp_path / "wnids.txt").write_text("n02085936\n../n0205\n")
    with pytest.raises(DatasetError, match=r"wnids\.txt does not hold 2 different WordNet ids"):
        datasets.tiny_imagenet(tmp_path, class_count=2, class_images=3)


def test_cifar10_as_a_folder_or_a_zip_with_a_folder_a_class(tmp_path):
    (tmp_path / "folders").mkdir()
    with zipfile.ZipFile(tmp_path / "cifar10.zip", "w") as archive:
        for label, name in enumerate(datasets.CIFAR_10):
            path = tmp_path / "folders" / name / "train_0.png"
            path.parent.mkdir()
            Image.fromarray(PIXELS[label]).save(path)
            archive.write(path, f"{name}/train_0.png")
    for root in (tmp_path / "cifar10.zip", tmp_path / "folders"):
        found = datasets.cifar10(root)
        assert np.array_equal(found.pictures, PIXELS[:10])
        assert found.labels_N.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("whale/1.png", picture(size=(32, 32)), "whale/1.png lies in none of the folders airplane"),
        ("cat/1.png", picture(size=(40, 30)), "cat/1.png has 40 x 30 pixels; it must have 32 x 32"),
        ("cat/1.png", b"no picture", "cat/1.png is no picture"),
        ("cat/1.png", b"\0" * 2_000_000, "cat/1.png has 2000000 bytes; it must have 1 to 1048576"),
        ("cat/notes.txt", b"text", "holds no pictures"),
    ],
)
def test_a_wrong_file_in_a_zip_is_named(tmp_path, name, content, message):
    with zipfile.ZipFile(tmp_path / "cifar10.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    with pytest.raises(DatasetError, match=message):
        datasets.cifar10(tmp_path / "cifar10.zip")


def test_a_damaged_archive_is_named(tmp_path):
    for name in ("cifar10.zip", "cifar-10-python.tar.gz"):
        (tmp_path / name).write_bytes(b"neither zip nor tar")
        with pytest.raises(DatasetError, match=name):
            datasets.cifar10(tmp_path / name)


@pytest.mark.parametrize("binary", [False, True])
def test_a_missing_batch_is_named(tmp_path, binary):
    folder = tmp_path / "cifar-10"
    write_cifar10(folder, PIXELS, LABELS, binary=binary)
    missing = "data_batch_4.bin" if binary else "data_batch_4"
    (folder / missing).unlink()
    with pytest.raises(DatasetError, match=f"{missing} is missing"):
        datasets.cifar10(folder, batch_images=2)


def test_an_empty_folder_names_what_was_looked_for(tmp_path):
    with pytest.raises(DatasetError, match="holds neither data_batch_1 nor cifar-10-batches-py nor"):
        datasets.cifar10(tmp_path)
    with pytest.raises(DatasetError, match=r"holds neither train_X\.bin nor stl10_binary"):
        datasets.stl10(tmp_path)
    with pytest.raises(DatasetError, match="holds neither n02056570 nor train"):
        datasets.imagenet(tmp_path, WORDNET_IDS)
    with pytest.raises(DatasetError, match=r"holds neither wnids\.txt nor tiny-imagenet-200"):
        datasets.tiny_imagenet(tmp_path)


def test_a_file_of_the_wrong_size_is_named_with_the_size_it_must_have(tmp_path):
    write_cifar10(tmp_path / "bin", PIXELS, LABELS, binary=True)
    with pytest.raises(DatasetError, match=r"data_batch_1\.bin has 6146 bytes; it must have 30730000"):
        datasets.cifar10(tmp_path / "bin")
    write_cifar10(tmp_path / "py", PIXELS, LABELS)
    with pytest.raises(DatasetError, match=r"data_batch_1 has \d+ bytes; it must have 30720000 to"):
        datasets.cifar10(tmp_path / "py")
    pixels = small_pictures(1, pixels=96)
    write_stl10(tmp_path / "stl", pixels, pixels, pixels, [1, 2])
    with pytest.raises(DatasetError, match=r"train_X\.bin has 27648 bytes; it must have 138240000"):
        datasets.stl10(tmp_path / "stl")


def test_a_wrong_size_in_an_archive_is_met_before_it_is_read(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py", PIXELS, LABELS)
    tar_gz(tmp_path / "c.tar.gz", tmp_path / "cifar-10-batches-py")
    with pytest.raises(DatasetError, match=r"data_batch_1 has .* bytes; it must have 30720000 to"):
        datasets.cifar10(tmp_path / "c.tar.gz")


def test_links_in_an_archive_are_not_followed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 6146)
    link = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
    link.type, link.linkname = tarfile.SYMTYPE, str(secret)
    tar_gz_of(tmp_path / "c.tar.gz", [(link, b"")])
    with pytest.raises(DatasetError, match=r"data_batch_1.* is missing"):
        datasets.cifar10(tmp_path / "c.tar.gz", batch_images=2)


def test_an_archive_that_unpacks_to_far_more_is_refused_before_it_does(tmp_path):
    bomb = tarfile.TarInfo("cifar-10-batches-bin/notes.txt")
    bomb.size = 10**12
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(bomb.tobuf(tarfile.GNU_FORMAT)))
    with pytest.raises(DatasetError, match=r"c\.tar\.gz unpacks to more than \d+ bytes"):
        datasets.cifar10(tmp_path / "c.tar.gz", batch_images=2)


def test_an_archive_that_is_cut_short_is_named(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py", PIXELS, LABELS)
    tar_gz(tmp_path / "c.tar.gz", tmp_path / "cifar-10-batches-py")
    whole = (tmp_path / "c.tar.gz").read_bytes()
    (tmp_path / "c.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"c\.tar\.gz is no \.tar\.gz or damaged"):
        datasets.cifar10(tmp_path / "c.tar.gz", batch_images=2)


def test_a_label_outside_the_classes_is_refused(tmp_path):
    write_cifar10(tmp_path / "py", PIXELS, [10, *LABELS[1:]])
    with pytest.raises(DatasetError, match="data_batch_1 holds a label that is none of the 10 classes"):
        datasets.cifar10(tmp_path / "py", batch_images=2)
    pixels = small_pictures(1, pixels=96)
    write_stl10(tmp_path / "stl", pixels, pixels, pixels, [0, 2])
    with pytest.raises(DatasetError, match=r"train_y\.bin .* none of the 10 classes"):
        datasets.stl10(tmp_path / "stl", train_images=1, test_images=1, unlabelled_images=1)


def test_imagenet_folders_that_are_missing_or_not_full_are_named(tmp_path):
    write_pictures(tmp_path / "n02056570", ["a.JPEG", "b.JPEG"])
    with pytest.raises(DatasetError, match="n02056570 holds 2 pictures; it must hold 1300"):
        datasets.imagenet(tmp_path, WORDNET_IDS)
    with pytest.raises(DatasetError, match="n02085936 is missing"):
        datasets.imagenet(tmp_path, WORDNET_IDS, class_images=2)


# Pickles


def test_plain_pickle_reads_the_same_from_a_batch_of_our_own():
    batch = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 300], "batch_label": "one"}
    content = python2_pickle(batch)
    trusted = pickle.loads(content, encoding="bytes")  # noqa: S301  # written a line above
    found = pickles.load(content)
    assert np.array_equal(found["data"], trusted[b"data"])
    assert np.array_equal(found["data"], batch["data"])
    assert found["labels"] == trusted[b"labels"] == [1, 300]
    assert found["batch_label"] == b"one"


def test_a_batch_that_python_3_wrote_again_is_read_too():
    batch = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2]}
    found = pickles.load(pickle.dumps(batch, protocol=2))
    assert np.array_equal(found["data"], batch[b"data"])
    assert found["labels"] == [1, 2]


class Hostile:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "argument", "named"),
    [
        (subprocess.check_output, ["touch", "owned"], "subprocess.check_output"),
        (eval, "open('owned', 'w')", "builtins.eval"),
        (np.load, "owned", "numpy.load"),
        (getattr, "owned", "builtins.getattr"),
    ],
)
def test_a_pickle_that_calls_something_is_refused(tmp_path, monkeypatch, function, argument, named):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({b"data": Hostile(function, argument), b"labels": [0, 0]})
    with pytest.raises(pickles.PickleError, match=f"it asks for {named}; only arrays and plain values are read"):
        pickles.load(content)
    assert not (tmp_path / "owned").exists()


def test_a_hostile_batch_is_named(tmp_path):
    write_cifar10(tmp_path / "py", PIXELS, LABELS)
    content = pickle.dumps({b"data": Hostile(subprocess.check_output, ["true"]), b"pad": b"\0" * 6144})
    (tmp_path / "py" / "data_batch_2").write_bytes(content)
    with pytest.raises(DatasetError, match=r"data_batch_2: it asks for subprocess\.check_output"):
        datasets.cifar10(tmp_path / "py", batch_images=2)


ARRAY = python2_pickle({"data": np.zeros((1, 4), np.uint8)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no pickle"),
        (b"\x80\x02", "damaged or no pickle"),
        (b"\x80\x02](K\x01e.", "a list, not a dictionary"),
        (ARRAY[:-20], "damaged or no pickle"),
        (ARRAY.replace(b"U\x02u1", b"U\x02O8"), "another kind than uint8"),
        (ARRAY.replace(b"(K\x01K\x04t", b"(K\x01K\x05t"), "another length than its shape says"),
        (ARRAY.replace(b"(K\x01K\x04t", b"(J\xff\xff\xff\xffJ\xfc\xff\xff\xfft"), "damaged or no pickle"),
        (ARRAY.replace(b"(K\x00tU\x01bt", b"(J\xff\xff\xff\x7ftU\x01bt"), None),  # a first shape of 2 GiB is ignored
        (b"\x80\x02}(U\x04datacnumpy\nndarray\n)R" + b"u.", "damaged or no pickle"),
        (b"\x80\x02}(U\x01acnumpy\nndarray\n}U\x01bK\x01sbu.", "damaged or no pickle"),
    ],
)
def test_a_damaged_pickle_is_one_error(content, message):
    if message is None:
        assert pickles.load(content)["data"].shape == (1, 4)
        return
    with pytest.raises(pickles.PickleError, match=message):
        pickles.load(content)
