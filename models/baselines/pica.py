"""PICA: clusters as unlike each other as they can be, over all images of a batch.

After Huang, Gong and Zhu, "Deep Semantic Clustering by Partition Confidence Maximisation", CVPR 2020, with the
settings of its public code (Raymond-sci/PICA, `configs/base.yaml`): balance weight 2, three strongly changed copies
of every slightly changed image, linear heads that start at a deviation of 0.01, and an auxiliary head of 70 clusters
whose epochs alternate with those of the head that answers.

Adapted: the backbone, the views and the optimiser are the engine's; the public code shows the network Sobel edges
instead of colours and uses Adam at a rate of 1e-4 with batches of 256. An epoch here trains one head, there both.

Letters in shapes: N images, V views, B batch, F features of the backbone, K clusters.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, softmax

from models import space
from models.baselines.vote import confirm, likeliest
from models.fit import Fit
from models.limits import check_not_negative
from models.objective import Objective, Strength
from models.progress import Step


@dataclass(frozen=True, kw_only=True)
class PicaConfig:
    """Settings of the public code."""

    balance_weight: float = 2.0
    over_clusters: int = 70  # of the auxiliary head, or 3.5 for every cluster if that is more

    def __post_init__(self) -> None:
        check_not_negative(self, "balance_weight")
        if self.over_clusters < 2:
            raise ValueError(f"over_clusters is {self.over_clusters}; it must be at least 2")


class Pica(Objective):
    """Two linear heads on the features, trained in turns."""

    view_strengths: ClassVar[tuple[Strength, ...]] = ("weak", "strong", "strong", "strong")

    def __init__(
        self, *, feature_size: int, images: int, clusters: int, epochs: int, config: PicaConfig | None = None
    ) -> None:
        super().__init__(feature_size=feature_size, images=images, clusters=clusters, epochs=epochs)
        self.config = config or PicaConfig()
        self.head = linear(feature_size, clusters)
        self.auxiliary = linear(feature_size, max(self.config.over_clusters, math.ceil(3.5 * clusters)))
        self.epoch = 0

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def phase(self) -> bool:
        return self.trained is self.head

    @property
    def trained(self) -> nn.Linear:
        """The heads take turns, and the one that answers has the last."""
        return self.auxiliary if (self.epochs - self.epoch) % 2 == 0 else self.head

    def loss(self, h_VBF: Tensor, rows_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        del rows_B
        p_VBK = softmax(self.trained(h_VBF), dim=2)
        # Every changed copy is compared with its own image.
        image_XK = p_VBK[:1].expand(len(p_VBK) - 1, -1, -1).flatten(0, 1)
        uncertainty = partition_uncertainty(image_XK, p_VBK[1:].flatten(0, 1))
        uneven = imbalance(p_VBK[0])
        details = {"uncertainty": uncertainty.detach(), "imbalance": uneven.detach()}
        return uncertainty + self.config.balance_weight * uneven, details

    @torch.no_grad()
    def answer(self, features_NF: np.ndarray, *, seed: int, restarts: int) -> Generator[Step, None, Fit]:
        """What the head says; there is nothing to start again."""
        del seed, restarts
        yield Step(done=0, total=1)

        def predict(rows_B: slice) -> Tensor:
            h_BF = torch.from_numpy(features_NF[rows_B]).to(self.head.weight.device)
            return softmax(self.head(h_BF), dim=1).cpu()

        x_ND = space.unit(features_NF)
        assignment = confirm(x_ND, likeliest(len(x_ND), predict), self.clusters, predict)
        return Fit(
            assignment=assignment,
            x_ND=x_ND,
            model={"centres": with_bias(self.head)},
            scores=[float(assignment.confidence_N.mean())],
            restarts_agreement=None,
        )


def linear(size: int, clusters: int) -> nn.Linear:
    layer = nn.Linear(size, clusters)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def with_bias(layer: nn.Linear) -> np.ndarray:
    """Weights of shape (K, F + 1), the bias in the last column."""
    centres_KG: np.ndarray = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().cpu().numpy()
    return centres_KG


def partition_uncertainty(image_XK: Tensor, changed_XK: Tensor) -> Tensor:
    """How hard it is to tell clusters apart by who is in them.

    Row j, column k of the partition uncertainty index is the cosine of cluster j's probabilities over the images
    and cluster k's over their changed copies; the cross-entropy asks each row for its diagonal. One-hot and
    balanced predictions that agree cost `log(e + K - 1) - 1`.
    """
    index_KK = normalize(image_XK, dim=0).T @ normalize(changed_XK, dim=0)
    return cross_entropy(index_KK, torch.arange(len(index_KK), device=index_KK.device))


def imbalance(p_BK: Tensor) -> Tensor:
    """`log K` minus the entropy of the mean assignment: 0 where clusters are even, `log K` where one has all."""
    mean_K = p_BK.mean(dim=0).clamp_min(1e-12)
    return math.log(len(mean_K)) + (mean_K * mean_K.log()).sum()
