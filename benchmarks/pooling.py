"""How the power of the pooling was chosen: `python -m benchmarks.pooling --data cifar10.zip`.

Samples of 2,000 images, four even and two skewed 8 to 1, grouped by SCL on EfficientNet-Lite0's maps pooled by
generalised means of several powers (1 is the plain mean), and by k-means on the same features. Images of `ZIP:10000`
are left alone: other benchmarks report on them.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.archives import Selection, frozen_features, spare, unpack
from benchmarks.calibration import drawn
from models import backbones, heads
from models.baselines import kmeans
from models.config import METHODS
from models.metrics import quality
from models.progress import finish

SAMPLES = (False, False, True, False, False, True)  # skewed or not
IMAGES = 12_000
SEEDS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pooling", description=__doc__)
    parser.add_argument("--data", type=Selection.parse, required=True, metavar="ZIP", help="one folder a class")
    parser.add_argument("--powers", type=int, nargs="+", default=[1, 2, 3, 4], metavar="P")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        sources, truth = unpack(options.data, Path(scratch) / "images")
        class_N = np.unique(truth, return_inverse=True)[1]
        rows = spare(options.data, class_N, seed=78)[:IMAGES]
        print(f"{'power':>5} {'method':<7} {'ACC':>6} {'NMI':>6} {'ARI':>6}  ACC of the samples")
        for power in options.powers:
            with patch.object(backbones, "to_onnx", partial(backbones.to_onnx, power=power)):
                features_NF = frozen_features([sources[row] for row in rows])
            report(power, features_NF, class_N[rows])


def report(power: int, features_NF: np.ndarray, class_N: np.ndarray) -> None:
    for method, train in (("scl", heads.train), ("kmeans", kmeans.train)):
        defaults = METHODS[method]["head"]
        scores = []
        for number, skewed in enumerate(SAMPLES):
            own = np.arange(number, len(class_N), len(SAMPLES)) if not skewed else np.arange(len(class_N))
            chosen = own if not skewed else drawn(class_N, int(class_N.max()) + 1, 2000, skewed=True, seed=number)
            truth = [str(label) for label in class_N[chosen]]
            for seed in range(SEEDS):
                steps = train(
                    features_NF[chosen],
                    clusters=len(set(truth)),
                    epochs=defaults.epochs,
                    restarts=defaults.restarts,
                    seed=seed,
                )
                found = quality(truth, finish(steps).assignment.labels_N)
                scores.append([found[name] for name in ("acc", "nmi", "ari")])
        scores_S3 = np.array(scores)
        each = " ".join(f"{acc:.3f}" for acc in scores_S3[:, 0].reshape(len(SAMPLES), SEEDS).mean(axis=1))
        means = " ".join(f"{value:>6.3f}" for value in scores_S3.mean(axis=0))
        print(f"{power:>5} {method:<7} {means}  {each}", flush=True)


if __name__ == "__main__":
    main()
