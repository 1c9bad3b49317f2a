"""How near `clusters = auto` comes: `python -m benchmarks.auto --data ZIP … --subsets 64`.

For every archive the number found with each seed, its interval, the witnesses' votes and the seconds; of the first seed
also the numbers rejected, and with `--sweep K` what was measured up to K. With `--subsets` how far off it is on
collections drawn from the archive: 3 classes to all of them, even and skewed 10:1, 300 to 2,000 images (fewer where
a class has no more); each witness alone and a fixed guess stand beside it, with `--others` also usual criteria.
`--tree` prints the levels of the merge tree of the clusters that SCL finds, and the classes below the coarsest groups.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import cluster_numbers
from benchmarks.archives import Selection, frozen_features, unpack
from models import auto, heads, hierarchy
from models.auto import Estimate
from models.config import METHODS
from models.metrics import quality
from models.progress import finish

SIZES = (300, 600, 1000, 2000)
WITNESSES = ("eigengap", "height", "reproduced")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.auto", description=__doc__)
    parser.add_argument("--data", type=Selection.parse, nargs="+", required=True, metavar="ZIP", help="ZIP or ZIP:N")
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="seeds 0 to S-1; default 3")
    parser.add_argument("--subsets", type=int, default=0, metavar="C", help="collections drawn from each archive")
    parser.add_argument("--others", action="store_true", help="usual criteria too, on the drawn collections")
    parser.add_argument("--sweep", type=int, default=0, metavar="K", help="print the sweep up to this number")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep features here")
    parser.add_argument("--tree", action="store_true", help="print the levels of the merge tree")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for selection in options.data:
        features_NF, truth = features(selection, options.cache)
        names, class_N = np.unique(truth, return_inverse=True)
        print(f"{selection.name}: {len(class_N)} images, {len(names)} classes", flush=True)
        for seed in range(options.seeds):
            started = time.process_time()
            found = finish(auto.estimate(features_NF, seed=seed))
            print(f"  seed {seed}: {in_words(found)}, {time.process_time() - started:.1f} s of one core", flush=True)
            if seed == 0:
                print_sweep(found, options.sweep)
        if options.subsets:
            print_subsets(features_NF, class_N, options.subsets, others=options.others)
        if options.tree:
            print_tree(features_NF, truth)


def features(selection: Selection, cache: Path | None) -> tuple[np.ndarray, list[str]]:
    with tempfile.TemporaryDirectory() as scratch:
        sources, truth = unpack(selection, Path(scratch) / "images")
        return frozen_features(sources, cache=cache), truth


def in_words(found: Estimate) -> str:
    votes = ", ".join(f"{name} {vote:.1f}" for name, vote in found.votes.items())
    return (
        f"{found.clusters} in {found.interval[0]} to {found.interval[1]}, steady {found.steady or '-'};"
        f" {votes}; clarity {found.clarity:.2f}"
    )


def print_sweep(found: Estimate, most: int) -> None:
    for trial in found.sweep:
        if trial.clusters <= most:
            figures = ", ".join(f"{name} {getattr(trial, name):.3f}" for name in WITNESSES)
            print(f"    {trial.clusters:>3}: {figures}")
    for other in found.rejected:
        print(f"    not {other.clusters}: {other.why}")


def subset(class_N: np.ndarray, number: int) -> np.ndarray:
    """Rows of a drawn collection; its number of classes, size and skew go round with its number."""
    generator = np.random.default_rng((2022, number))
    classes = int(class_N.max()) + 1
    wanted = 3 + number % (classes - 2)
    images = SIZES[number // (classes - 2) % len(SIZES)]
    skewed = number // (classes - 2) // len(SIZES) % 2
    share_K = np.geomspace(10, 1, wanted) if skewed else np.ones(wanted)
    size_K = np.rint(images * share_K / share_K.sum()).astype(int)
    chosen = generator.permutation(classes)[:wanted]
    rows = [generator.permutation(np.flatnonzero(class_N == k))[:size] for k, size in zip(chosen, size_K, strict=True)]
    return np.sort(np.concatenate(rows))


def print_subsets(features_NF: np.ndarray, class_N: np.ndarray, count: int, *, others: bool) -> None:
    truth, found, usual = [], [], []
    for number in range(count):
        rows = subset(class_N, number)
        truth.append(len(np.unique(class_N[rows])))
        found.append(finish(auto.estimate(features_NF[rows], seed=0)))
        if others:
            usual.append(cluster_numbers.answers(features_NF[rows], seed=0))
    true_C = np.array(truth)
    guess = round(float(np.exp(np.log(true_C).mean())))
    answers = {
        "auto": np.array([each.clusters for each in found]),
        **{f"{name} alone": np.array([each.votes[name] for each in found]) for name in WITNESSES},
        f"always {guess}": np.full(count, guess),
        **{name: np.array([each[name] for each in usual]) for name in (usual[0] if usual else ())},
    }
    print(f"  {count} collections of {true_C.min()} to {true_C.max()} classes: mean |log ratio|, within 20 %, bias, r")
    for name, answer_C in answers.items():
        log_C = np.log(answer_C / true_C)
        near = (abs(answer_C - true_C) <= 0.2 * true_C).mean()
        r = np.corrcoef(np.log(answer_C), np.log(true_C))[0, 1] if answer_C.std() > 0 else 0.0
        print(f"    {name:<28} {abs(log_C).mean():.3f}  {near:.2f}  {log_C.mean():+.2f}  {r:+.2f}")
    inside = [each.interval[0] <= k <= each.interval[1] for each, k in zip(found, truth, strict=True)]
    print(f"    the interval holds the true number in {np.mean(inside):.2f} of them")


def print_tree(features_NF: np.ndarray, truth: Sequence[str]) -> None:
    """Levels of the tree above and below the clusters that SCL finds with the true number."""
    defaults = METHODS["scl"]["head"]
    fit = finish(
        heads.train(features_NF, clusters=len(set(truth)), epochs=defaults.epochs, restarts=defaults.restarts, seed=0)
    )
    started = time.process_time()
    tree = hierarchy.tree(fit.x_ND, fit.assignment.labels_N, seed=0)
    print(f"  tree: levels {tree.levels}, {time.process_time() - started:.1f} s of one core")
    for level in tree.levels:
        groups_N = tree.at(level)
        print(f"    {level}: NMI {quality(truth, groups_N)['nmi']:.3f}")
        for group in range(level) if level <= 3 else ():
            inside = Counter(np.asarray(truth)[groups_N == group].tolist())
            print(f"      {', '.join(f'{name} {count}' for name, count in inside.most_common(7))}")


if __name__ == "__main__":
    main()
