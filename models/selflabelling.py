"""SCL from a pretrained backbone: what heads agreed on is taught to the backbone.

Heads on the frozen features (`models.heads`) infer the clusters first; their consensus, where both predictions name the
same cluster, is then what strong views of an image have to be given, and at the end heads on what the backbone has
become answer anew. Teaching a network its own confident labels on strong views is self-labelling (Van Gansbeke et al.,
"SCAN: Learning to Classify Images without Labels", ECCV 2020, third step).

Letters in shapes: N images, V views, B batch, F features of the backbone, D dimensions, K clusters.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from models import heads, space
from models.fit import Fit
from models.limits import check_positive
from models.objective import Objective, Strength
from models.progress import Step
from models.scl import boundary_logits


@dataclass(frozen=True, kw_only=True)
class SelfLabellingConfig:
    """Chosen on samples of CIFAR-10 and on photographs that no benchmark reports on (`docs/decisions/` 0022)."""

    temperature: float = 0.2
    restarts: int | None = None  # that the labels are from; set from them

    def __post_init__(self) -> None:
        check_positive(self, "temperature")


class SelfLabelling(Objective):
    """Boundaries in the space of the frozen features, and the cluster that every image is taught.

    Args:
        feature_size: F.
        images: N.
        clusters: K.
        epochs: passes over the collection.
        frozen: what heads made of the features of the backbone as it was.
        features_NF: those features.
        config: settings.

    """

    view_strengths: ClassVar[tuple[Strength, ...]] = ("strong",)
    own_statistics = False
    separable = True

    differ: Tensor
    label_N: Tensor
    trust_N: Tensor  # 1 on average
    mean_F: Tensor
    axes_FD: Tensor

    def __init__(
        self,
        *,
        feature_size: int,
        images: int,
        clusters: int,
        epochs: int,
        frozen: Fit,
        features_NF: np.ndarray,
        config: SelfLabellingConfig | None = None,
    ) -> None:
        super().__init__(feature_size=feature_size, images=images, clusters=clusters, epochs=epochs)
        self.config = replace(config or SelfLabellingConfig(), restarts=frozen.started)
        said = frozen.assignment
        self.register_buffer("differ", torch.tensor(1 - said.consensus_N.mean(), dtype=torch.float64))
        self.register_buffer("label_N", torch.from_numpy(said.labels_N).long())
        trust_N = torch.from_numpy(said.confidence_N * said.consensus_N).float()
        self.register_buffer("trust_N", trust_N / trust_N.mean().clamp_min(1e-8))
        self.register_buffer("mean_F", torch.from_numpy(frozen.model["mean"]))
        self.register_buffer("axes_FD", torch.from_numpy(frozen.model["axes"]))
        x_ND = torch.cat([self.embed(block_BF) for block_BF in space.unit_blocks(features_NF)])
        sum_KD = torch.zeros(clusters, x_ND.shape[1]).index_add_(0, self.label_N, x_ND)
        # An empty cluster, which nothing is taught to be, still needs a direction.
        empty_K1 = (torch.bincount(self.label_N, minlength=clusters) == 0).unsqueeze(1)
        self.centres_KD = nn.Parameter(normalize(torch.where(empty_K1, torch.randn_like(sum_KD), sum_KD), dim=1))

    def phase(self) -> str:
        return "always"

    def embed(self, h_BF: Tensor) -> Tensor:
        """Features in the space in which the frozen ones were compared, on the unit sphere; shape (..., D)."""
        return normalize((normalize(h_BF.float(), dim=-1) - self.mean_F) @ self.axes_FD, dim=-1)

    def loss(self, h_VBF: Tensor, rows_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of every view to its image's label, weighted by how far the heads agreed on it."""
        label_B = self.label_N[rows_B]
        logits_VBK = boundary_logits(self.embed(h_VBF), self.centres_KD, temperature=self.config.temperature)
        cost_VB = torch.stack([cross_entropy(logits_BK, label_B, reduction="none") for logits_BK in logits_VBK])
        with torch.no_grad():
            kept = (logits_VBK.argmax(dim=2) == label_B).float().mean()
        return (self.trust_N[rows_B] * cost_VB).mean(), {"kept": kept}

    def answer(self, features_NF: np.ndarray, *, seed: int, restarts: int) -> Generator[Step, None, Fit]:
        """The consensus of heads on what the features have become.

        These have learned their labels, so the two predictions differ less than they should: how sure to be is told by
        how often they differed before.
        """
        differ, device = self.differ.item(), str(self.centres_KD.device)
        return heads.train(
            features_NF, clusters=self.clusters, restarts=restarts, seed=seed, device=device, differ=differ
        )
