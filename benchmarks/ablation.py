"""What each term of SCL is worth: `python -m benchmarks.ablation --data ZIP ZIP … --seeds 3`.

Every row switches one thing, on the same frozen features and seeds; the last column is the mean ACC over the archives
minus that of the full method. Restarts answer together in every row but that of a single one. The last rows tell what
training is worth beside the directions in which images are compared, the starts and the choice among them: heads that
are not trained at all, and the baselines in the same directions.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.archives import Selection, frozen_features, unpack
from benchmarks.quality import spread
from models import heads
from models.config import METHODS
from models.heads import HeadConfig
from models.metrics import quality
from models.progress import finish
from models.train import HEADS


@dataclass(frozen=True, kw_only=True)
class Variant:
    config: HeadConfig = field(default_factory=HeadConfig)
    restarts: int = METHODS["scl"]["head"].restarts
    epochs: int = METHODS["scl"]["head"].epochs

    def group(self, features_NF: np.ndarray, clusters: int, seed: int) -> np.ndarray:
        steps = heads.train(
            features_NF,
            clusters=clusters,
            epochs=self.epochs,
            restarts=self.restarts,
            seed=seed,
            config=self.config,
        )
        return finish(steps).assignment.labels_N


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline in the directions in which SCL's heads compare images, or on the features as they are."""

    method: str
    same_directions: bool = True

    def group(self, features_NF: np.ndarray, clusters: int, seed: int) -> np.ndarray:
        if self.same_directions:
            axes, _, _ = heads.directions(features_NF, clusters=clusters, seed=seed, config=HeadConfig())
            features_NF = axes.project(features_NF).numpy()
        usual = METHODS[self.method]["head"]
        steps = HEADS[self.method](
            features_NF, clusters=clusters, epochs=usual.epochs, restarts=usual.restarts, seed=seed
        )
        return finish(steps).assignment.labels_N


VARIANTS: dict[str, Variant | Baseline] = {
    "full": Variant(),
    "instance contrast only": Variant(config=HeadConfig(contrast="instance", consistency=False)),
    "+ semantic contrast": Variant(config=HeadConfig(contrast="semantic", consistency=False)),
    "+ consistency, no contrast": Variant(config=HeadConfig(contrast="none")),
    "+ consistency, instance contrast": Variant(config=HeadConfig(contrast="instance")),
    "without trust": Variant(config=HeadConfig(trust=False)),
    "with balance": Variant(config=HeadConfig(balance=0.5)),
    "always halfway shrunk": Variant(config=HeadConfig(shrinkage=0.5)),
    "principal axes": Variant(config=HeadConfig(shrinkage=1.0)),
    "assigned by similarity": Variant(config=HeadConfig(rule="similarity")),
    "assigned by boundary": Variant(config=HeadConfig(rule="boundary")),
    "a single restart": Variant(restarts=1),
    "not trained": Variant(epochs=0),
    "k-means": Baseline(method="kmeans", same_directions=False),
    "k-means, same directions": Baseline(method="kmeans"),
    "TEMI, same directions": Baseline(method="temi"),
    "SCAN, same directions": Baseline(method="scan"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument(
        "--data", type=Selection.parse, nargs="+", required=True, metavar="ZIP", help="ZIP, ZIP:N or ZIP:N:skewed"
    )
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="seeds 0 to S-1; default 3")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sets = [features(selection) for selection in options.data]
    print(" | ".join(["variant", *(f"{selection.name}: ACC, NMI, ARI" for selection in options.data), "mean ACC"]))
    whole = None
    for name, variant in VARIANTS.items():
        if name not in options.only:
            continue
        cells, means = [], []
        for features_NF, truth in sets:
            found = [score(features_NF, truth, variant, seed) for seed in range(options.seeds)]
            means.append(statistics.mean(each["acc"] for each in found))
            cells.append(cell(found))
        mean = statistics.mean(means)
        whole = mean if whole is None else whole
        print(" | ".join([name, *cells, f"{mean:.3f} ({mean - whole:+.3f})"]), flush=True)


def cell(found: Sequence[dict[str, float]]) -> str:
    """ACC with its deviation between the seeds, NMI and ARI."""
    rest = (f"{statistics.mean(each[name] for each in found):.3f}" for name in ("nmi", "ari"))
    return ", ".join([spread([each["acc"] for each in found]), *rest])


def features(selection: Selection) -> tuple[np.ndarray, list[str]]:
    with tempfile.TemporaryDirectory() as scratch:
        sources, truth = unpack(selection, Path(scratch) / "images")
        return frozen_features(sources), truth


def score(features_NF: np.ndarray, truth: Sequence[str], variant: Variant | Baseline, seed: int) -> dict[str, float]:
    return quality(truth, variant.group(features_NF, len(set(truth)), seed))


if __name__ == "__main__":
    main()
