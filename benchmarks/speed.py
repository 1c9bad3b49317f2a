"""Ratios against the limit, each measured in one run: `python -m benchmarks.speed --data ZIP:10000`.

`head_end_to_end_ratio`: from files to labels (decode, features, training, k-means beside it, representatives) over the
bare forward pass of the same backbone over the same decoded images, in the fastest runtime found; both in turn, median
of the rounds. `full_step_ratio`: a step of full training over a bare forward and backward pass of the same network on
ready tensors in turn: step by step, on a GPU some steps by some. `kept_memory_ratio`, on a CPU: a step that keeps the
memory it frees, as every training does, over one that does not.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from joblib import cpu_count

from benchmarks.archives import Selection, unpack
from models import allocator, backbones, pixels, space
from models.features import BATCH
from models.full import Training
from models.progress import finish
from models.scl import Scl
from models.train import Config, Source, group

BACKBONE, IMAGE_SIZE = "efficientnet_lite0", 224


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--data", type=Selection.parse, required=True, metavar="ZIP", help="ZIP or ZIP:N")
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="of the whole way; default 3")
    parser.add_argument("--steps", type=int, default=30, metavar="S", help="of full training; default 30")
    parser.add_argument("--backbone", default="resnet10_slim", help="of full training; default resnet10_slim")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1; default cpu")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        sources, truth = unpack(options.data, Path(scratch) / "images")
        ratios = [whole_way(sources, len(set(truth)), Path(scratch), options.device) for _ in range(options.rounds)]
        print(f"head_end_to_end_ratio: {statistics.median(ratios):.2f}", flush=True)
        small_NSSC = finish(pixels.gather(sources, image_size=32, cache_dir=None, threads=cpu_count()))
    step_ratio, memory_ratio = full_step(small_NSSC, options.steps, options.backbone, options.device)
    print(f"full_step_ratio: {step_ratio:.2f}")
    if options.device == "cpu":
        print(f"kept_memory_ratio: {memory_ratio:.2f}")


def whole_way(sources: list[Source], clusters: int, scratch: Path, device: str) -> float:
    """Seconds from files to labels over seconds of the bare forward pass, one after the other."""
    decoded_NSSC = finish(
        pixels.gather(sources, image_size=IMAGE_SIZE, cache_dir=scratch / "pixels", threads=cpu_count())
    )
    encode = backbones.encoder(BACKBONE, weights=None, image_size=IMAGE_SIZE, threads=cpu_count(), device=device)
    batches = space.blocks(len(decoded_NSSC), BATCH)
    encode(np.array(decoded_NSSC[batches[0]]))
    with ThreadPoolExecutor(cpu_count()) as pool:
        started = time.perf_counter()
        for _ in pool.map(lambda rows_B: encode(np.array(decoded_NSSC[rows_B])), batches):
            pass
        bare_s = time.perf_counter() - started
    started = time.perf_counter()
    grouping = finish(group(Config(clusters=clusters, image_size=IMAGE_SIZE), sources, cache_dir=None, device=device))
    whole_s = time.perf_counter() - started
    stages = ", ".join(f"{name} {value:.1f}" for name, value in grouping.metrics["seconds"].items())
    print(f"bare forward {bare_s:.1f} s; whole {whole_s:.1f} s ({stages}): {whole_s / bare_s:.2f}", flush=True)
    return whole_s / bare_s


def full_step(pixels_NSSC: np.ndarray, steps: int, backbone: str, device: str) -> tuple[float, float]:
    """Seconds of a training step over those of a bare forward and backward pass, and of one that gives memory back."""
    torch.set_num_threads(cpu_count())
    training = Training(
        pixels_NSSC,
        objective=Scl,
        backbone=backbone,
        weights="random",
        clusters=10,
        epochs=2,
        seed=0,
        device=device,
    )

    # Training waits for a GPU once in a while only, so several steps are timed as one.
    window = 1 if device == "cpu" else max(1, min(8, training.steps // 4))

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    training.begin_epoch(1)  # clusters exist in the second half
    if device != "cpu":  # every shape of batch has to have come a few times
        for rows_G, pixels_BSSC in training.batches(0, 0):
            training.step(rows_G, pixels_BSSC)
    batches = list(islice(training.batches(1, 0), window * (steps + 1)))
    choices = [each.to(device) for each in training.choices(len(batches[0][1]))]
    ready_XCSS = training.views(batches[0][1], choices)

    def turns() -> tuple[float, float]:
        whole_s, bare_s = [], []
        for first in range(0, len(batches) - window + 1, window):
            wait()
            started = time.perf_counter()
            for rows_G, pixels_BSSC in batches[first : first + window]:
                training.step(rows_G, pixels_BSSC)
            wait()
            between = time.perf_counter()
            for _ in range(window):
                training.forward(ready_XCSS).square().mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                training.optimizer.zero_grad()
            wait()
            whole_s.append((between - started) / window)
            bare_s.append((time.perf_counter() - between) / window)
        # The first of each warms up.
        return statistics.median(whole_s[1:]), statistics.median(bare_s[1:])

    giving_back = turns()[0] if device == "cpu" else math.nan
    with allocator.freed_memory_kept():
        whole, bare = turns()
    print(f"full step {whole * 1e3:.0f} ms; bare forward and backward {bare * 1e3:.0f} ms", flush=True)
    return whole / bare, whole / giving_back


if __name__ == "__main__":
    main()
