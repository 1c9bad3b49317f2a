"""How the temperature of the confidence was chosen: `python -m benchmarks.calibration --data cifar10.zip`.

Draws of 2 to 10 classes and 200 to 5,000 images, even and skewed, are grouped by SCL. For each the temperature with the
smallest expected calibration error is found by its true labels; then a law is fitted that gives it from what is known
without them (`models.assign.calibrated_temperature`). Prints every draw, the law, and the error without it and with a
law that was fitted on the other draws. The images of `ZIP:10000` are left alone: other benchmarks report on them.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.optimize import least_squares

from benchmarks.archives import Selection, frozen_features, spare, unpack
from models import assign, committee, heads
from models.config import METHODS
from models.metrics import calibration
from models.progress import finish

# Classes and images, each drawn twice; every third draw is skewed 8 to 1.
DRAWS = 2 * [
    *[(2, 200), (2, 300), (2, 500), (2, 1000), (2, 2000), (3, 300), (3, 600), (3, 800), (3, 1500), (3, 3000)],
    *[(4, 400), (4, 1000), (4, 2000), (5, 500), (5, 2500), (6, 600), (6, 2000), (7, 1500), (8, 800), (8, 2000)],
    *[(10, 300), (10, 500), (10, 1000), (10, 2000), (10, 2000), (10, 3000), (10, 5000)],
]
IMAGES = 14_000
TEMPERATURES = np.geomspace(0.1, 2.5, 40)
OFFSET = 0.005


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One grouping: how often its predictions differ, and its calibration error at every temperature."""

    differ: float
    each: float  # images that a cluster sees in an epoch
    errors_T: np.ndarray

    @property
    def best(self) -> float:
        return float(TEMPERATURES[self.errors_T.argmin()])

    def error(self, temperature: float) -> float:
        return float(self.errors_T[np.abs(np.log(TEMPERATURES / temperature)).argmin()])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument(
        "--data", type=Selection.parse, required=True, metavar="ZIP", help="CIFAR-10, one folder a class"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    features_NF, class_N = features(options.data)
    draws = []
    print(f"{'classes':>7} {'images':>6} {'differ':>7} {'best T':>7} {'error at 1':>10} {'at best':>8}")
    for number, (classes, images) in enumerate(DRAWS):
        rows = drawn(class_N, classes, images, skewed=number % 3 == 2, seed=number)
        draws.append(measure(features_NF[rows], class_N[rows]))
        last = draws[-1]
        figures = f"{last.differ:>7.3f} {last.best:>7.2f} {last.error(1):>10.3f} {last.error(last.best):>8.3f}"
        print(f"{classes:>7} {len(rows):>6} {figures}", flush=True)
    factor, *powers = law(draws)
    print(
        "temperature = {:.2f} * (differ + {}) ** {:.2f} * (images an epoch / clusters) ** {:.2f}".format(
            factor, OFFSET, *powers
        )
    )
    left_out = [predicted(draw, law([other for other in draws if other is not draw])) for draw in draws]
    plain, lawful = np.mean([draw.error(1) for draw in draws]), np.mean(left_out)
    print(f"mean error: {plain:.3f} at temperature 1, {lawful:.3f} by the law, fitted on the other draws")


def features(selection: Selection) -> tuple[np.ndarray, np.ndarray]:
    with tempfile.TemporaryDirectory() as scratch:
        sources, truth = unpack(selection, Path(scratch) / "images")
        class_N = np.unique(truth, return_inverse=True)[1]
        rows = spare(selection, class_N, seed=77)[:IMAGES]
        return frozen_features([sources[row] for row in rows]), class_N[rows]


def drawn(class_N: np.ndarray, classes: int, images: int, *, skewed: bool, seed: int) -> np.ndarray:
    generator = np.random.default_rng(500 + seed)
    order, chosen = generator.permutation(len(class_N)), generator.permutation(class_N.max() + 1)[:classes]
    share_K = np.geomspace(8, 1, classes) if skewed else np.ones(classes)
    wanted_K = np.rint(images * share_K / share_K.sum()).astype(int)
    return np.concatenate([order[class_N[order] == k][:wanted] for k, wanted in zip(chosen, wanted_K, strict=True)])


def measure(features_BF: np.ndarray, class_B: np.ndarray) -> Draw:
    """Group once, then assign what was predicted at every temperature."""
    assigned: list[tuple[torch.Tensor, torch.Tensor]] = []

    def kept(p_BK: torch.Tensor, q_BK: torch.Tensor, **settings: Any) -> assign.Assignment:
        assigned.append((p_BK, q_BK))
        return assign.assign(p_BK, q_BK, **settings)

    defaults = METHODS["scl"]["head"]
    clusters = len(np.unique(class_B))
    # One thread, so that blocks are kept in the order of their rows.
    with patch.object(committee, "assign", kept), patch.object(committee, "cpu_count", lambda: 1):
        fit = finish(
            heads.train(features_BF, clusters=clusters, epochs=defaults.epochs, restarts=defaults.restarts, seed=0)
        )
    # Where an empty cluster was refilled the committee answered again, and its last answer counts.
    p_BK, q_BK = (torch.cat(parts)[-len(class_B) :] for parts in zip(*assigned, strict=True))
    assert np.array_equal(assign.assign(p_BK, q_BK).labels_N, fit.assignment.labels_N)
    truth = [str(number) for number in class_B]
    errors = []
    for temperature in TEMPERATURES:
        found = assign.assign(p_BK, q_BK, temperature=float(temperature))
        errors.append(calibration(truth, found.labels_N, found.confidence_N)["ece"])
    each = heads.HeadConfig().drawn(len(class_B), clusters) / clusters
    return Draw(differ=1 - float(found.consensus_N.mean()), each=each, errors_T=np.array(errors))


def law(draws: Sequence[Draw]) -> tuple[float, float, float]:
    """Factor and powers, by least squares of the logarithms; draws far off count less (soft L1)."""
    x = np.array([[1, np.log(draw.differ + OFFSET), np.log(draw.each)] for draw in draws])
    y = np.log([draw.best for draw in draws])
    found = least_squares(lambda w: x @ w - y, np.zeros(3), loss="soft_l1", f_scale=0.2).x
    return float(np.exp(found[0])), float(found[1]), float(found[2])


def predicted(draw: Draw, found: tuple[float, float, float]) -> float:
    factor, by_differ, by_each = found
    return draw.error(factor * (draw.differ + OFFSET) ** by_differ * draw.each**by_each)


if __name__ == "__main__":
    main()
