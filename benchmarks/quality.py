"""ACC, NMI and ARI of the methods on labelled archives: `python -m benchmarks.quality --data ZIP --seeds 3`.

Features are extracted once and shared, so that the methods differ in nothing else. Every method runs in a process of
its own, whose peak memory is shown; `agree` is the mean adjusted Rand index between the seeds' groupings, `ECE` the
expected calibration error of the confidence. `both` is the share of images on which a method's two predictions name the
same cluster, with their ACC and that of the others under the match of all images. `finetune` is SCL that teaches the
backbone what its head found, and answers on what that has become.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.archives import Selection, unpack
from benchmarks.children import processes
from models.config import METHODS, InputError
from models.fit import agreement
from models.metrics import right
from models.progress import finish
from models.train import Config, Source, group

WAYS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name, ways in METHODS.items() if "head" in ways},
    "finetune": {"method": "scl", "train": "finetune"},
}


TRAINING = ("heads", "pixels", "training", "encoding", "answer")  # the stages that belong to it


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run of one method came to."""

    quality: dict[str, float]
    ece: float
    both: float  # share of images with consensus
    right_both: float  # ACC of those, and of the others
    right_else: float
    seconds: float  # of the training, and of decoding for it
    labels_N: np.ndarray
    peak_mib: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument(
        "--data", type=Selection.parse, nargs="+", required=True, metavar="ZIP", help="ZIP, ZIP:N or ZIP:N:skewed"
    )
    parser.add_argument("--methods", nargs="+", default=["scl", "kmeans"], choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="seeds 0 to S-1; default 3")
    parser.add_argument("--threads", type=int, metavar="T", help="default: one for every core")
    options = parser.parse_args(arguments)
    if options.threads:
        os.environ["LOKY_MAX_CPU_COUNT"] = str(options.threads)  # starts and restarts too, in every process
    for selection in options.data:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                measure(selection, options.methods, range(options.seeds), Path(scratch), options.threads)
            except InputError as error:
                sys.exit(f"error: {selection.name}: {error}")


def measure(selection: Selection, methods: Sequence[str], seeds: range, scratch: Path, threads: int | None) -> None:
    sources, truth = unpack(selection, scratch / "images")
    classes = len(set(truth))
    first = Config(clusters=classes, method="kmeans", restarts=1, epochs=1)
    extracted = finish(group(first, sources, cache_dir=scratch / "cache", threads=threads))
    speed = len(sources) / extracted.metrics["seconds"]["features"]
    print(f"{selection.name}: {len(sources)} images, {classes} classes, seeds {seeds.start} to {seeds.stop - 1}")
    print(f"features: {extracted.metrics['seconds']['features']:.1f} s, {speed:.0f} images/s")
    columns = f"{'ACC':>15} {'NMI':>15} {'ARI':>15} {'ECE':>6} {'agree':>6} {'both':>18} {'seconds':>8} {'MiB':>6}"
    print(f"{'method':<14}{columns}  ACC of every seed")
    for method in methods:
        with processes(1) as process:
            found = process.submit(
                outcomes, method, classes, seeds, sources, truth, scratch / "cache", threads
            ).result()
        row = " ".join(f"{spread([each.quality[name] for each in found]):>15}" for name in ("acc", "nmi", "ari"))
        ece = statistics.mean(each.ece for each in found)
        alike = agreement([each.labels_N for each in found])
        seconds = statistics.mean(each.seconds for each in found)
        each_acc = " ".join(f"{each.quality['acc']:.3f}" for each in found)
        same = "-" if alike is None else f"{alike:.3f}"
        both, with_both, without = (
            statistics.mean(getattr(each, name) for each in found) for name in ("both", "right_both", "right_else")
        )
        print(
            f"{method:<14}{row} {ece:>6.3f} {same:>6} {both:>6.3f} {with_both:.3f} {without:.3f} {seconds:>8.1f} "
            f"{found[-1].peak_mib:>6.0f}  {each_acc}",
            flush=True,
        )


def outcomes(
    method: str,
    classes: int,
    seeds: range,
    sources: list[Source],
    truth: list[str],
    cache: Path,
    threads: int | None,
) -> list[Outcome]:
    """All seeds of one method, in this process."""
    found = []
    class_N = np.unique(truth, return_inverse=True)[1]
    for seed in seeds:
        config = Config(clusters=classes, seed=seed, **WAYS[method])
        grouping = finish(group(config, sources, cache_dir=cache, truth=truth, threads=threads))
        right_N, both_N = right(class_N, grouping.labels_N), grouping.consensus_N
        found.append(
            Outcome(
                quality=grouping.metrics["quality"],
                ece=grouping.metrics["calibration"]["ece"],
                both=float(both_N.mean()),
                right_both=share(right_N[both_N]),
                right_else=share(right_N[~both_N]),
                seconds=sum(grouping.metrics["seconds"].get(stage, 0.0) for stage in TRAINING),
                labels_N=grouping.labels_N,
                peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            )
        )
    return found


def share(right_B: np.ndarray) -> float:
    return float(right_B.mean()) if len(right_B) else float("nan")


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
