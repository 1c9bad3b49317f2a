"""The deep-clustering field's six benchmarks as configurations: which pictures, how many groups, which settings.

`docs/benchmarks.md` gives the source of every choice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from benchmarks import datasets
from benchmarks.datasets import Dataset, DatasetError

# Chang et al., "Deep Adaptive Image Clustering", ICCV 2017, chose both sets of classes from ILSVRC-2012.
IMAGENET_10 = {
    "n02056570": "king penguin", "n02085936": "Maltese dog", "n02128757": "snow leopard", "n02690373": "airliner",
    "n02692877": "airship", "n03095699": "container ship", "n04254680": "soccer ball", "n04285008": "sports car",
    "n04467665": "trailer truck", "n07747607": "orange",
}  # fmt: skip
IMAGENET_DOGS = {
    "n02085936": "Maltese dog", "n02086646": "Blenheim spaniel", "n02088238": "basset",
    "n02091467": "Norwegian elkhound", "n02097130": "giant schnauzer", "n02099601": "golden retriever",
    "n02101388": "Brittany spaniel", "n02101556": "clumber", "n02102177": "Welsh springer spaniel",
    "n02105056": "groenendael", "n02105412": "kelpie", "n02105855": "Shetland sheepdog", "n02107142": "Doberman",
    "n02110958": "pug", "n02112137": "chow",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run of full training costs."""

    image_size: int
    backbone: str
    epochs: int
    images: int | None = None  # of all images a fixed random part, chosen without looking at classes; None: all
    pretraining_epochs: int = 0  # of SimCLR on unlabelled images (as many at most), before any method

    def __post_init__(self) -> None:
        if self.pretraining_epochs < 0:
            raise ValueError(f"pretraining_epochs is {self.pretraining_epochs}; it must be at least 0")
        for name in ("image_size", "epochs", "images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One of the six. `full` is the field's scale, for a GPU; `scaled` is for two CPU cores."""

    clusters: int
    images: int
    split: str
    read: Callable[[Path], Dataset]
    full: Settings
    scaled: Settings

    def __post_init__(self) -> None:
        if not 2 <= self.clusters <= self.images:
            raise ValueError(f"clusters is {self.clusters}; it must be from 2 to {self.images}, the images")

    def load(self, root: Path) -> Dataset:
        """The pictures of the protocol.

        Raises:
            DatasetError: files are missing, damaged or of the wrong size, or there are more or fewer pictures.

        """
        dataset = self.read(root)
        if len(dataset) != self.images:
            raise DatasetError(f"{root} holds {len(dataset)} images; the benchmark has {self.images}")
        present = len(np.unique(dataset.labels_N))
        if present != self.clusters:
            raise DatasetError(f"{root} holds {present} classes; the benchmark has {self.clusters}")
        return dataset


def rows_of(settings: Settings, images: int) -> np.ndarray:
    """Which images a run uses, in ascending order; the same for every method and seed."""
    if settings.images is None or settings.images >= images:
        return np.arange(images)
    return np.sort(np.random.default_rng(0).permutation(images)[: settings.images])


# About as many pixels in each: 10,000 images of 32 x 32 or 5,000 of 48 x 48.
SCALED_32 = Settings(image_size=32, backbone="resnet10_slim", epochs=30, images=10_000)
SCALED_48 = Settings(image_size=48, backbone="resnet10_slim", epochs=30, images=5_000)

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "cifar-10": Benchmark(
            clusters=10,
            images=60_000,
            split="train + test",
            read=datasets.cifar10,
            full=Settings(image_size=32, backbone="resnet34", epochs=1_000),
            scaled=SCALED_32,
        ),
        "cifar-100": Benchmark(
            clusters=20,
            images=60_000,
            split="train + test, 20 superclasses",
            read=datasets.cifar100,
            full=Settings(image_size=32, backbone="resnet34", epochs=1_000),
            scaled=SCALED_32,
        ),
        "stl-10": Benchmark(
            clusters=10,
            images=13_000,
            split="train + test, and 100,000 without classes for the representation",
            read=datasets.stl10,
            full=Settings(image_size=96, backbone="resnet34", epochs=1_000, pretraining_epochs=500),
            scaled=replace(SCALED_48, pretraining_epochs=30),
        ),
        "imagenet-10": Benchmark(
            clusters=10,
            images=13_000,
            split="train",
            read=lambda root: datasets.imagenet(root, IMAGENET_10),
            full=Settings(image_size=224, backbone="resnet34", epochs=1_000),
            scaled=SCALED_48,
        ),
        "imagenet-dogs": Benchmark(
            clusters=15,
            images=19_500,
            split="train",
            read=lambda root: datasets.imagenet(root, IMAGENET_DOGS),
            full=Settings(image_size=224, backbone="resnet34", epochs=1_000),
            scaled=SCALED_48,
        ),
        "tiny-imagenet": Benchmark(
            clusters=200,
            images=100_000,
            split="train",
            read=datasets.tiny_imagenet,
            full=Settings(image_size=64, backbone="resnet34", epochs=1_000),
            scaled=SCALED_32,
        ),
    }
)
