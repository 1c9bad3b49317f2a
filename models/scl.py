"""Semantic Contrastive Learning: the method, top to bottom.

After Huang and Gong, "Deep Clustering by Semantic Contrastive Learning", BMVC 2022. Its abstract gives the idea: a
cluster-aware contrastive objective, and clusters inferred on the fly where instance similarity and decision
boundaries agree. The formulas are our reconstruction; `docs/method.md` says which is which.

The terms come first, then `Scl`, which trains them with the backbone; `models.heads` trains them on frozen features.

Letters in shapes: N images, V views, B batch, X = VB, C candidates, F features of the backbone, D dimensions,
K clusters, M neighbours; `...` stands for leading dimensions or for none.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize, softmax

from models import space, starts
from models.assign import Rule
from models.fit import Fit
from models.limits import check_below_one, check_not_negative, check_positive, check_share
from models.objective import Objective
from models.progress import Step


@dataclass(frozen=True, kw_only=True)
class SclConfig:
    """Settings of the terms; each has a switch."""

    consistency: bool = True  # teach the boundaries what both predictions agree on; else only what they say
    contrast: Literal["semantic", "instance", "none"] = "semantic"
    balance: float = 0.0  # power of the mean assignment that the target is divided by; 0 lets clusters be uneven
    trust: bool = True  # weigh an image by how far its two predictions agree
    rule: Rule = "consensus"

    neighbours: int = 15
    boundary_temperature: float = 0.3
    similarity_temperature: float = 0.1
    contrast_temperature: float = 0.2
    contrast_weight: float = 0.25
    momentum: float = 0.5  # of the memory

    def __post_init__(self) -> None:
        check_positive(self, "neighbours", "boundary_temperature", "similarity_temperature", "contrast_temperature")
        check_not_negative(self, "contrast_weight")
        check_below_one(self, "momentum")


def boundary_logits(x_BD: Tensor, centres_KD: Tensor, *, temperature: float) -> Tensor:
    """Boundary prediction q before its softmax, shape (..., B, K): cosines to the centres that draw the boundaries."""
    return x_BD @ normalize(centres_KD, dim=-1).transpose(-2, -1) / temperature


def similarity_weights(x_BD: Tensor, memory_BMD: Tensor, *, temperature: float) -> Tensor:
    """How much each neighbour in the memory counts, shape (..., B, M)."""
    cosine_BM = (memory_BMD @ x_BD.unsqueeze(-1)).squeeze(-1)
    return softmax(cosine_BM / temperature, dim=-1)


def similarity_prediction(weights_BM: Tensor, memory_BMK: Tensor) -> Tensor:
    """Prediction p by visual similarity, shape (..., B, K): what the neighbours in the memory say, weighted."""
    return (weights_BM.unsqueeze(-2) @ memory_BMK).squeeze(-2)


def consensus_target(p_BK: Tensor, q_BK: Tensor, mean_K: Tensor, *, power: float) -> Tensor:
    """Normalised product of both predictions; crowded clusters count less, so that none swallows the others."""
    joint_BK = p_BK * q_BK / mean_K.clamp_min(1e-6).pow(power).unsqueeze(-2)
    return joint_BK / joint_BK.sum(dim=-1, keepdim=True).clamp_min(1e-12)


def consistency(target_BK: Tensor, logits_BK: Tensor, trust_B: Tensor) -> Tensor:
    """Cross-entropy to the consensus, mean weighted by trust.

    With `power` 0 and equal trust its gradient is that of `-log sum_k p(k) q(k)` with p held fixed.
    """
    cost_B = -(target_BK * log_softmax(logits_BK, dim=-1)).sum(dim=-1)
    return (trust_B * cost_B).sum(dim=-1) / trust_B.sum(dim=-1).clamp_min(1e-8)


def contrast(
    anchor_BD: Tensor, candidate_CD: Tensor, own_B: Tensor, kin_BC: Tensor | None, *, temperature: float
) -> Tensor:
    """InfoNCE: each anchor has to find its own candidate among those that are not its kin; shape (...).

    Args:
        anchor_BD: unit vectors.
        candidate_CD: unit vectors.
        own_B: which candidate is the anchor's other view.
        kin_BC: candidates of the anchor's cluster, which are not pushed away; None: every other image is, which is
            instance discrimination.
        temperature: of the softmax over the candidates.

    """
    similarity_BC = anchor_BD @ candidate_CD.transpose(-2, -1) / temperature
    if kin_BC is not None:
        own_BC = torch.zeros_like(kin_BC).scatter_(-1, own_B.expand(kin_BC.shape[:-1]).unsqueeze(-1), value=True)
        similarity_BC = similarity_BC.masked_fill(kin_BC & ~own_BC, -torch.inf)
    own_similarity_B = similarity_BC.gather(-1, own_B.expand(similarity_BC.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    return (similarity_BC.logsumexp(dim=-1) - own_similarity_B).mean(dim=-1)


def score(p_NK: Tensor, q_NK: Tensor) -> Tensor:
    """Known without labels: mean log agreement of the two predictions, plus entropy of the mean assignment."""
    mean_K = q_NK.mean(dim=-2)
    entropy = -(mean_K * mean_K.clamp_min(1e-9).log()).sum(dim=-1)
    return (p_NK * q_NK).sum(dim=-1).clamp_min(1e-9).log().mean(dim=-1) + entropy


@dataclass(frozen=True, kw_only=True)
class FullConfig(SclConfig):
    """Settings of the training with the backbone; the defaults were chosen on CIFAR-10 only."""

    balance: float = 0.8
    boundary_temperature: float = 0.2
    contrast_temperature: float = 0.5
    contrast_weight: float = 1.0
    dimensions: int = 128  # of the projection
    start: float = 0.5  # share of the epochs after which clusters exist; before, instances are told apart
    layer: Literal["features", "projection"] = "features"  # what the answer is made on

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "dimensions")
        check_share(self, "start")


class Scl(Objective):
    """Projection, decision boundaries and a memory of every image, trained with the backbone on two strong views."""

    memory_ND: Tensor
    neighbours_NM: Tensor
    mean_K: Tensor
    seen: tuple[Tensor, Tensor, Tensor | None]  # the step's rows, their mean views, and its mean assignment

    def __init__(
        self, *, feature_size: int, images: int, clusters: int, epochs: int, config: FullConfig | None = None
    ) -> None:
        super().__init__(feature_size=feature_size, images=images, clusters=clusters, epochs=epochs)
        self.config = config or FullConfig()
        size = self.config.dimensions
        self.projection = nn.Sequential(
            nn.Linear(feature_size, feature_size), nn.ReLU(inplace=True), nn.Linear(feature_size, size, bias=False)
        )
        self.centres_KD = nn.Parameter(normalize(torch.randn(clusters, size), dim=1))
        self.register_buffer("memory_ND", normalize(torch.randn(images, size), dim=1))
        voters = max(1, space.neighbour_count(images, clusters, wanted=self.config.neighbours))
        self.register_buffer("neighbours_NM", torch.zeros(images, voters, dtype=torch.int64))
        self.register_buffer("mean_K", torch.full((clusters,), 1 / clusters))
        self.semantic = False  # whether clusters exist yet

    @torch.no_grad()
    def begin_epoch(self, epoch: int) -> None:
        """Once clusters exist, look up every image's neighbours in the memory; the first time, start the clusters."""
        # Before the first epoch the memory is noise: no clusters are looked for in it, unless asked for.
        first = max(round(self.config.start * self.epochs), 1 if self.config.start else 0)
        self.semantic = epoch >= first
        if not self.semantic:
            return
        memory_ND = self.memory_ND.cpu().numpy()
        if epoch == first:
            found_KD = starts.best_centres(memory_ND, self.clusters, seed=0)
            self.centres_KD.copy_(normalize(torch.from_numpy(found_KD), dim=1))
            self.mean_K.copy_(softmax(self.logits(self.memory_ND), dim=1).mean(dim=0))
        voters = self.neighbours_NM.shape[1] if self.images > 1 else 0
        found_NM = space.nearest(memory_ND, min(voters, self.images - 1), device=str(self.memory_ND.device))
        self.neighbours_NM.copy_(torch.from_numpy(found_NM))

    def phase(self) -> bool:
        return self.semantic

    def logits(self, x_BD: Tensor) -> Tensor:
        return boundary_logits(x_BD, self.centres_KD, temperature=self.config.boundary_temperature)

    def loss(self, h_VBF: Tensor, rows_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Tell instances apart at first; then semantic contrast plus the consistency of both predictions."""
        config = self.config
        x_VBD = normalize(self.projection(h_VBF), dim=2)
        self.seen = (rows_B, x_VBD.detach().mean(dim=0), None)
        if not self.semantic:
            contrasted = self.contrast(x_VBD, None)
            return contrasted, {"contrast": contrasted.detach()}
        logits_VBK = self.logits(x_VBD)
        with torch.no_grad():
            q_BK = softmax(logits_VBK, dim=2).mean(dim=0)
            p_BK = self.similarity_prediction(rows_B) if config.consistency else q_BK
            agreed_B = (p_BK * q_BK).sum(dim=1)
            target_BK = consensus_target(p_BK, q_BK, self.mean_K, power=config.balance)
            trust_B = agreed_B if config.trust else torch.ones_like(agreed_B)
            self.seen = (rows_B, x_VBD.mean(dim=0), q_BK.mean(dim=0))
        taught = consistency(target_BK, logits_VBK, trust_B).mean()
        contrasted = torch.zeros_like(taught)
        if config.contrast != "none":
            label_B = target_BK.argmax(dim=1) if config.contrast == "semantic" else None
            contrasted = self.contrast(x_VBD, label_B)
        details = {"contrast": contrasted.detach(), "consistency": taught.detach(), "agreement": agreed_B.mean()}
        return taught + config.contrast_weight * contrasted, details

    def contrast(self, x_VBD: Tensor, label_B: Tensor | None) -> Tensor:
        """Each of the views has to find the other view of its image among the views of all images."""
        views, b = x_VBD.shape[:2]
        x_XD = x_VBD.flatten(0, 1)
        other_X = torch.arange(views * b, device=x_XD.device).roll(b)
        kin_XX = torch.eye(views * b, dtype=torch.bool, device=x_XD.device)
        if label_B is not None:
            label_X = label_B.repeat(views)
            kin_XX = kin_XX | (label_X[:, None] == label_X[None, :])
        return contrast(x_XD, x_XD, other_X, kin_XX, temperature=self.config.contrast_temperature)

    def similarity_prediction(self, rows_B: Tensor) -> Tensor:
        """What an image's neighbours in the memory say of it, shape (B, K)."""
        memory_BMD = self.memory_ND[self.neighbours_NM[rows_B]]
        weights_BM = similarity_weights(
            self.memory_ND[rows_B], memory_BMD, temperature=self.config.similarity_temperature
        )
        return similarity_prediction(weights_BM, softmax(self.logits(memory_BMD), dim=2))

    @torch.no_grad()
    def end_step(self) -> None:
        rows_B, x_BD, mean_K = self.seen
        momentum = self.config.momentum
        self.memory_ND[rows_B] = normalize(momentum * self.memory_ND[rows_B] + (1 - momentum) * x_BD, dim=1)
        if mean_K is not None:
            self.mean_K.mul_(0.9).add_(mean_K, alpha=0.1)

    def answer(self, features_NF: np.ndarray, *, seed: int, restarts: int) -> Generator[Step, None, Fit]:
        """The consensus of heads on the trained features: their boundaries are drawn anew, from several starts."""
        from models import heads  # noqa: PLC0415  # heads are made of the terms above

        x_ND, device = self.layers(features_NF)[self.config.layer], str(self.centres_KD.device)
        return heads.train(x_ND, clusters=self.clusters, restarts=restarts, seed=seed, device=device)

    @torch.no_grad()
    def layers(self, features_NF: np.ndarray) -> dict[str, np.ndarray]:
        device = self.centres_KD.device
        blocks = [
            self.projection(torch.from_numpy(features_NF[start : start + space.BLOCK]).to(device)).cpu().numpy()
            for start in range(0, len(features_NF), space.BLOCK)
        ]
        return {"features": space.unit(features_NF), "projection": space.unit(np.concatenate(blocks))}
