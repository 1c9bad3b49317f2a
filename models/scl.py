"""Semantic Contrastive Learning on frozen features: the method, top to bottom.

After Huang and Gong, "Deep Clustering by Semantic Contrastive Learning", BMVC 2022. Its abstract gives the idea:
a cluster-aware contrastive objective, and clusters inferred on the fly where instance similarity and decision
boundaries agree. The formulas are our reconstruction; `docs/method.md` says which is which.

Letters in shapes: N images, B batch, K clusters, D dimensions, M neighbours.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize, softmax

from models import space
from models.assign import Assignment, Rule, assign, concatenate
from models.fit import Fit, agreement, seed_of
from models.progress import Step


@dataclass(frozen=True, kw_only=True)
class SclConfig:
    """Settings of the method; the defaults were chosen on CIFAR-10 only. Each term has a switch."""

    consistency: bool = True  # teach the boundaries what both predictions agree on; else only what they say
    contrast: Literal["semantic", "instance", "none"] = "semantic"
    balance: float = 0.8  # power of the mean assignment that the target is divided by; 0 lets clusters be uneven
    trust: bool = True  # weigh an image by how far its two predictions agree
    rule: Rule = "consensus"

    dimensions: int = 96
    neighbours: int = 15
    batch: int = 256
    epoch_images: int = 2048  # drawn in an epoch, or 64 for every cluster if that is more
    learning_rate: float = 1e-2
    boundary_temperature: float = 0.3
    similarity_temperature: float = 0.1
    contrast_temperature: float = 0.2
    contrast_weight: float = 0.5
    momentum: float = 0.5  # of the memory

    def __post_init__(self) -> None:
        for name in ("dimensions", "neighbours", "batch", "epoch_images", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("boundary_temperature", "similarity_temperature", "contrast_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be at least 0 and below 1")


def train(
    features_NF: np.ndarray,
    *,
    clusters: int,
    epochs: int,
    restarts: int,
    seed: int,
    device: str = "cpu",
    config: SclConfig | None = None,
) -> Generator[Step, None, Fit]:
    """Train `restarts` heads from different starts and keep the one that agrees with itself best."""
    config = config or SclConfig()
    axes = space.fit(features_NF, dimensions=config.dimensions)
    z_ND = axes.project(features_NF)
    wanted = space.neighbour_count(len(z_ND), clusters, wanted=config.neighbours)
    neighbours_NM = torch.from_numpy(space.nearest(z_ND.numpy(), wanted)).to(device)
    z_ND = z_ND.to(device)

    ends: list[tuple[float, Head, Assignment]] = []
    for restart in range(restarts):
        head = Head(z_ND, neighbours_NM, clusters=clusters, seed=seed_of(seed, restart), config=config)
        for epoch in range(epochs):
            details = head.epoch(epoch / epochs, (epoch + 1) / epochs)
            done = restart * epochs + epoch + 1
            yield Step(done=done, total=restarts * epochs, details={"restart": restart + 1.0, **details})
        assignment, score = head.answer()
        ends.append((score, head, assignment))

    scores = [score for score, _, _ in ends]
    _, head, assignment = ends[int(np.argmax(scores))]
    return Fit(
        assignment=assignment,
        x_ND=head.embed(z_ND).cpu().numpy(),
        model={
            "mean": axes.mean_F.numpy(),
            "axes": axes.axes_FD.numpy(),
            "projection": head.projection_DD.detach().cpu().numpy(),
            "centres": normalize(head.centres_KD.detach(), dim=1).cpu().numpy(),
        },
        scores=scores,
        restarts_agreement=agreement([assignment.labels_N for _, _, assignment in ends]),
    )


class Head:
    """Projection, decision boundaries and the memory of one restart."""

    def __init__(self, z_ND: Tensor, neighbours_NM: Tensor, *, clusters: int, seed: int, config: SclConfig) -> None:
        self.z_ND, self.neighbours_NM, self.config = z_ND, neighbours_NM, config
        self.generator = torch.Generator().manual_seed(seed)
        # The projection starts as the identity: what the backbone knows is kept, not learnt again.
        self.projection_DD = torch.eye(z_ND.shape[1], device=z_ND.device).requires_grad_()
        self.centres_KD = first_centres(z_ND, clusters, seed=seed).requires_grad_()
        self.memory_ND = z_ND.clone()
        sample_BD = z_ND[:: max(1, len(z_ND) // space.BLOCK)]
        self.mean_K = softmax(self.logits(sample_BD).detach(), dim=1).mean(dim=0)
        self.optimizer = torch.optim.Adam([self.projection_DD, self.centres_KD], lr=config.learning_rate)

    def embed(self, z_BD: Tensor) -> Tensor:
        return normalize(z_BD @ self.projection_DD.detach(), dim=1)

    def logits(self, x_BD: Tensor) -> Tensor:
        return x_BD @ normalize(self.centres_KD, dim=1).T / self.config.boundary_temperature

    def epoch(self, begin: float, end: float) -> dict[str, float]:
        """One pass over a sample of the collection; `begin` and `end` are shares of the whole training."""
        n, clusters, config = len(self.z_ND), len(self.centres_KD), self.config
        drawn = min(n, max(config.epoch_images, 64 * clusters))
        order = torch.randperm(n, generator=self.generator)[:drawn]
        batches = order.tensor_split(max(1, round(drawn / config.batch)))
        sums: dict[str, float] = {}
        for number, rows_B in enumerate(batches):
            through = begin + (end - begin) * number / len(batches)
            self.optimizer.param_groups[0]["lr"] = config.learning_rate * (1 + math.cos(math.pi * through)) / 2
            for name, value in self.step(rows_B).items():
                sums[name] = sums.get(name, 0.0) + value / len(batches)
        if drawn < n:  # images that were not drawn must not keep the memory of an older head
            for start in range(0, n, space.BLOCK):
                rows = slice(start, start + space.BLOCK)
                self.memory_ND[rows] = self.embed(self.z_ND[rows])
        return sums

    def step(self, rows_B: Tensor) -> dict[str, float]:
        """One optimisation step on these images, each with a random neighbour as its other view."""
        config, pick = self.config, self.neighbours_NM.shape[1]
        drawn_B = torch.randint(pick, (len(rows_B),), generator=self.generator).to(self.z_ND.device)
        rows_B = rows_B.to(self.z_ND.device)
        around_BM = self.neighbours_NM[rows_B]
        views_B = around_BM.gather(1, drawn_B[:, None])[:, 0]
        x_BD = normalize(self.z_ND[rows_B] @ self.projection_DD, dim=1)
        view_BD = normalize(self.z_ND[views_B] @ self.projection_DD, dim=1)
        logits_BK, view_logits_BK = self.logits(x_BD), self.logits(view_BD)

        with torch.no_grad():
            q_BK = softmax(logits_BK, dim=1)
            p_BK = self.similarity_prediction(x_BD, around_BM) if config.consistency else q_BK
            agreed_B = (p_BK * q_BK).sum(dim=1)
            target_BK = consensus_target(p_BK, q_BK, self.mean_K, power=config.balance)
            trust_B = agreed_B if config.trust else torch.ones_like(agreed_B)

        loss = (consistency(target_BK, logits_BK, trust_B) + consistency(target_BK, view_logits_BK, trust_B)) / 2
        contrasted = torch.zeros(())
        if config.contrast != "none":
            label_B = target_BK.argmax(dim=1) if config.contrast == "semantic" else None
            contrasted = contrast(x_BD, view_BD, label_B, temperature=config.contrast_temperature)
            loss = loss + config.contrast_weight * contrasted
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.optimizer.step()

        with torch.no_grad():
            mixed_BD = config.momentum * self.memory_ND[rows_B] + (1 - config.momentum) * x_BD
            self.memory_ND[rows_B] = normalize(mixed_BD, dim=1)
            self.mean_K = 0.9 * self.mean_K + 0.1 * q_BK.mean(dim=0)
        return {
            "loss": loss.item(),
            "contrast": contrasted.item(),
            "agreement": agreed_B.mean().item(),
        }

    def similarity_prediction(self, x_BD: Tensor, around_BM: Tensor) -> Tensor:
        """What the nearest images in the memory say, weighted by their similarity; shape (B, K)."""
        memory_BMD = self.memory_ND[around_BM]
        weight_BM = softmax(torch.einsum("bd,bmd->bm", x_BD, memory_BMD) / self.config.similarity_temperature, dim=1)
        votes_BMK = softmax(self.logits(memory_BMD), dim=2)
        return torch.einsum("bm,bmk->bk", weight_BM, votes_BMK)

    @torch.no_grad()
    def answer(self) -> tuple[Assignment, float]:
        """The assignment of every image, and how well the two predictions agree: the restart's score."""
        self.memory_ND = self.embed(self.z_ND)
        parts, log_agreed, mean_K = [], 0.0, torch.zeros_like(self.mean_K)
        for start in range(0, len(self.z_ND), 2048):
            rows_B = slice(start, start + 2048)
            q_BK = softmax(self.logits(self.memory_ND[rows_B]), dim=1)
            p_BK = self.similarity_prediction(self.memory_ND[rows_B], self.neighbours_NM[rows_B])
            parts.append(assign(p_BK, q_BK, rule=self.config.rule))
            log_agreed += (p_BK * q_BK).sum(dim=1).clamp_min(1e-9).log().sum().item()
            mean_K += q_BK.sum(dim=0)
        return concatenate(parts), log_agreed / len(self.z_ND) + entropy(mean_K / len(self.z_ND))


def first_centres(z_ND: Tensor, clusters: int, *, seed: int) -> Tensor:
    """The centres of k-means from one start, on a sample where the collection is large."""
    step = max(1, len(z_ND) // max(16_384, 32 * clusters))
    found = space.k_means(z_ND[::step].cpu().numpy(), clusters, rounds=100, seed=seed)
    return torch.from_numpy(found.cluster_centers_.astype(np.float32)).to(z_ND.device)


def consensus_target(p_BK: Tensor, q_BK: Tensor, mean_K: Tensor, *, power: float) -> Tensor:
    """Normalised product of both predictions; crowded clusters count less, so that none swallows the others."""
    joint_BK = p_BK * q_BK / mean_K.clamp_min(1e-6).pow(power)
    return joint_BK / joint_BK.sum(dim=1, keepdim=True).clamp_min(1e-12)


def consistency(target_BK: Tensor, logits_BK: Tensor, trust_B: Tensor) -> Tensor:
    """Cross-entropy to the consensus, mean weighted by trust.

    With `power` 0 and equal trust its gradient is that of `-log sum_k p(k) q(k)` with p held fixed.
    """
    cost_B = -(target_BK * log_softmax(logits_BK, dim=1)).sum(dim=1)
    return (trust_B * cost_B).sum() / trust_B.sum().clamp_min(1e-8)


def contrast(x_BD: Tensor, view_BD: Tensor, label_B: Tensor | None, *, temperature: float) -> Tensor:
    """InfoNCE between images and their views; only images of other clusters are pushed away.

    Without labels every other image is pushed away: instance discrimination.
    """
    similarity_BB = x_BD @ view_BD.T / temperature
    own_B = torch.arange(len(x_BD), device=x_BD.device)
    if label_B is not None:
        kin_BB = label_B[:, None] == label_B[None, :]
        kin_BB[own_B, own_B] = False
        similarity_BB = similarity_BB.masked_fill(kin_BB, -torch.inf)
    return cross_entropy(similarity_BB, own_B)


def entropy(mean_K: Tensor) -> float:
    return -(mean_K * mean_K.clamp_min(1e-9).log()).sum().item()
