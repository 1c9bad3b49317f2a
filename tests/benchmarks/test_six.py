"""The six configurations, and the command on small files in the official formats."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import datasets, six
from benchmarks.datasets import DatasetError
from benchmarks.protocols import BENCHMARKS, IMAGENET_10, IMAGENET_DOGS, Settings, rows_of
from models import images, networks
from models.config import Config
from tests.benchmarks.official import small_pictures, write_cifar10, write_pictures

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_shows_every_setting_as_it_is():
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| ([\d,]+) \| (\d+) \| (.+) \|$", page, re.MULTILINE)

    def in_words(benchmark):
        full, scaled = benchmark.full, benchmark.scaled
        part = f"{scaled.images:,}, {scaled.image_size}, {scaled.backbone}, {scaled.epochs}"
        return f"{benchmark.split} | {full.image_size} | {full.backbone} | {full.epochs:,} | {part}"

    assert {name: (images, classes, rest) for name, images, classes, rest in rows} == {
        name: (f"{benchmark.images:,}", str(benchmark.clusters), in_words(benchmark))
        for name, benchmark in BENCHMARKS.items()
    }


def test_the_classes_chosen_by_dac():
    """ImageNet-10 and ImageNet-Dogs share one class: the Maltese dog."""
    assert (len(IMAGENET_10), len(IMAGENET_DOGS)) == (10, 15)
    assert set(IMAGENET_10) & set(IMAGENET_DOGS) == {"n02085936"}
    assert all(datasets.WORDNET_ID.fullmatch(wordnet_id) for wordnet_id in IMAGENET_10 | IMAGENET_DOGS)


def test_a_part_is_the_same_every_time_and_not_the_first_images():
    settings = Settings(image_size=32, backbone="resnet18", epochs=1, images=10)
    rows = rows_of(settings, 1000)
    assert np.array_equal(rows, rows_of(settings, 1000))
    assert np.array_equal(rows, np.unique(rows))
    assert len(rows) == 10
    assert rows.max() > 100
    assert np.array_equal(rows_of(settings, 7), np.arange(7))
    assert np.array_equal(rows_of(replace(settings, images=None), 20), np.arange(20))


def test_settings_refuse_nonsense():
    with pytest.raises(ValueError, match="epochs is 0; it must be at least 1"):
        Settings(image_size=32, backbone="resnet18", epochs=0)
    with pytest.raises(ValueError, match="clusters is 1; it must be from 2 to 60000, the images"):
        replace(BENCHMARKS["cifar-10"], clusters=1)


def small_cifar10(folder):
    """Twelve pictures, three of each of four classes, and the benchmark that asks for them."""
    write_cifar10(folder, small_pictures(12), [row % 4 for row in range(12)])
    scaled = replace(BENCHMARKS["cifar-10"].scaled, images=10, image_size=32)
    return replace(
        BENCHMARKS["cifar-10"],
        clusters=4,
        images=12,
        read=lambda root: datasets.cifar10(root, batch_images=2),
        scaled=scaled,
    )


def test_a_set_with_other_counts_is_refused(tmp_path):
    benchmark = small_cifar10(tmp_path / "root")
    assert len(benchmark.load(tmp_path / "root")) == 12
    with pytest.raises(DatasetError, match="root holds 12 images; the benchmark has 13"):
        replace(benchmark, images=13).load(tmp_path / "root")
    with pytest.raises(DatasetError, match="root holds 4 classes; the benchmark has 5"):
        replace(benchmark, clusters=5).load(tmp_path / "root")


def test_what_training_decodes_is_what_the_file_held(tmp_path):
    dataset = small_cifar10(tmp_path / "root").load(tmp_path / "root")
    found = six.sources(dataset, np.array([1, 5]), tmp_path / "images")
    assert np.array_equal(images.decode(found[0].path, 32), dataset.pictures[1])
    assert np.array_equal(images.decode(found[1].path, 32), dataset.pictures[5])
    assert found[0].key != found[1].key


def test_files_are_used_where_they_lie(tmp_path):
    write_pictures(tmp_path / "n02056570", ["a.JPEG", "b.JPEG"])
    dataset = datasets.imagenet(tmp_path, {"n02056570": "king penguin"}, class_images=2)
    found = six.sources(dataset, np.array([1]), tmp_path / "images")
    assert [source.path for source in found] == [tmp_path / "n02056570" / "b.JPEG"]
    assert not (tmp_path / "images").exists()


def test_methods_train_in_full_where_they_can():
    benchmark = BENCHMARKS["imagenet-dogs"]
    plan = six.configurations(benchmark, benchmark.full, methods=["simclr", "kmeans"], train=None, seeds=2, epochs=None)
    full, head = plan["simclr"][1], plan["kmeans"][1]
    assert (full.train, full.weights, full.image_size, full.epochs, full.seed) == ("full", "random", 224, 1000, 1)
    assert (head.train, head.weights, head.backbone) == ("head", None, "efficientnet_lite0")
    assert full.clusters == head.clusters == 15


def test_the_command_measures_a_small_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(six, "BENCHMARKS", {"cifar-10": small_cifar10(tmp_path / "root")})
    ended = six.main(["cifar-10", "--root", str(tmp_path / "root"), "--scaled", "--methods", "kmeans", "--seeds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert ended == 0
    assert lines[0] == "cifar-10: 12 images (train + test), 4 classes"
    assert lines[1].startswith("10 of them used")
    assert re.fullmatch(r"kmeans +head +300( +-?\d\.\d{3} ± 0\.000){3} +\d+\.\d +\d\.\d{3}", lines[3])


def test_pretrained_weights_are_ones_that_full_training_starts_from(tmp_path):
    settings = Settings(image_size=32, backbone="resnet10_slim", epochs=1, images=6, pretraining_epochs=2)
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        six.pretrain(small_pictures(8, pixels=96), settings, path, seed=seed, device="cpu")
    config = Config(
        clusters=2, method="simclr", train="full", backbone="resnet10_slim", image_size=32, weights=str(paths[0])
    )
    found = networks.network(config.backbone, weights=config.weights, image_size=32).state_dict()
    fresh = networks.network(config.backbone, weights="random", image_size=32).state_dict()
    assert not torch.equal(found["body.layers.0.weight"], fresh["body.layers.0.weight"])
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()


def test_the_command_says_what_is_missing_in_one_line(tmp_path, capsys):
    assert six.main(["stl-10", "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path} holds neither train_X.bin nor stl10_binary nor stl10_binary.tar.gz\n"


def test_check_only_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(six, "BENCHMARKS", {"cifar-10": small_cifar10(tmp_path / "root")})
    assert six.main(["cifar-10", "--root", str(tmp_path / "root"), "--check"]) == 0
    assert capsys.readouterr().out == "cifar-10: 12 images (train + test), 4 classes\n"


def test_the_jpeg_version_of_cifar10_beside_the_checkout(shared_data):
    found = datasets.class_folders(shared_data / "cifar10-2000.zip", datasets.CIFAR_10)
    assert found.pictures.shape == (2000, 32, 32, 3)
    assert np.bincount(found.labels_N).tolist() == [200] * 10
