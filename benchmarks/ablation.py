"""What each term of SCL is worth: `python -m benchmarks.ablation --data ZIP ZIP … --seeds 3`.

Every row switches one thing, on the same frozen features and seeds; the last column is the mean ACC over the archives
minus that of the full method. Restarts answer together in every row but that of a single one. The last rows tell what
training is worth beside the directions in which images are compared, the starts and the choice among them: heads that
are not trained at all, and the baselines in the same directions.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.archives import Selection, frozen_features, unpack
from benchmarks.quality import spread
from models import heads
from models.config import METHODS, Config
from models.heads import HeadConfig
from models.metrics import quality
from models.progress import finish
from models.train import fit_head


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
        usual = Config(clusters=clusters, method=self.method, seed=seed).resolved()
        return finish(fit_head(usual, features_NF, device="cpu")).assignment.labels_N


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
    options = parsed(arguments, prog="python -m benchmarks.ablation", description=__doc__, variants=VARIANTS)
    torch.set_num_threads(1)
    sets = [features(selection) for selection in options.data]
    print(heading(options.data))
    whole = None
    for name, variant in VARIANTS.items():
        if name not in options.only:
            continue
        columns = [
            [score(features_NF, truth, variant, seed) for seed in range(options.seeds)] for features_NF, truth in sets
        ]
        whole = mean_acc(columns) if whole is None else whole
        print(row(name, columns, whole), flush=True)


def parsed(
    arguments: Sequence[str] | None, *, prog: str, description: str | None, variants: Iterable[str]
) -> argparse.Namespace:
    """The archives, the variants and the seeds that are asked for."""
    names = list(variants)
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument(
        "--data", type=Selection.parse, nargs="+", required=True, metavar="ZIP", help="ZIP, ZIP:N or ZIP:N:skewed"
    )
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="VARIANT")
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="seeds 0 to S-1; default 3")
    return parser.parse_args(arguments)


def heading(data: Sequence[Selection]) -> str:
    return " | ".join(["variant", *(f"{selection.name}: ACC, NMI, ARI" for selection in data), "mean ACC"])


def row(name: str, columns: Sequence[Sequence[dict[str, float]]], whole: float) -> str:
    """A variant's line: what every seed came to, archive by archive, and the mean ACC beside that of the whole."""
    mean = mean_acc(columns)
    return " | ".join([name, *map(cell, columns), f"{mean:.3f} ({mean - whole:+.3f})"])


def mean_acc(columns: Sequence[Sequence[dict[str, float]]]) -> float:
    return statistics.mean(each["acc"] for found in columns for each in found)


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
