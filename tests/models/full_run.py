"""One small `full` training in a process of its own, for the tests that kill it or start several of it.

python -m tests.models.full_run --out FOLDER [--checkpoint FOLDER] [--slow] [--double] [--each]
    [--device cuda] [--shared]
"""

import argparse
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import normalize

from models import distributed, full, networks
from models.baselines.simclr import Simclr, nt_xent
from models.full import FullConfig
from models.objective import Objective
from models.progress import finish


class Remembering(Objective):
    """All that an objective may do: a memory, its use between epochs, random numbers, batch normalisation."""

    view_strengths = ("strong", "weak")

    def __init__(self, *, feature_size, images, clusters, epochs):
        super().__init__(feature_size=feature_size, images=images, clusters=clusters, epochs=epochs)
        self.projection = nn.Sequential(nn.Linear(feature_size, 16), nn.BatchNorm1d(16))
        self.centres = nn.Linear(16, clusters, bias=False)
        self.register_buffer("memory_ND", normalize(torch.randn(images, 16), dim=1))
        self.register_buffer("level_K", torch.zeros(clusters))
        self.weight = 0.0

    def begin_epoch(self, epoch):
        self.weight = epoch / self.epochs
        with torch.no_grad():
            self.level_K.copy_(self.centres(self.memory_ND).mean(dim=0))

    def loss(self, h_VBF, rows_B):
        x_BD, view_BD = (normalize(self.projection(h_BF), dim=1) for h_BF in h_VBF)
        noise_BD = torch.randn(x_BD.shape).to(x_BD)
        self.latest = (rows_B, x_BD.detach())
        pull = -(x_BD * self.memory_ND[rows_B]).sum(dim=1).mean()
        spread = (self.centres(x_BD + 0.1 * noise_BD) - self.level_K).square().mean()
        contrast = nt_xent(x_BD, view_BD, temperature=0.5)
        return contrast + pull + self.weight * spread, {"contrast": contrast.detach()}

    @torch.no_grad()
    def end_step(self):
        rows_B, x_BD = self.latest
        self.memory_ND[rows_B] = normalize((self.memory_ND[rows_B] + x_BD) / 2, dim=1)

    def answer(self, features_NF, *, seed, restarts):
        grouping = Simclr(
            feature_size=self.feature_size, images=self.images, clusters=self.clusters, epochs=self.epochs
        )
        return grouping.answer(features_NF, seed=seed, restarts=restarts)


class Careful(Remembering):
    """Trains the last of the layers, and leaves the statistics of normalisation as they came."""

    trained_share = 0.5
    own_statistics = False


def pictures(images=48, size=32):
    """Noise on three kinds of coarse patterns."""
    rng = np.random.default_rng(0)
    kind_N = np.arange(images) % 3
    coarse = rng.integers(0, 200, (3, 4, 4, 3)).repeat(size // 4, axis=1).repeat(size // 4, axis=2)
    return (coarse[kind_N] + rng.integers(0, 56, (images, size, size, 3))).astype(np.uint8), kind_N


def train(pixels_NSSC, *, restarts, seed, **settings):
    """Train, then group the features of every image; settings are those of `Training`."""
    training = full.Training(pixels_NSSC, seed=seed, **settings)
    yield from training.run()
    return finish(training.objective.answer(finish(training.features()), seed=seed, restarts=restarts))


SETTINGS = {
    "objective": Remembering,
    "backbone": "resnet10_slim",
    "weights": "random",
    "clusters": 3,
    "epochs": 3,
    "seed": 5,
}


# Every kind of training that the tests compare: whether it is in float64, and of which objective.
KINDS = {"double": (True, Remembering), "careful": (True, Careful), "single": (False, Remembering)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--double", action="store_true", help="in float64, where sums in another order hardly differ")
    parser.add_argument("--each", action="store_true", help="all KINDS one after the other, in folders of their names")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shared", action="store_true", help="two processes on one GPU, by gloo: NCCL refuses")
    options = parser.parse_args()
    # On a GPU: no 19-bit products, and sums in one order.
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    if options.shared:
        os.environ["LOCAL_RANK"] = "0"
        start = dist.init_process_group
        dist.init_process_group = lambda _backend, **settings: start("gloo", **settings)
    stopped = False

    def stop():
        if options.slow:
            time.sleep(0.2)
        return stopped

    def told(_number, _frame):
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, told)
    torch.set_num_threads(1)
    kept = {"checkpoint_dir": options.checkpoint, "checkpoint_every_s": 0.0, "stop": stop}
    with distributed.process_group(options.device) as device:
        if options.each:
            for kind in KINDS:
                run(kind, options.out / kind, device=device)
        else:
            run("double" if options.double else "single", options.out, device=device, **kept)


def run(kind, out, **settings):
    """Train, and leave the losses of every process and what it ended with."""
    double, objective = KINDS[kind]
    out.mkdir(parents=True, exist_ok=True)
    config = FullConfig(batch=16, precision="float32", optimizer="sgd", learning_rate=0.01)
    network = networks.network
    made = (lambda **kwargs: objective(**kwargs).double()) if double else objective
    wide = patch.object(networks, "network", lambda *args, **kwargs: network(*args, **kwargs).double())
    with wide if double else nullcontext():
        training = full.Training(pictures()[0], **{**SETTINGS, "objective": made}, config=config, **settings)
    views = training.views
    if double:
        training.views = lambda *given: views(*given).double()
    losses = []
    plain = training.step

    def step(rows_G, pixels_BSSC):
        details = plain(rows_G, pixels_BSSC)
        losses.append(details["loss"].item())
        return details

    training.step = step
    try:
        for _ in training.run():
            pass
    except full.Stopped:
        sys.exit(75)
    if double:
        training.network.float()
    features_NF = finish(training.features())
    if distributed.rank() == 0:
        fit = finish(training.objective.answer(features_NF, seed=5, restarts=2))
        state = {**training.network.state_dict(), **training.objective.state_dict()}
        np.savez(
            out / "end.npz",
            labels=fit.assignment.labels_N,
            features=features_NF,
            **{name: value.cpu().numpy() for name, value in state.items()},
        )
    (out / f"losses-{distributed.rank()}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
