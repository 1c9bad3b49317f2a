"""Contrastive Clustering: images are told apart by rows, clusters by columns of what the heads say of a batch.

After Li, Hu, Liu, Peng, Zhou and Peng, "Contrastive Clustering", AAAI 2021, with the settings of its public code
(Yunfan-Li/Contrastive-Clustering, `config/config.yaml`): heads of one hidden layer as wide as the features, 128
dimensions for images, temperatures 0.5 for images and 1 for clusters, both losses alike.

Adapted: the backbone, the views and the optimiser are the engine's; the public code trains a ResNet-34 on images of
224 pixels for 1,000 epochs by Adam at a rate of 3e-4 with batches of 256.

Letters in shapes: N images, V views, B batch, F features of the backbone, D dimensions, K clusters.
"""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softmax

from models import space
from models.baselines.pica import imbalance, with_bias
from models.baselines.simclr import nt_xent
from models.baselines.vote import BLOCK, confirm, likeliest
from models.fit import Fit
from models.limits import check_positive
from models.objective import Objective
from models.progress import Step


@dataclass(frozen=True, kw_only=True)
class CcConfig:
    """Settings of the public code."""

    dimensions: int = 128
    instance_temperature: float = 0.5
    cluster_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "dimensions", "instance_temperature", "cluster_temperature")


class Cc(Objective):
    """An instance head and a cluster head on the same features."""

    def __init__(
        self, *, feature_size: int, images: int, clusters: int, epochs: int, config: CcConfig | None = None
    ) -> None:
        super().__init__(feature_size=feature_size, images=images, clusters=clusters, epochs=epochs)
        self.config = config or CcConfig()
        self.projection = nn.Sequential(
            nn.Linear(feature_size, feature_size), nn.ReLU(), nn.Linear(feature_size, self.config.dimensions)
        )
        self.hidden = nn.Linear(feature_size, feature_size)
        self.boundaries = nn.Linear(feature_size, clusters)

    def predict(self, h_F: Tensor) -> Tensor:
        """Probabilities of the clusters: (..., F) to (..., K)."""
        return softmax(self.boundaries(self.hidden(h_F).relu()), dim=-1)

    def phase(self) -> str:
        return "always"

    def loss(self, h_VBF: Tensor, rows_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        del rows_B
        x_VBD = normalize(self.projection(h_VBF), dim=2)
        instance = nt_xent(x_VBD[0], x_VBD[1], temperature=self.config.instance_temperature)
        p_VBK = self.predict(h_VBF)
        cluster = cluster_contrast(p_VBK[0], p_VBK[1], temperature=self.config.cluster_temperature)
        uneven = imbalance(p_VBK[0]) + imbalance(p_VBK[1])
        details = {"instance": instance.detach(), "cluster": cluster.detach(), "imbalance": uneven.detach()}
        return instance + cluster + uneven, details

    @torch.no_grad()
    def answer(self, features_NF: np.ndarray, *, seed: int, restarts: int) -> Generator[Step, None, Fit]:
        """What the cluster head says; there is nothing to start again."""
        del seed, restarts
        yield Step(done=0, total=1)

        def predict(rows_B: slice) -> Tensor:
            return self.predict(self.on_device(features_NF[rows_B])).cpu()

        x_ND = self.layers(features_NF)["projection"]
        assignment = confirm(x_ND, likeliest(len(x_ND), predict), self.clusters, predict)
        return Fit(
            assignment=assignment,
            x_ND=x_ND,
            model={"hidden": with_bias(self.hidden), "centres": with_bias(self.boundaries)},
            scores=[float(assignment.confidence_N.mean())],
            restarts_agreement=None,
        )

    @torch.no_grad()
    def layers(self, features_NF: np.ndarray) -> dict[str, np.ndarray]:
        blocks = [
            self.projection(self.on_device(features_NF[start : start + BLOCK])).cpu().numpy()
            for start in range(0, len(features_NF), BLOCK)
        ]
        return {"features": space.unit(features_NF), "projection": space.unit(np.concatenate(blocks))}

    def on_device(self, features_BF: np.ndarray) -> Tensor:
        return torch.from_numpy(features_BF).to(self.hidden.weight.device)


def cluster_contrast(p_BK: Tensor, view_BK: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent over columns: a cluster's probabilities over the batch have to find those over the other views."""
    return nt_xent(normalize(p_BK.T, dim=1), normalize(view_BK.T, dim=1), temperature=temperature)
