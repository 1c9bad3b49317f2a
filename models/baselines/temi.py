"""TEMI on frozen features: many small heads taught by their own running averages, the best by its loss answers.

After Adaloglou, Michels, Kalisch and Kollmann, "Exploring the Limits of Deep Image Clustering using Pretrained
Models", BMVC 2023, with the settings of its public code (HHU-MMBS/TEMI-official-BMVC2023, `main_args.py` and the
README's command): weighted pointwise mutual information with beta 0.6, weights from the teachers of all heads,
pairs out of 50 nearest neighbours, 16 heads, both temperatures 0.1, running mean of the assignment 0.9, AdamW
with weight decay 1e-4 on the weights, last layer fixed in the first epoch, teachers answer.

Adapted to small collections on a CPU, chosen on CIFAR-10: the public code takes 4,800 steps of 1,024 pairs at a
learning rate of 4e-4, with a teacher momentum of 0.996. Here some hundred steps of 128 pairs have to do, so the rate
is 5e-3 and falls to 0, and the teacher follows faster. Features are centred, rotated to their 128 main axes and scaled
to unit length, and the layers are 128 and 64 wide (public: raw or standardised features, 512 and 256).

Letters in shapes: N images, B batch, H heads, K clusters, D dimensions, E and F widths of the layers, M neighbours.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, normalize, softmax

from models import space
from models.baselines.pairs import batches, partners
from models.baselines.vote import confirm, likeliest
from models.fit import Fit, agreement, seed_of
from models.limits import check_below_one, check_positive
from models.progress import Step

# Products of probabilities are no smaller: below, the slope of their power has no number.
LEAST = 1e-30


@dataclass(frozen=True, kw_only=True)
class TemiConfig:
    """Settings of the method; above the gap those of the public code."""

    beta: float = 0.6
    neighbours: int = 50
    temperature: float = 0.1  # of student and teacher
    mean_momentum: float = 0.9  # of the mean assignment
    weight_decay: float = 1e-4

    dimensions: int = 128
    hidden: int = 128
    bottleneck: int = 64
    batch: int = 128
    least_steps: int = 15  # in an epoch, however few images there are
    learning_rate: float = 5e-3
    warmup: float = 0.1  # share of the training in which the rate rises
    teacher_momentum: float = 0.96  # public: 0.996, the same share of its longer training

    def __post_init__(self) -> None:
        check_positive(self, "neighbours", "temperature", "dimensions", "hidden", "bottleneck")
        check_positive(self, "batch", "least_steps", "learning_rate")
        if not 0.5 < self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; it must be above 0.5 and at most 1")
        check_below_one(self, "mean_momentum", "teacher_momentum", "warmup")


def train(
    features_NF: np.ndarray,
    *,
    clusters: int,
    epochs: int,
    restarts: int,
    seed: int,
    device: str = "cpu",
    config: TemiConfig | None = None,
) -> Generator[Step, None, Fit]:
    """Train `restarts` heads at once and answer with the one whose loss was lowest in the last epoch."""
    config = config or TemiConfig()
    axes = space.fit(features_NF, dimensions=config.dimensions)
    # The layers' first weights are made for inputs of about unit variance.
    z_ND = axes.project(features_NF)
    z_ND = (z_ND * z_ND.shape[1] ** 0.5).to(device)
    x_ND = space.unit(features_NF)
    wanted = space.neighbour_count(len(x_ND), clusters, wanted=config.neighbours)
    neighbours_NM = torch.from_numpy(space.nearest(x_ND, wanted, device=device)).to(device)

    school = School(z_ND, neighbours_NM, clusters=clusters, heads=restarts, seed=seed_of(seed, 0), config=config)
    loss_H = torch.zeros(restarts)
    for epoch in range(epochs):
        loss_H = school.epoch(epoch, epochs)
        yield Step(done=epoch + 1, total=epochs, details={"loss": loss_H.mean().item(), "best": loss_H.min().item()})

    best = int(loss_H.argmin())
    label_HN = likeliest(len(z_ND), school.predict)
    assignment = confirm(x_ND, label_HN[best], clusters, lambda rows_B: school.predict(rows_B)[best])
    return Fit(
        assignment=assignment,
        x_ND=x_ND,
        model={"mean": axes.mean_F.numpy(), "axes": axes.axes_FD.numpy(), **school.teacher.arrays(best)},
        scores=(-loss_H).tolist(),
        restarts_agreement=agreement(list(label_HN)),
    )


class Heads:
    """H networks of one hidden layer, a bottleneck on the unit sphere, and a direction and a length a cluster."""

    def __init__(self, parts: dict[str, Tensor]) -> None:
        self.parts = parts

    @classmethod
    def new(cls, *, sizes: tuple[int, int, int, int], heads: int, generator: torch.Generator, device: str) -> "Heads":
        """Heads at random: truncated normal weights (0.02) as DINO's, directions as `torch.nn.Linear`'s."""
        size, hidden, bottleneck, clusters = sizes
        # torch cuts at 2, a hundred deviations away, and so does the public code: a plain normal.
        parts = {
            "hidden": 0.02 * torch.randn(heads, size, hidden, generator=generator),
            "bottleneck": 0.02 * torch.randn(heads, hidden, bottleneck, generator=generator),
            "directions": (2 * torch.rand(heads, bottleneck, clusters, generator=generator) - 1) / bottleneck**0.5,
            "lengths": torch.ones(heads, 1, clusters),
            "hidden_bias": torch.zeros(heads, 1, hidden),
            "bottleneck_bias": torch.zeros(heads, 1, bottleneck),
        }
        return cls({name: part.to(device) for name, part in parts.items()})

    def copy(self) -> "Heads":
        return Heads({name: part.detach().clone() for name, part in self.parts.items()})

    def logits(self, z_BD: Tensor) -> Tensor:
        """One row an image and head, shape (H, B, K), from -1 to 1 at first."""
        parts = self.parts
        hidden_HBE = gelu(z_BD @ parts["hidden"] + parts["hidden_bias"])
        bottleneck_HBF = normalize(hidden_HBE @ parts["bottleneck"] + parts["bottleneck_bias"], dim=2)
        return bottleneck_HBF @ (parts["lengths"] * normalize(parts["directions"], dim=1))

    def arrays(self, head: int) -> dict[str, np.ndarray]:
        """The weights of one head, the directions as centres."""
        own = {name: part[head].detach().cpu().numpy() for name, part in self.parts.items()}
        directions_FK, lengths_1K = own.pop("directions"), own.pop("lengths")
        own["centres"] = (directions_FK / np.linalg.norm(directions_FK, axis=0) * lengths_1K).T
        return own


class School:
    """Students, their teachers, and the running mean of what the teachers say."""

    def __init__(
        self, z_ND: Tensor, neighbours_NM: Tensor, *, clusters: int, heads: int, seed: int, config: TemiConfig
    ) -> None:
        self.z_ND, self.neighbours_NM, self.config = z_ND, neighbours_NM, config
        self.generator = torch.Generator().manual_seed(seed)
        sizes = (z_ND.shape[1], config.hidden, config.bottleneck, clusters)
        self.student = Heads.new(sizes=sizes, heads=heads, generator=self.generator, device=str(z_ND.device))
        self.teacher = self.student.copy()
        self.mean_H1K = torch.full((heads, 1, clusters), 1 / clusters, device=z_ND.device)
        parts = self.student.parts
        for part in parts.values():
            part.requires_grad_()
        groups: list[dict[str, Any]] = [
            {"params": [parts["hidden"], parts["bottleneck"]]},
            {"params": [parts["hidden_bias"], parts["bottleneck_bias"]], "weight_decay": 0.0},
            {"params": [parts["directions"], parts["lengths"]]},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)

    def epoch(self, epoch: int, epochs: int) -> Tensor:
        """One pass over the collection, more over a small one; the mean loss of every head, shape (H,)."""
        config = self.config
        rows = list(batches(len(self.z_ND), config.batch, least=config.least_steps, generator=self.generator))
        total_H = torch.zeros(len(self.mean_H1K))
        for number, rows_B in enumerate(rows):
            rate = config.learning_rate * schedule((epoch + number / len(rows)) / epochs, config.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if epoch == 0:
                self.optimizer.param_groups[-1]["lr"] = 0.0
            total_H += self.step(rows_B.to(self.z_ND.device))
        return total_H / len(rows)

    def step(self, rows_B: Tensor) -> Tensor:
        """One optimisation step on these images, each paired with a random neighbour; the loss of every head."""
        config = self.config
        pairs_B = partners(self.neighbours_NM, rows_B, generator=self.generator)
        z_PD = self.z_ND[torch.cat([rows_B, pairs_B])]  # P = 2 B: the images, then their neighbours
        with torch.no_grad():
            taught_HPK = softmax(self.teacher.logits(z_PD) / config.temperature, dim=2)
            mean_H1K = taught_HPK.mean(dim=1, keepdim=True)
            self.mean_H1K = config.mean_momentum * self.mean_H1K + (1 - config.mean_momentum) * mean_H1K
        said_HPK = softmax(self.student.logits(z_PD) / config.temperature, dim=2)
        loss_H = temi_loss(said_HPK, taught_HPK, self.mean_H1K, beta=config.beta)
        self.optimizer.zero_grad()
        loss_H.mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.optimizer.step()
        with torch.no_grad():
            for name, part in self.teacher.parts.items():
                part.lerp_(self.student.parts[name], 1 - config.teacher_momentum)
        return loss_H.detach().cpu()

    @torch.no_grad()
    def predict(self, rows_B: slice) -> Tensor:
        """What the teachers say of these images, shape (H, B, K), on the CPU."""
        return softmax(self.teacher.logits(self.z_ND[rows_B]) / self.config.temperature, dim=2).cpu()


def temi_loss(said_HPK: Tensor, taught_HPK: Tensor, mean_H1K: Tensor, *, beta: float) -> Tensor:
    """Weighted pointwise mutual information, negated; mean over the pairs, shape (H,).

    Args:
        said_HPK: probabilities of the students; the second half of the rows are the partners of the first.
        taught_HPK: those of the teachers, without gradient.
        mean_H1K: how often every cluster is named.
        beta: below 1 it keeps clusters from dying out.

    """
    said, taught = said_HPK.chunk(2, dim=1), taught_HPK.chunk(2, dim=1)
    # Pairs on which the teachers of all heads agree are more likely of one class.
    weight_B = (taught[0] * taught[1]).sum(dim=2).mean(dim=0)
    crossed = [
        -(((s_HBK * t_HBK).clamp_min(LEAST) ** beta) / mean_H1K).sum(dim=2).log()
        for s_HBK, t_HBK in zip(said, taught[::-1], strict=True)
    ]
    return (weight_B * (crossed[0] + crossed[1]) / 2).mean(dim=1)


def schedule(through: float, warmup: float) -> float:
    """The share of the learning rate: a straight rise over `warmup` of the training, then half a cosine to 0."""
    if through < warmup:
        return through / warmup
    return (1 + math.cos(math.pi * (through - warmup) / (1 - warmup))) / 2
