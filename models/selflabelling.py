"""SCL from a pretrained backbone: what heads agreed on is taught to the backbone's last layers.

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
from torch.nn.functional import normalize, one_hot

from models import heads, space
from models.fit import Fit
from models.limits import check_below_one, check_positive
from models.objective import Objective, Strength
from models.progress import Step
from models.scl import boundary_logits, consistency


@dataclass(frozen=True, kw_only=True)
class SelfLabellingConfig:
    """Chosen on samples of CIFAR-10 and on photographs that no benchmark reports on (`docs/decisions/` 0022)."""

    temperature: float = 0.2
    smoothing: float = 0.1  # of the labels (Szegedy et al., CVPR 2016)
    restarts: int | None = None  # that the labels are from; set from them

    def __post_init__(self) -> None:
        check_positive(self, "temperature")
        check_below_one(self, "smoothing")


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
    # The first layers see edges and colours, whatever the collection is of.
    trained_share = 1 / 3
    own_statistics = False

    differ: Tensor
    label_N: Tensor
    trust_N: Tensor
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
        self.register_buffer("trust_N", torch.from_numpy(said.confidence_N * said.consensus_N).float())
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
        smoothing = self.config.smoothing
        target_BK = one_hot(self.label_N[rows_B], self.clusters) * (1 - smoothing) + smoothing / self.clusters
        logits_VBK = boundary_logits(self.embed(h_VBF), self.centres_KD, temperature=self.config.temperature)
        with torch.no_grad():
            kept = (logits_VBK.argmax(dim=2) == self.label_N[rows_B]).float().mean()
        return consistency(target_BK, logits_VBK, self.trust_N[rows_B]).mean(), {"kept": kept}

    def answer(self, features_NF: np.ndarray, *, seed: int, restarts: int) -> Generator[Step, None, Fit]:
        """The consensus of heads on what the features have become.

        These have learned their labels, so the two predictions differ less than they should: how sure to be is told by
        how often they differed before.
        """
        differ, device = self.differ.item(), str(self.centres_KD.device)
        return heads.train(
            features_NF, clusters=self.clusters, restarts=restarts, seed=seed, device=device, differ=differ
        )
