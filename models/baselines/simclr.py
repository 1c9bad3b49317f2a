"""Instance discrimination, then k-means: SimCLR (Chen et al., "A Simple Framework for Contrastive Learning of Visual
Representations", ICML 2020), whose features are grouped after the training.

Letters in shapes: N images, V views, B batch, X = 2B, F features of the backbone, D of the projection.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from models import space
from models.baselines import kmeans
from models.fit import Fit
from models.limits import check_positive
from models.objective import Objective
from models.progress import Step

BLOCK = 8192


@dataclass(frozen=True, kw_only=True)
class SimclrConfig:
    """The paper's settings for CIFAR-10 (its appendix B.9) but for optimiser and crops, which are the engine's."""

    dimensions: int = 128
    temperature: float = 0.5
    layer: Literal["features", "projection"] = "features"  # which one is grouped
    rounds: int = 300  # of k-means

    def __post_init__(self) -> None:
        check_positive(self, "dimensions", "temperature", "rounds")


class Simclr(Objective):
    """Two-layer projection and NT-Xent."""

    def __init__(
        self, *, feature_size: int, images: int, clusters: int, epochs: int, config: SimclrConfig | None = None
    ) -> None:
        super().__init__(feature_size=feature_size, images=images, clusters=clusters, epochs=epochs)
        self.config = config or SimclrConfig()
        self.projection = nn.Sequential(
            nn.Linear(feature_size, feature_size),
            nn.ReLU(inplace=True),
            nn.Linear(feature_size, self.config.dimensions, bias=False),
        )

    def phase(self) -> str:
        return "always"

    def loss(self, h_VBF: Tensor, rows_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        del rows_B
        x_VBD = normalize(self.projection(h_VBF), dim=2)
        return nt_xent(x_VBD[0], x_VBD[1], temperature=self.config.temperature), {}

    def answer(self, features_NF: np.ndarray, *, seed: int, restarts: int) -> Generator[Step, None, Fit]:
        x_ND = self.layers(features_NF)[self.config.layer]
        return kmeans.train(x_ND, clusters=self.clusters, epochs=self.config.rounds, restarts=restarts, seed=seed)

    @torch.no_grad()
    def layers(self, features_NF: np.ndarray) -> dict[str, np.ndarray]:
        device = next(self.parameters()).device
        blocks = [
            self.projection(torch.from_numpy(features_NF[start : start + BLOCK]).to(device)).cpu().numpy()
            for start in range(0, len(features_NF), BLOCK)
        ]
        return {"features": space.unit(features_NF), "projection": space.unit(np.concatenate(blocks))}


def nt_xent(x_BD: Tensor, view_BD: Tensor, *, temperature: float) -> Tensor:
    """The paper's equation 1: each of the 2B unit vectors has to find its other view among all 2B - 1 others."""
    x_XD = torch.cat([x_BD, view_BD])
    similarity_XX = x_XD @ x_XD.T / temperature
    similarity_XX.fill_diagonal_(-torch.inf)
    b = len(x_BD)
    other_X = torch.arange(2 * b, device=x_XD.device).roll(b)
    return cross_entropy(similarity_XX, other_X)
