"""What settings of the heads are worth where they are chosen: `python -m benchmarks.choices --data cifar10.zip`.

Draws of CIFAR-10 that no other benchmark reports on: four even ones of 2,000 images, three skewed 8 to 1, three of
10,000. `--photos` adds labelled archives, each grouped whole, about what small pictures of ten classes cannot show. Two
seeds each; prints the means for every kind of draw, and the standard deviation of ACC between the seeds. Baselines can
be run on the same draws: what is reported is one draw of each kind, and others may come out otherwise.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.ablation import Baseline, Variant, features, score
from benchmarks.archives import Selection, frozen_features, spare, unpack
from benchmarks.calibration import drawn
from models import heads
from models.heads import HeadConfig

EVEN, SKEWED, LARGE = 4, 3, 3
KINDS = ("even", "skewed", "large")
SEEDS = 2


@dataclass(frozen=True, kw_only=True)
class Choice(Variant):
    all_answer: bool = False
    method: str = "scl"  # another has its own defaults, and takes nothing from the rest
    same_directions: bool = False  # for another: those in which SCL compares images, in place of the features


CHOICES = {
    "as it is": Choice(),
    "contrast 0.5": Choice(config=HeadConfig(contrast_weight=0.5)),
    "no contrast": Choice(config=HeadConfig(contrast="none")),
    "balance 0.2": Choice(config=HeadConfig(balance=0.2)),
    "balance 0.5": Choice(config=HeadConfig(balance=0.5)),
    "contrast 0.5, balance 0.5": Choice(config=HeadConfig(contrast_weight=0.5, balance=0.5)),
    "principal axes": Choice(config=HeadConfig(shrinkage=1.0)),
    "shrinkage 0.25": Choice(config=HeadConfig(shrinkage=0.25)),
    "shrinkage 0.75": Choice(config=HeadConfig(shrinkage=0.75)),
    "64 axes": Choice(config=HeadConfig(dimensions=64)),
    "128 axes": Choice(config=HeadConfig(dimensions=128)),
    "starts see all images": Choice(config=HeadConfig(start_images=10**9)),
    "12 restarts, all answer": Choice(restarts=12, all_answer=True),
    "not trained": Choice(epochs=0),
    "k-means": Choice(method="kmeans"),
    "TEMI": Choice(method="temi"),
    "TEMI, same directions": Choice(method="temi", same_directions=True),
    "SCAN": Choice(method="scan"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__)
    parser.add_argument("--data", type=Selection.parse, required=True, metavar="ZIP", help="CIFAR-10, a folder a class")
    parser.add_argument("--photos", type=Selection.parse, nargs="*", default=[], metavar="ZIP")
    parser.add_argument(
        "--only", nargs="+", default=list(CHOICES), choices=list(CHOICES), metavar="CHOICE", help="default all"
    )
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help="draws of CIFAR-10; default all"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    small = [draw for draw in small_pictures(options.data) if draw[0] in options.kinds]
    draws = [*small, *((photos.name, *features(photos)) for photos in options.photos)]
    print(f"{'choice':<24} {'draws':<16} {'ACC':>6} {'NMI':>6} {'ARI':>6} {'sd':>6}  ACC of each")
    for name in options.only:
        choice = CHOICES[name]
        for kind in dict.fromkeys(kind for kind, _, _ in draws):
            own = [group(features_NF, truth, choice) for drawn_as, features_NF, truth in draws if drawn_as == kind]
            found_DS3 = np.array(own)
            means = " ".join(f"{value:>6.3f}" for value in found_DS3.mean(axis=(0, 1)))
            deviation = found_DS3[:, :, 0].std(axis=1, ddof=1).mean()
            each = " ".join(f"{acc:.3f}" for acc in found_DS3[:, :, 0].mean(axis=1))
            print(f"{name:<24} {kind:<16} {means} {deviation:>6.3f}  {each}", flush=True)


def small_pictures(selection: Selection) -> Iterator[tuple[str, np.ndarray, list[str]]]:
    """Kind, features and true labels of every draw."""
    with tempfile.TemporaryDirectory() as scratch:
        sources, truth = unpack(selection, Path(scratch) / "images")
        class_N = np.unique(truth, return_inverse=True)[1]
        rows = spare(selection, class_N, seed=6)[: 10_000 * LARGE]
        features_NF, label_N = frozen_features([sources[row] for row in rows]), class_N[rows]
    chosen = [("even", np.arange(2000 * number, 2000 * (number + 1))) for number in range(EVEN)]
    classes = int(class_N.max()) + 1
    chosen += [("skewed", drawn(label_N, classes, 2000, skewed=True, seed=number)) for number in range(SKEWED)]
    chosen += [("large", np.arange(10_000 * number, 10_000 * (number + 1))) for number in range(LARGE)]
    for kind, own in chosen:
        yield kind, features_NF[own], [str(label) for label in label_N[own]]


def group(features_NF: np.ndarray, truth: list[str], choice: Choice) -> list[list[float]]:
    """ACC, NMI and ARI of every seed."""
    other = Baseline(method=choice.method, same_directions=choice.same_directions)
    variant = choice if choice.method == "scl" else other
    with patch.object(heads, "staying", (lambda restarts: restarts) if choice.all_answer else heads.staying):
        found = [score(features_NF, truth, variant, seed) for seed in range(SEEDS)]
    return [[each[name] for name in ("acc", "nmi", "ari")] for each in found]


if __name__ == "__main__":
    main()
