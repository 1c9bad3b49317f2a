"""SCAN on frozen features: linear heads that agree with their neighbours, then labels taught by confident images.

After Van Gansbeke, Vandenhende, Georgoulis, Proesmans and Van Gool, "SCAN: Learning to Classify Images without
Labels", ECCV 2020, with the settings of its public code (wvangansbeke/Unsupervised-Classification): as in its
ImageNet settings the clustering step trains 10 linear heads on a frozen backbone with 50 neighbours and entropy
weight 5, and the head and epoch of the lowest loss on the collection (a sample of it, where it is large), both terms
alike, go on. As in its CIFAR-10 settings self-labelling takes images whose likeliest cluster has more than 0.99, in
batches of 1,000 and with the clusters balanced, and lasts four times as many epochs as the clustering.

Adapted to frozen features, chosen on CIFAR-10: neighbours are those of the backbone and not of a pretext network,
features are standardised, and dropout of half of them stands in for the strong augmentations of the second step.
The optimiser is Adam at a rate of 1e-3 with batches of 128 (public: SGD at 5 with 512 for frozen features, Adam at
1e-4 with 128 for whole networks), and of ten images a cluster where that is more (public: 512 for 50 classes, 1,024 for
200), since its entropy asks for all clusters in a batch. A collection without confident images keeps the clustering
step's answer.

Letters in shapes: N images, B batch, H heads, K clusters, F features, M neighbours, S images of a sample.
"""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softmax

from models import space
from models.baselines.pairs import batches, partners
from models.baselines.vote import BLOCK, confirm, likeliest
from models.fit import Fit, agreement, seed_of
from models.limits import check_below_one, check_not_negative, check_positive
from models.progress import Step


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """Settings of the method."""

    entropy_weight: float = 5.0
    neighbours: int = 50
    threshold: float = 0.99  # of confidence, to teach
    label_batch: int = 1000
    label_epochs: int = 4  # for each epoch of clustering

    batch: int = 128  # of clustering, or `batch_each` for every cluster if that is more
    batch_each: int = 10
    least_steps: int = 15  # of clustering in an epoch, however few images there are
    learning_rate: float = 1e-3
    dropped: float = 0.5  # share of the features in self-labelling
    sample: int = 1024  # images on which the heads are compared after an epoch

    def __post_init__(self) -> None:
        check_positive(
            self,
            *("neighbours", "label_batch", "label_epochs", "batch", "batch_each"),
            *("least_steps", "learning_rate", "sample"),
        )
        check_not_negative(self, "entropy_weight")
        check_below_one(self, "threshold", "dropped")


def train(
    features_NF: np.ndarray,
    *,
    clusters: int,
    epochs: int,
    restarts: int,
    seed: int,
    device: str = "cpu",
    config: ScanConfig | None = None,
) -> Generator[Step, None, Fit]:
    """Train `restarts` heads at once for `epochs`, then the best one on its own confident labels."""
    config = config or ScanConfig()
    x_ND = space.unit(features_NF)
    wanted = space.neighbour_count(len(x_ND), clusters, wanted=config.neighbours)
    neighbours_NM = torch.from_numpy(space.nearest(x_ND, wanted, device=device)).to(device)
    table = Standardised(features_NF, device=device)
    generator = torch.Generator().manual_seed(seed_of(seed, 0))

    step = ClusteringStep(table, neighbours_NM, clusters=clusters, heads=restarts, generator=generator, config=config)
    lowest_H, best = torch.full((restarts,), torch.inf), step.head(0)
    for epoch in range(epochs):
        loss = step.epoch()
        now_H = step.compare()
        if now_H.min() < lowest_H.min():
            best = step.head(int(now_H.argmin()))
        lowest_H = torch.minimum(lowest_H, now_H)
        yield Step(done=epoch + 1, total=2 * epochs, details={"loss": loss, "best": lowest_H.min().item()})
    label_HN = likeliest(len(x_ND), lambda rows_B: step.heads.predict(table, rows_B))

    labelling = SelfLabelling(table, best, generator=generator, config=config)
    for epoch in range(epochs):
        details = labelling.epoch()
        yield Step(done=epochs + epoch + 1, total=2 * epochs, details=details)

    def predict(rows_B: slice) -> Tensor:
        return best.predict(table, rows_B)[0]

    centres_KG = torch.cat([best.weight_FC.detach().T, best.bias_C.detach()[:, None]], dim=1)
    return Fit(
        assignment=confirm(x_ND, likeliest(len(x_ND), predict), clusters, predict),
        x_ND=x_ND,
        # The last column of the centres is the bias.
        model={
            "mean": table.mean_F.cpu().numpy(),
            "std": table.std_F.cpu().numpy(),
            "centres": centres_KG.cpu().numpy(),
        },
        scores=(-lowest_H).tolist(),
        restarts_agreement=agreement(list(label_HN)),
    )


class Standardised:
    """Features of mean 0 and variance 1, computed where they are looked up: the table itself stays float16."""

    def __init__(self, features_NF: np.ndarray, *, device: str) -> None:
        self.features_NF = torch.from_numpy(features_NF).to(device)
        total_F = torch.zeros(features_NF.shape[1], dtype=torch.float64, device=device)
        square_F = torch.zeros_like(total_F)
        for block_BF in torch.split(self.features_NF, BLOCK):
            total_F += block_BF.double().sum(dim=0)
        mean_F = total_F / len(features_NF)
        for block_BF in torch.split(self.features_NF, BLOCK):
            square_F += (block_BF.double() - mean_F).square().sum(dim=0)
        self.mean_F = mean_F.float()
        # A feature that never varies stays 0.
        self.std_F = (square_F / len(features_NF)).sqrt().clamp_min(1e-4).float()

    def __len__(self) -> int:
        return len(self.features_NF)

    def __getitem__(self, rows_B: Tensor | slice) -> Tensor:
        return (self.features_NF[rows_B].float() - self.mean_F) / self.std_F


class LinearHeads:
    """H linear classifiers side by side: C = H K columns."""

    def __init__(self, weight_FC: Tensor, bias_C: Tensor, *, clusters: int) -> None:
        self.weight_FC, self.bias_C, self.clusters = weight_FC.requires_grad_(), bias_C.requires_grad_(), clusters

    def logits(self, z_BF: Tensor) -> Tensor:
        """Shape (H, B, K)."""
        return (z_BF @ self.weight_FC + self.bias_C).view(len(z_BF), -1, self.clusters).transpose(0, 1)

    @torch.no_grad()
    def predict(self, table: Standardised, rows_B: Tensor | slice) -> Tensor:
        """Probabilities of these images, shape (H, B, K), on the CPU."""
        return softmax(self.logits(table[rows_B]), dim=2).cpu()


class ClusteringStep:
    """An image and its neighbours belong to the same cluster, and all clusters are used."""

    def __init__(
        self,
        table: Standardised,
        neighbours_NM: Tensor,
        *,
        clusters: int,
        heads: int,
        generator: torch.Generator,
        config: ScanConfig,
    ) -> None:
        self.table, self.neighbours_NM, self.generator, self.config = table, neighbours_NM, generator, config
        size, device = len(table.mean_F), neighbours_NM.device
        spread = size**-0.5  # as `torch.nn.Linear` starts
        weight_FC = spread * (2 * torch.rand(size, heads * clusters, generator=generator) - 1)
        bias_C = spread * (2 * torch.rand(heads * clusters, generator=generator) - 1)
        self.heads = LinearHeads(weight_FC.to(device), bias_C.to(device), clusters=clusters)
        self.optimizer = torch.optim.Adam([self.heads.weight_FC, self.heads.bias_C], lr=config.learning_rate)
        # The heads are compared on a sample and its neighbours: U images, and where they stand among those.
        sample_S = torch.arange(0, len(table), max(1, len(table) // config.sample), device=device)
        compared_XS = torch.cat([sample_S[None], neighbours_NM[sample_S].T])
        self.needed_U, place_XS = torch.unique(compared_XS, return_inverse=True)
        self.sample_S, self.around_MS = place_XS[0].cpu(), place_XS[1:].cpu()
        self.heads_count = heads

    def epoch(self) -> float:
        """One pass over the collection, more over a small one; the mean loss of a head."""
        config, losses = self.config, []
        size = max(config.batch, config.batch_each * self.heads.clusters)
        for rows in batches(len(self.table), size, least=config.least_steps, generator=self.generator):
            rows_B = rows.to(self.neighbours_NM.device)
            pairs_B = partners(self.neighbours_NM, rows_B, generator=self.generator)
            p_HBK = softmax(self.heads.logits(self.table[rows_B]), dim=2)
            pair_HBK = softmax(self.heads.logits(self.table[pairs_B]), dim=2)
            loss_H = scan_loss(p_HBK, pair_HBK, entropy_weight=config.entropy_weight)
            self.optimizer.zero_grad()
            loss_H.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.optimizer.step()
            losses.append(loss_H.mean().item())
        return sum(losses) / len(losses)

    def compare(self) -> Tensor:
        """The loss of every head, shape (H,), over all neighbours of a sample, both terms alike."""
        losses = []
        for number in range(self.heads_count):
            head = self.head(number)
            blocks = [head.predict(self.table, rows_B)[0] for rows_B in torch.split(self.needed_U, BLOCK)]
            p_UK = torch.cat(blocks)
            p_1SK = p_UK[self.sample_S][None]
            pairs = [scan_loss(p_1SK, p_UK[pairs_S][None], entropy_weight=1.0) for pairs_S in self.around_MS]
            losses.append(torch.cat(pairs).mean())
        return torch.stack(losses)

    def head(self, number: int) -> LinearHeads:
        """A copy of one head as it is now."""
        clusters = self.heads.clusters
        columns = slice(number * clusters, (number + 1) * clusters)
        weight_FK, bias_K = self.heads.weight_FC[:, columns], self.heads.bias_C[columns]
        return LinearHeads(weight_FK.detach().clone(), bias_K.detach().clone(), clusters=clusters)


class SelfLabelling:
    """Images that the head is sure of teach it to be as sure when half of their features are missing."""

    def __init__(
        self, table: Standardised, head: LinearHeads, *, generator: torch.Generator, config: ScanConfig
    ) -> None:
        self.table, self.head, self.generator, self.config = table, head, generator, config
        self.optimizer = torch.optim.Adam([head.weight_FC, head.bias_C], lr=config.learning_rate)

    def epoch(self) -> dict[str, float]:
        """Passes over the collection that teach; the mean loss, and the share of images that taught."""
        config = self.config
        losses: list[float] = []
        confident: list[float] = []
        device = self.head.bias_C.device
        for _ in range(config.label_epochs):
            for rows in batches(len(self.table), config.label_batch, least=1, generator=self.generator):
                z_BF = self.table[rows.to(device)]
                with torch.no_grad():
                    confidence_B, label_B = softmax(self.head.logits(z_BF)[0], dim=1).max(dim=1)
                    sure_B = confidence_B > config.threshold
                    kept_BF = torch.rand(z_BF.shape, generator=self.generator).to(device) >= config.dropped
                confident.append(sure_B.float().mean().item())
                if not sure_B.any():
                    continue
                logits_BK = self.head.logits(z_BF * kept_BF / (1 - config.dropped))[0]
                loss = self_label_loss(logits_BK[sure_B], label_B[sure_B])
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                self.optimizer.step()
                losses.append(loss.item())
        return {"loss": sum(losses) / max(len(losses), 1), "confident": sum(confident) / len(confident)}


def scan_loss(p_HBK: Tensor, pair_HBK: Tensor, *, entropy_weight: float) -> Tensor:
    """Minus the log-probability that an image and its neighbour share a cluster, and minus the mean's entropy.

    Args:
        p_HBK: probabilities of the images.
        pair_HBK: those of one neighbour each.
        entropy_weight: how much an even use of the clusters counts.

    Returns:
        Shape (H,).

    """
    shared_HB = (p_HBK * pair_HBK).sum(dim=2)
    mean_HK = p_HBK.mean(dim=1).clamp_min(1e-8)
    entropy_H = -(mean_HK * mean_HK.log()).sum(dim=1)
    return -shared_HB.clamp_min(1e-8).log().mean(dim=1) - entropy_weight * entropy_H


def self_label_loss(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """Cross-entropy in which every cluster among the labels counts the same."""
    size_K = torch.bincount(label_B, minlength=logits_BK.shape[1]).float()
    return cross_entropy(logits_BK, label_B, weight=len(label_B) / size_K.clamp_min(1))
