"""What each term of SCL is worth: `python -m benchmarks.ablation --data ZIP ZIP … --seeds 3`.

Every row switches one thing, on the same frozen features and seeds; the last column is the mean ACC over the archives
minus that of the full method. Restarts answer together in every row but the last.
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
from models import heads
from models.config import METHODS
from models.heads import HeadConfig
from models.metrics import quality
from models.progress import finish


@dataclass(frozen=True, kw_only=True)
class Variant:
    config: HeadConfig = field(default_factory=HeadConfig)
    restarts: int = METHODS["scl"]["head"].restarts


VARIANTS = {
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
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument(
        "--data", type=Selection.parse, nargs="+", required=True, metavar="ZIP", help="ZIP, ZIP:N or ZIP:N:skewed"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="seeds 0 to S-1; default 3")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sets = [features(selection) for selection in options.data]
    print(" | ".join(["variant", *(f"{selection.name}: ACC, NMI, ARI" for selection in options.data), "mean ACC"]))
    whole = None
    for name, variant in VARIANTS.items():
        cells, means = [], []
        for features_NF, truth in sets:
            found = [score(features_NF, truth, variant, seed) for seed in range(options.seeds)]
            acc = [each["acc"] for each in found]
            means.append(statistics.mean(acc))
            deviation = statistics.stdev(acc) if len(acc) > 1 else 0.0
            rest = ", ".join(f"{statistics.mean(each[name] for each in found):.3f}" for name in ("nmi", "ari"))
            cells.append(f"{means[-1]:.3f} ± {deviation:.3f}, {rest}")
        mean = statistics.mean(means)
        whole = mean if whole is None else whole
        print(" | ".join([name, *cells, f"{mean:.3f} ({mean - whole:+.3f})"]), flush=True)


def features(selection: Selection) -> tuple[np.ndarray, list[str]]:
    with tempfile.TemporaryDirectory() as scratch:
        sources, truth = unpack(selection, Path(scratch) / "images")
        return frozen_features(sources), truth


def score(features_NF: np.ndarray, truth: Sequence[str], variant: Variant, seed: int) -> dict[str, float]:
    steps = heads.train(
        features_NF,
        clusters=len(set(truth)),
        epochs=METHODS["scl"]["head"].epochs,
        restarts=variant.restarts,
        seed=seed,
        config=variant.config,
    )
    return quality(truth, finish(steps).assignment.labels_N)


if __name__ == "__main__":
    main()
