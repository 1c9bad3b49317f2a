"""Training the backbone at an equal budget: `python -m benchmarks.full --data cifar10.zip:10000 --epochs 12`.

SCL, SimCLR with k-means on either of its feature layers, and CC train the same network on the same images, views and
steps. SCL's heads on the features of the others tell what its training is worth from what its answer is. Two runs go
side by side, a thread each; on a GPU they share the cores. Prints ACC, NMI and ARI as mean ± sd over the seeds, and
with `--figure FILE` draws how ACC rose with the epochs. With `--pretrained` the backbone starts from its own weights,
and a line for the heads on it as it was, `head`, stands beside what the training made of it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from joblib import cpu_count

from benchmarks.archives import Selection, unpack
from benchmarks.children import processes
from benchmarks.quality import spread
from models import heads, pixels, space
from models.baselines import kmeans
from models.config import METHODS
from models.full import Training
from models.metrics import quality
from models.objective import Objective
from models.progress import finish
from models.train import OBJECTIVES

RESTARTS = METHODS["scl"]["full"].restarts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full", description=__doc__)
    parser.add_argument("--data", type=Selection.parse, required=True, metavar="ZIP", help="ZIP or ZIP:N")
    parser.add_argument("--methods", nargs="+", default=["scl", "simclr", "cc"], choices=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="seeds 0 to S-1; default 3")
    parser.add_argument("--epochs", type=int, default=12, metavar="E")
    parser.add_argument("--backbone", default="resnet10_slim")
    parser.add_argument("--pretrained", action="store_true", help="start from the backbone's own weights")
    parser.add_argument("--image-size", type=int, default=32, metavar="P")
    parser.add_argument("--marks", type=int, default=4, metavar="M", help="groupings on the way; default 4")
    parser.add_argument("--jobs", type=int, default=2, metavar="J", help="runs side by side; default 2")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1, which the runs share; default cpu")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write every figure as a JSON line as it comes")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the learning curves; needs matplotlib")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        sources, truth = unpack(options.data, Path(scratch) / "images")
        gathered = pixels.gather(sources, image_size=options.image_size, cache_dir=None, threads=cpu_count())
        file = Path(scratch) / "pixels.npy"
        np.save(file, finish(gathered))
        print(f"{options.data.name}: {options.backbone}, {options.epochs} epochs, seeds 0 to {options.seeds - 1}")
        with processes(options.jobs) as pool:
            asked = [
                pool.submit(
                    run,
                    method,
                    seed,
                    file,
                    truth,
                    options.epochs,
                    options.backbone,
                    marks=options.marks,
                    pretrained=options.pretrained,
                    device=options.device,
                    threads=1 if options.device == "cpu" else max(1, cpu_count() // options.jobs),
                    record=options.record,
                )
                for seed in range(options.seeds)
                for method in options.methods
            ]
            rows = []
            for job in asked:
                rows.extend(job.result())
                last = [row for row in job.result() if row["epoch"] == options.epochs]
                for row in last:
                    print(json.dumps(row), flush=True)
    print_table(rows, options.epochs)
    if options.figure:
        draw(rows, options.figure)


def run(
    method: str,
    seed: int,
    file: Path,
    truth: Sequence[str],
    epochs: int,
    backbone: str,
    *,
    marks: int,
    pretrained: bool,
    device: str,
    threads: int,
    record: Path | None,
) -> list[dict[str, float | str]]:
    """Train one network; what its groupings scored at some epochs, the last one included."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    training = Training(
        np.load(file, mmap_mode="r"),
        objective=OBJECTIVES[method],
        backbone=backbone,
        weights=None if pretrained else "random",
        clusters=len(set(truth)),
        epochs=epochs,
        seed=seed,
        device=device,
    )
    marked = {round(epochs * mark / marks) for mark in range(1, marks + 1)}
    rows: list[dict[str, float | str]] = []

    def found(name: str, epoch: int, labels_N: np.ndarray) -> None:
        spent = {"cpu_s": trained_cpu_s, "seconds": trained_s}
        rows.append({"method": name, "seed": seed, "epoch": epoch, **spent, **quality(truth, labels_N)})
        if record:
            with record.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")

    trained_s = trained_cpu_s = 0.0
    if pretrained:
        on_it = finish(training.objective.answer(finish(training.features()), seed=seed, restarts=RESTARTS))
        found("head", epochs, on_it.assignment.labels_N)
    seen, started, started_cpu = 0, time.perf_counter(), time.process_time()
    for step in training.run():
        epoch = step.done // training.steps
        if step.done % training.steps or epoch == seen:
            continue
        seen = epoch
        if epoch in marked:
            trained_s += time.perf_counter() - started
            trained_cpu_s += time.process_time() - started_cpu
            for layer, labels_N in answers(method, training.objective, finish(training.features()), seed).items():
                found(layer, epoch, labels_N)
            started, started_cpu = time.perf_counter(), time.process_time()
    return rows


def answers(method: str, objective: Objective, features_NF: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The method's grouping; of SimCLR k-means on each of its layers; of both others SCL's heads on their features."""
    found = {}
    if method == "simclr":
        for name, x_ND in objective.layers(features_NF).items():
            steps = kmeans.train(x_ND, clusters=objective.clusters, epochs=300, restarts=10, seed=seed)
            found[f"simclr, k-means on {name}"] = finish(steps).assignment.labels_N
    else:
        found[method] = finish(objective.answer(features_NF, seed=seed, restarts=RESTARTS)).assignment.labels_N
    if method != "scl":
        own = heads.train(
            space.unit(features_NF), clusters=objective.clusters, epochs=heads.EPOCHS, restarts=RESTARTS, seed=seed
        )
        found[f"{method}, heads on features"] = finish(own).assignment.labels_N
    return found


def print_table(rows: Sequence[dict[str, Any]], epochs: int) -> None:
    print(f"{'method':<32} {'ACC':>15} {'NMI':>15} {'ARI':>15} {'seconds':>8} {'CPU s':>8}")
    for method in dict.fromkeys(row["method"] for row in rows):
        last = [row for row in rows if row["method"] == method and row["epoch"] == epochs]
        cells = " ".join(f"{spread([row[name] for row in last]):>15}" for name in ("acc", "nmi", "ari"))
        spent = " ".join(f"{statistics.mean(row[name] for row in last):>8.0f}" for name in ("seconds", "cpu_s"))
        print(f"{method:<32} {cells} {spent}")


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """ACC over epochs, a line a method with the spread of its seeds."""
    import matplotlib as mpl  # noqa: PLC0415  # only here

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        epochs = sorted({row["epoch"] for row in own})
        values = [[row["acc"] for row in own if row["epoch"] == epoch] for epoch in epochs]
        means = np.array([statistics.mean(at) for at in values])
        deviations = np.array([statistics.stdev(at) if len(at) > 1 else 0.0 for at in values])
        axes.plot(epochs, means, marker="o", label=method)
        axes.fill_between(epochs, means - deviations, means + deviations, alpha=0.15)
    axes.set(xlabel="epochs (two views of each image in each)", ylabel="ACC", title="Training from random weights")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
