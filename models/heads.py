"""SCL on frozen features: projections, boundaries and memory of several restarts, trained side by side in seconds.

Of many restarts a part is left behind half-way: `docs/decisions/0010-a-third-of-the-restarts-answers.md` says why.

The terms are those of `models.scl`. An image's other view is one of its neighbours in the space of the features.

Letters in shapes: N images, S of them that the heads train on, B batch, K clusters, D dimensions, M neighbours,
R restarts.
"""

import math
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from joblib import cpu_count
from torch import Tensor
from torch.nn.functional import normalize, softmax

from models import space, starts
from models.adam import Adam
from models.committee import Committee
from models.fit import Fit, agreement, draw, likeness, seed_of
from models.limits import check_positive, check_share
from models.progress import Step
from models.scl import (
    SclConfig,
    boundary_logits,
    consensus_target,
    consistency,
    contrast,
    score,
    similarity_prediction,
    similarity_weights,
)

EPOCHS = 8
# Times that clusters which the answer leaves empty are given images; what is empty after that is reported.
REFILLS = 3
# Predictions in the memory of the restarts that are trained at once: 256 MB, or what a single one takes.
MEMORY_FLOATS = 64 * 2**20
# Restarts in a group, whose steps are taken in one: fewer of them would mostly wait for Python.
TOGETHER = 12
# Groups that are trained at once, each by a thread.
WORKERS = 2
# Restarts are chosen among on about as many images, or on 16 for every cluster if that is more.
JUDGED = 4096
# How much the score counts beside the likeness to the other restarts.
SCORE_WEIGHT = 3.0
# So many restarts are not chosen among.
FEW = 4


@dataclass(frozen=True, kw_only=True)
class HeadConfig(SclConfig):
    """Settings on frozen features; `docs/decisions/` 0010, 0011 and 0017 to 0019 say how the defaults were chosen."""

    dimensions: int = 96
    main_dimensions: int = 256  # principal axes that those are combinations of
    shrinkage: float | None = None  # of the scatter between neighbours; None: by `shrunk`; 1: principal axes
    batch: int = 256
    epoch_images: int = 2048  # drawn in an epoch, or 64 for every cluster if that is more
    start_images: int = 4096  # that a start looks at, or 64 for every piece if that is more
    sample: int = 32_768  # images trained on where there are more, or 16 for every cluster if that is more
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            self, "dimensions", "main_dimensions", "batch", "epoch_images", "start_images", "sample", "learning_rate"
        )
        if self.shrinkage is not None:
            check_share(self, "shrinkage")

    def shrunk(self, images: int, clusters: int) -> float:
        """By default a half; less where many clusters have to be told apart, unless each has but few images."""
        if self.shrinkage is not None:
            return self.shrinkage
        return min(0.5, max(6 / clusters, 3 * clusters / images))

    def drawn(self, images: int, clusters: int) -> int:
        """Images that an epoch looks at."""
        return min(images, max(self.epoch_images, 64 * clusters))


def train(
    features_NF: np.ndarray,
    *,
    clusters: int,
    restarts: int,
    seed: int,
    epochs: int = EPOCHS,
    device: str = "cpu",
    config: HeadConfig | None = None,
    differ: float | None = None,
) -> Generator[Step, None, Fit]:
    """Train `restarts` heads from different starts on frozen features; the best third of them together give the answer.

    They are chosen after half of the epochs, without labels, and the others are trained no further. Nothing is
    quadratic in N: heads train on a sample where there are very many images, and an image outside of it is assigned by
    the boundaries and by its neighbours inside. `differ` is the share of images on which predictions differ that
    confidence is calibrated by, where features know more of their own labels than they should.
    """
    config = config or HeadConfig()
    axes, sample_S, wanted = directions(features_NF, clusters=clusters, seed=seed, config=config, device=device)
    z_ND, sample_S = axes.project(features_NF).to(device), sample_S.to(device)
    z_SD = z_ND[sample_S]
    neighbours_SM = torch.from_numpy(space.nearest(z_SD.cpu().numpy(), wanted, device=device)).to(device)
    seeds = [seed_of(seed, restart) for restart in range(restarts)]
    at_once = max(1, MEMORY_FLOATS // (len(z_SD) * max(clusters, z_SD.shape[1])))
    workers = 1
    if device == "cpu":
        # Groups are as large on every machine: a restart's last bits depend on where in memory it lies.
        at_once, workers = max(1, min(TOGETHER, at_once // WORKERS)), min(WORKERS, cpu_count())
    half, stay = epochs // 2, staying(restarts)
    start_s, epoch_s = costs_s(len(z_SD), clusters, config)
    start = max(1, round(start_s / epoch_s))  # of a restart, in epochs
    done, total = 0, restarts * (start + half) + stay * (epochs - half)
    yield Step(done=0, total=total)
    found, x_SD = [], z_SD.cpu().numpy()
    for some in space.blocks(restarts, max(WORKERS, cpu_count())):
        found.append(starts.several(x_SD, clusters, seeds=seeds[some], most=config.start_images))
        done += start * len(found[-1])
        yield Step(done=done, total=total)
    centres_RKD = torch.from_numpy(np.concatenate(found)).to(device)
    groups = [
        Heads(z_SD, neighbours_SM, centres_RKD=centres_RKD[some], seeds=seeds[some], config=config)
        for some in space.blocks(restarts, at_once)
    ]
    with ThreadPoolExecutor(workers, thread_name_prefix="heads") as pool:
        for begin, end in ((0, half), (half, epochs)):
            for some in space.blocks(len(groups), workers):
                for epoch in range(begin, end):
                    passes = [pool.submit(heads.epoch, epoch / epochs, (epoch + 1) / epochs) for heads in groups[some]]
                    details = [each.result() for each in passes]
                    done += sum(len(heads) for heads in groups[some])
                    yield Step(done=done, total=total, details=details[-1])
                for heads in groups[some]:
                    heads.forget()
            if end == half and stay < restarts:
                groups = keep_best(groups, stay, pool)
        everyone = torch.arange(len(z_SD), device=device)
        judged = list(pool.map(lambda heads: heads.judge(everyone), groups))

    scores = [value for each in judged for value in each.scores]
    committee = Committee(
        z_SD,
        projection_RDD=torch.cat([heads.projection_RDD.detach() for heads in groups]),
        centres_RKD=torch.cat([heads.centres_RKD.detach() for heads in groups]),
        labels_RS=np.concatenate([each.labels_RB for each in judged]),
        scores=scores,
        images_each=config.drawn(len(z_SD), clusters) / clusters,
        config=config,
        differ=differ,
    )
    neighbours_NM = neighbours_SM if len(z_SD) == len(z_ND) else voters(z_SD, z_ND, neighbours_SM.shape[1])
    assignment = committee.answer(z_ND, neighbours_NM)
    for _ in range(REFILLS):
        if not committee.refill(assignment.labels_N[sample_S.cpu().numpy()]):
            break
        assignment = committee.answer(z_ND, neighbours_NM)
    return Fit(
        assignment=assignment,
        x_ND=normalize(z_ND @ committee.projection_RDD[committee.reference], dim=1).cpu().numpy(),
        model={
            "mean": axes.mean_F.numpy(),
            "axes": axes.axes_FD.numpy(),
            "projection": committee.projection_RDD.cpu().numpy(),
            "centres": committee.centres_RKD.cpu().numpy(),
            "boundary_temperature": np.array([config.boundary_temperature], np.float32),
        },
        scores=scores,
        restarts_agreement=agreement(list(committee.labels_RS)),
        started=restarts,
    )


def voters(z_SD: Tensor, z_ND: Tensor, count: int) -> Tensor:
    """The neighbours in the sample of every image, (N, M); one of the sample finds itself, a vote in some more."""
    found_NM = space.search(z_SD.cpu().numpy(), z_ND.cpu().numpy(), count, device=str(z_SD.device))
    return torch.from_numpy(np.where(found_NM < 0, found_NM[:, :1].clip(min=0), found_NM)).to(z_SD.device)


class Heads:
    """Projections, decision boundaries and memories of some restarts, which are trained side by side."""

    def __init__(
        self,
        z_SD: Tensor,
        neighbours_SM: Tensor,
        *,
        centres_RKD: Tensor,
        seeds: list[int],
        config: HeadConfig,
    ) -> None:
        self.z_SD, self.neighbours_SM, self.config = z_SD, neighbours_SM, config
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.each_R1 = torch.arange(len(seeds), device=z_SD.device)[:, None]
        # Projections start as the identity: what the backbone knows is kept, not learnt again.
        self.projection_RDD = torch.eye(z_SD.shape[1], device=z_SD.device).repeat(len(seeds), 1, 1).requires_grad_()
        self.centres_RKD = centres_RKD.clone().requires_grad_()
        self.adam = Adam(self.parameters)
        self.refresh()
        self.mean_RK = self.memory_RSK.mean(dim=1)
        self.forget()

    def __len__(self) -> int:
        return len(self.generators)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.projection_RDD, self.centres_RKD]

    def embed(self, z_BD: Tensor) -> Tensor:
        return normalize(z_BD @ self.projection_RDD, dim=-1)

    def logits(self, x_RBD: Tensor) -> Tensor:
        return boundary_logits(x_RBD, self.centres_RKD, temperature=self.config.boundary_temperature)

    @torch.no_grad()
    def refresh(self) -> Tensor:
        """Remember every image's boundary prediction by the heads as they are; the vectors, of shape (R, S, D)."""
        x_RSD = self.z_SD @ self.projection_RDD
        normalize(x_RSD, dim=-1, out=x_RSD)
        self.memory_RSK = softmax(self.logits(x_RSD), dim=-1)
        return x_RSD

    @torch.no_grad()
    def neighbour_weights(self, x_SD: Tensor, rows_B: Tensor) -> Tensor:
        """How much the neighbours of these images count, shape (B, M)."""
        parts = [
            similarity_weights(
                space.take(x_SD, some_B),
                space.take(x_SD, space.take(self.neighbours_SM, some_B)),
                temperature=self.config.similarity_temperature,
            )
            for some_B in torch.split(rows_B, space.GATHERED)
        ]
        return torch.cat(parts)

    def epoch(self, begin: float, end: float) -> dict[str, float]:
        """One pass over a part of the sample; `begin` and `end` are shares of the whole training."""
        n, clusters, config = len(self.z_SD), self.centres_RKD.shape[1], self.config
        drawn = config.drawn(n, clusters)
        x_RSD = self.refresh()  # images that were not drawn must not keep the memory of an older head
        order = [torch.randperm(n, generator=generator)[:drawn].to(self.z_SD.device) for generator in self.generators]
        weights = [self.neighbour_weights(x_SD, rows_B) for x_SD, rows_B in zip(x_RSD, order, strict=True)]
        steps = max(1, round(drawn / config.batch))
        batches = zip(
            torch.stack(order).tensor_split(steps, dim=1), torch.stack(weights).tensor_split(steps, dim=1), strict=True
        )
        details: list[dict[str, Tensor]] = []
        for number, (rows_RB, weights_RBM) in enumerate(batches):
            through = begin + (end - begin) * number / steps
            rate = config.learning_rate * (1 + math.cos(math.pi * through)) / 2
            details.append(self.step(rows_RB, weights_RBM, rate))
        return {name: torch.stack([each[name] for each in details]).mean().item() for name in details[0]}

    def step(self, rows_RB: Tensor, weights_RBM: Tensor, learning_rate: float) -> dict[str, Tensor]:
        """One optimisation step on these images, each with a random neighbour as its other view."""
        config, pick = self.config, self.neighbours_SM.shape[1]
        b = rows_RB.shape[1]
        drawn_RB = torch.stack([torch.randint(pick, (b,), generator=generator) for generator in self.generators])
        around_RBM = space.take(self.neighbours_SM, rows_RB)
        drawn_RB = drawn_RB.to(self.z_SD.device, non_blocking=True)
        views_RB = around_RBM.gather(2, drawn_RB.unsqueeze(2)).squeeze(2)
        x_RBD, view_RBD = (self.embed(space.take(self.z_SD, each_RB)) for each_RB in (rows_RB, views_RB))
        logits_RBK, view_logits_RBK = self.logits(x_RBD), self.logits(view_RBD)

        with torch.no_grad():
            q_RBK = softmax(logits_RBK, dim=2)
            p_RBK = q_RBK
            if config.consistency:
                own_RBM = around_RBM + self.each_R1.unsqueeze(2) * len(self.z_SD)
                said_RBMK = space.take(self.memory_RSK.flatten(0, 1), own_RBM)
                p_RBK = similarity_prediction(weights_RBM, said_RBMK)
            agreed_RB = (p_RBK * q_RBK).sum(dim=2)
            target_RBK = consensus_target(p_RBK, q_RBK, self.mean_RK, power=config.balance)
            trust_RB = agreed_RB if config.trust else torch.ones_like(agreed_RB)

        taught_R = (
            consistency(target_RBK, logits_RBK, trust_RB) + consistency(target_RBK, view_logits_RBK, trust_RB)
        ) / 2
        contrasted_R = torch.zeros_like(taught_R)
        if config.contrast != "none":
            label_RB = target_RBK.argmax(dim=2)
            kin_RBB = label_RB.unsqueeze(2) == label_RB.unsqueeze(1) if config.contrast == "semantic" else None
            own_B = torch.arange(b, device=x_RBD.device)
            contrasted_R = contrast(x_RBD, view_RBD, own_B, kin_RBB, temperature=config.contrast_temperature)
        loss_R = taught_R + config.contrast_weight * contrasted_R
        gradients = torch.autograd.grad(loss_R.sum(), self.parameters)
        self.adam.step(self.parameters, gradients, learning_rate=learning_rate)

        with torch.no_grad():
            before_RBK = self.memory_RSK[self.each_R1, rows_RB]
            self.memory_RSK[self.each_R1, rows_RB] = config.momentum * before_RBK + (1 - config.momentum) * q_RBK
            self.mean_RK = 0.9 * self.mean_RK + 0.1 * q_RBK.mean(dim=1)
        return {
            "loss": loss_R.detach().mean(),
            "contrast": contrasted_R.detach().mean(),
            "agreement": agreed_RB.mean(),
        }

    def forget(self) -> None:
        """Let the memory go; the next epoch makes it anew."""
        self.memory_RSK = torch.empty(0)

    @torch.no_grad()
    def judge(self, rows_B: Tensor) -> "Judged":
        """Each restart's own grouping of these images of the sample, and its score on them."""
        x_RSD = self.refresh()
        scores, labels = [], []
        for x_SD, q_SK in zip(x_RSD, self.memory_RSK, strict=True):
            weights_BM = self.neighbour_weights(x_SD, rows_B)
            q_BK = space.take(q_SK, rows_B)
            p_BK = torch.cat(
                [
                    similarity_prediction(
                        weights_BM[some], space.take(q_SK, space.take(self.neighbours_SM, rows_B[some]))
                    )
                    for some in space.blocks(len(rows_B), space.BLOCK // 4)
                ]
            )
            scores.append(float(score(p_BK, q_BK)))
            labels.append(p_BK.mul_(q_BK).argmax(dim=1).cpu().numpy())
        self.forget()
        return Judged(scores=scores, labels_RB=np.stack(labels))

    def keep(self, chosen: list[int]) -> None:
        """Go on with these restarts alone, in this order."""
        self.projection_RDD, self.centres_RKD = (
            values_R.detach()[chosen].requires_grad_() for values_R in self.parameters
        )
        self.adam.keep(chosen)
        self.mean_RK = self.mean_RK[chosen]
        self.generators = [self.generators[number] for number in chosen]
        self.each_R1 = self.each_R1[: len(chosen)]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is known of some restarts without labels."""

    scores: list[float]
    labels_RB: np.ndarray


def directions(
    features_NF: np.ndarray, *, clusters: int, seed: int, config: HeadConfig, device: str = "cpu"
) -> tuple[space.Space, Tensor, int]:
    """Those in which images are compared; the sample that heads train on, shape (S,); how many neighbours each has."""
    sample_S = draw(len(features_NF), max(config.sample, 16 * clusters), seed=seed)
    neighbours = space.neighbour_count(len(sample_S), clusters, wanted=config.neighbours)
    axes = space.discriminant(
        space.fit(features_NF, dimensions=config.main_dimensions),
        features_NF[sample_S.numpy()],
        dimensions=config.dimensions,
        neighbours=neighbours,
        shrinkage=config.shrunk(len(sample_S), clusters),
        device=device,
    )
    return axes, sample_S, neighbours


def keep_best(groups: list[Heads], stay: int, pool: ThreadPoolExecutor) -> list[Heads]:
    """Keep the restarts with the largest sums of `SCORE_WEIGHT` times the score and mean likeness to the others."""
    images, clusters = len(groups[0].z_SD), groups[0].centres_RKD.shape[1]
    stride = max(1, images // max(JUDGED, 16 * clusters))
    rows_B = torch.arange(0, images, stride, device=groups[0].z_SD.device)
    judged = list(pool.map(lambda heads: heads.judge(rows_B), groups))
    scores_R = np.concatenate([each.scores for each in judged])
    alike_R = likeness(np.concatenate([each.labels_RB for each in judged]))
    chosen = set(np.argsort(-(SCORE_WEIGHT * scores_R + alike_R), kind="stable")[:stay].tolist())
    first, kept = 0, []
    for heads in groups:
        own = [number for number in range(len(heads)) if first + number in chosen]
        first += len(heads)
        if own:
            heads.keep(own)
            kept.append(heads)
    return kept


def staying(restarts: int) -> int:
    """Of how many restarts the heads go on after half of the epochs and answer."""
    return max(min(restarts, FEW), round(restarts / 3))


def costs_s(images: int, clusters: int, config: HeadConfig) -> tuple[float, float]:
    """Rough seconds of a core for a restart's start, and for an epoch of it: they only shape the progress bar."""
    pieces, seen = starts.sizes(images, clusters, most=config.start_images)
    return 7e-7 * seen * pieces, config.drawn(images, clusters) / config.batch * (0.003 + 8e-5 * clusters)
