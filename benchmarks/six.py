"""ACC, NMI and ARI on one of the field's six benchmarks: `python -m benchmarks.six cifar-10 --root DIR --scaled`.

A method that can train its backbone does so from random weights, at the benchmark's settings, in STL-10 after SimCLR
on the unlabelled images; the others work on the features of the pretrained backbone. Which files go into DIR, and
where each protocol comes from: `docs/benchmarks.md`.
"""

import argparse
import hashlib
import io
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from benchmarks.datasets import Dataset, DatasetError
from benchmarks.protocols import BENCHMARKS, Benchmark, Settings, rows_of
from benchmarks.quality import spread
from models.baselines.simclr import Simclr
from models.config import METHODS
from models.full import Training
from models.progress import finish
from models.train import Config, InputError, Source, group


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.six", description=__doc__)
    parser.add_argument("name", choices=list(BENCHMARKS), metavar="NAME", help=f"one of: {', '.join(BENCHMARKS)}")
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="the official files, or their archive")
    parser.add_argument("--scaled", action="store_true", help="a part of the images, for two CPU cores")
    parser.add_argument(
        "--methods", nargs="+", default=["scl", "simclr", "cc", "pica", "kmeans_pixels"], choices=list(METHODS)
    )
    parser.add_argument("--train", choices=["head", "full"], help="default: full for the methods that can, else head")
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="seeds 0 to S-1; default 3")
    parser.add_argument("--epochs", type=int, metavar="E", help="default: the benchmark's")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default CUDA where there is one")
    parser.add_argument("--check", action="store_true", help="only read the files and say what they hold")
    options = parser.parse_args(arguments)
    benchmark = BENCHMARKS[options.name]
    settings = benchmark.scaled if options.scaled else benchmark.full
    try:
        dataset = benchmark.load(options.root)
        print(f"{options.name}: {len(dataset)} images ({benchmark.split}), {benchmark.clusters} classes")
        if options.check:
            return 0
        plan = configurations(
            benchmark,
            settings,
            methods=options.methods,
            train=options.train,
            seeds=options.seeds,
            epochs=options.epochs,
        )
        with tempfile.TemporaryDirectory() as scratch:
            measure(dataset, settings, plan, scratch=Path(scratch), device=options.device)
    except (DatasetError, InputError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def configurations(
    benchmark: Benchmark,
    settings: Settings,
    *,
    methods: Sequence[str],
    train: str | None,
    seeds: int,
    epochs: int | None,
) -> dict[str, list[Config]]:
    """What to run, method by method."""
    plan = {}
    for method in methods:
        way = train or ("full" if "full" in METHODS[method] else "head")
        full = {"image_size": settings.image_size, "backbone": settings.backbone, "weights": "random"}
        cost = {**full, "epochs": epochs or settings.epochs} if way == "full" else {"epochs": epochs}
        plan[method] = [
            Config(clusters=benchmark.clusters, method=method, train=way, seed=seed, **cost) for seed in range(seeds)
        ]
    return plan


def measure(
    dataset: Dataset, settings: Settings, plan: dict[str, list[Config]], *, scratch: Path, device: str | None
) -> None:
    rows = rows_of(settings, len(dataset))
    pictures = sources(dataset, rows, scratch / "images")
    truth = [dataset.classes[label] for label in dataset.labels_N[rows]]
    print(f"{len(rows)} of them used; full training: {settings.backbone}, {settings.image_size} pixels")
    head = f"{'method':<14} {'train':<5} {'epochs':>6} {'ACC':>15} {'NMI':>15} {'ARI':>15} {'seconds':>8}"
    print(f"{head}  ACC of every seed")
    weights: dict[int, Path] = {}  # by seed, the same for every method
    for method, configs in plan.items():
        found: dict[str, list[float]] = {"acc": [], "nmi": [], "ari": [], "seconds": []}
        for asked in configs:
            config = asked
            if settings.pretraining_epochs and dataset.unlabelled is not None and asked.train == "full":
                if asked.seed not in weights:
                    weights[asked.seed] = scratch / f"pretrained-{asked.seed}.safetensors"
                    pretrain(dataset.unlabelled, settings, weights[asked.seed], seed=asked.seed, device=device)
                config = replace(asked, weights=str(weights[asked.seed]))
            grouping = finish(group(config, pictures, cache_dir=scratch / "cache", truth=truth, device=device))
            for name, value in grouping.metrics["quality"].items():
                found[name].append(value)
            found["seconds"].append(grouping.metrics["seconds"]["training"])
        row = " ".join(f"{spread(found[name]):>15}" for name in ("acc", "nmi", "ari"))
        each = " ".join(f"{value:.3f}" for value in found["acc"])
        way = f"{configs[0].train:<5} {configs[0].resolved().epochs:>6}"
        print(f"{method:<14} {way} {row} {statistics.mean(found['seconds']):>8.1f}  {each}", flush=True)


def pretrain(
    unlabelled_NHWC: np.ndarray, settings: Settings, path: Path, *, seed: int, device: str | None = None
) -> None:
    """SimCLR on unlabelled images; the backbone's weights go into a file that `Config.weights` takes."""
    started = time.perf_counter()
    size = (settings.image_size, settings.image_size)
    rows = rows_of(settings, len(unlabelled_NHWC))
    pixels_NSSC = np.empty((len(rows), *size, 3), np.uint8)
    for number, row in enumerate(rows):
        picture = Image.fromarray(np.ascontiguousarray(unlabelled_NHWC[row]))
        pixels_NSSC[number] = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    training = Training(
        pixels_NSSC,
        objective=Simclr,
        backbone=settings.backbone,
        weights="random",
        clusters=2,  # it asks for a number and makes no use of it before the answer
        epochs=settings.pretraining_epochs,
        seed=seed,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    deque(training.run(), maxlen=0)
    weights = {name: value.cpu().contiguous() for name, value in training.network.body.state_dict().items()}
    safetensors.torch.save_file(weights, path)
    spent_s = time.perf_counter() - started
    print(f"SimCLR on {len(rows)} unlabelled images, {settings.pretraining_epochs} epochs: {spent_s:.1f} s", flush=True)


def sources(dataset: Dataset, rows: np.ndarray, folder: Path) -> list[Source]:
    """These pictures as files: their own, or lossless ones written into a new folder."""
    if isinstance(dataset.pictures, tuple):
        paths = [dataset.pictures[row] for row in rows]
        return [Source(key=hashlib.sha256(path.read_bytes()).hexdigest(), path=path) for path in paths]
    folder.mkdir()
    found = []
    for row in rows:
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(dataset.pictures[row])).save(file, "BMP")
        path = folder / f"{row:06d}.bmp"
        path.write_bytes(file.getvalue())
        found.append(Source(key=hashlib.sha256(file.getvalue()).hexdigest(), path=path))
    return found


if __name__ == "__main__":
    sys.exit(main())
