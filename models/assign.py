"""From two predictions for every image to its cluster, and how sure that is.

Letters in shapes: N images, B of them, K clusters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Rule = Literal["consensus", "similarity", "boundary"]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One row an image."""

    labels_N: np.ndarray  # int64
    confidence_N: np.ndarray  # float32: probability of the cluster
    runner_up_N: np.ndarray  # int64: the next best cluster
    margin_N: np.ndarray  # float32: confidence minus the runner-up's
    consensus_N: np.ndarray  # bool: both predictions name the same cluster

    def renamed(self, name_K: np.ndarray) -> "Assignment":
        """The same assignment with cluster k called `name_K[k]`."""
        return Assignment(
            labels_N=name_K[self.labels_N],
            confidence_N=self.confidence_N,
            runner_up_N=name_K[self.runner_up_N],
            margin_N=self.margin_N,
            consensus_N=self.consensus_N,
        )


def assign(p_BK: Tensor, q_BK: Tensor, *, rule: Rule = "consensus", temperature: float = 1.0) -> Assignment:
    """The cluster that both predictions together make most likely.

    By consensus the probability of cluster k is in proportion to `sqrt(p(k) q(k))`, the geometric mean of both. The
    product itself would be right for two independent witnesses; these two look at the same features, and on CIFAR-10
    it was far too sure (`docs/method.md` has the calibration).

    Args:
        p_BK: by visual similarity.
        q_BK: by the decision boundaries.
        rule: which prediction decides; the other two are there for the ablation.
        temperature: of the confidence; below 1 it is surer. It moves no image to another cluster.

    """
    joint_BK = {"consensus": (p_BK * q_BK).sqrt(), "similarity": p_BK, "boundary": q_BK}[rule]
    # Two witnesses who exclude each other's clusters leave nothing: then the boundaries decide.
    joint_BK = torch.where(joint_BK.sum(dim=1, keepdim=True) > 1e-12, joint_BK, q_BK)
    joint_BK = (joint_BK / joint_BK.amax(dim=1, keepdim=True)).pow(1 / temperature)
    joint_BK = joint_BK / joint_BK.sum(dim=1, keepdim=True)
    best_B2, cluster_B2 = joint_BK.topk(2, dim=1)
    return Assignment(
        labels_N=cluster_B2[:, 0].cpu().numpy(),
        confidence_N=best_B2[:, 0].float().cpu().numpy(),
        runner_up_N=cluster_B2[:, 1].cpu().numpy(),
        margin_N=(best_B2[:, 0] - best_B2[:, 1]).float().cpu().numpy(),
        consensus_N=(p_BK.argmax(dim=1) == q_BK.argmax(dim=1)).cpu().numpy(),
    )


def calibrated_temperature(differ: float, images_each: float) -> float:
    """The temperature of the confidence in a collection, from what is known without true labels.

    Temperature scaling (Guo et al., ICML 2017) would need them. But the temperature that suits a collection rises with
    how often its two predictions differ, and heads that saw few images are too modest. The law was fitted on 54 draws
    from CIFAR-10, of 2 to 10 of its classes: `python -m benchmarks.calibration`.

    Args:
        differ: share of the images on which similarity and boundaries name different clusters.
        images_each: images that a cluster saw in an epoch, on average.

    """
    return float(0.41 * (differ + 0.005) ** 0.21 * images_each**0.27)


def concatenate(parts: Sequence[Assignment]) -> Assignment:
    return Assignment(
        labels_N=np.concatenate([part.labels_N for part in parts]),
        confidence_N=np.concatenate([part.confidence_N for part in parts]),
        runner_up_N=np.concatenate([part.runner_up_N for part in parts]),
        margin_N=np.concatenate([part.margin_N for part in parts]),
        consensus_N=np.concatenate([part.consensus_N for part in parts]),
    )


def matching(reference_N: np.ndarray, labels_N: np.ndarray, clusters: int) -> np.ndarray:
    """For each cluster of the reference the one of `labels_N` that is its partner in the best one-to-one match."""
    together_KK = np.zeros((clusters, clusters), np.int64)
    np.add.at(together_KK, (reference_N, labels_N), 1)
    partner_K: np.ndarray = linear_sum_assignment(together_KK, maximize=True)[1]
    return partner_K


def by_size(labels_N: np.ndarray, clusters: int) -> np.ndarray:
    """New names for the clusters, so that 0 is the largest; of equal ones, that of the earlier image comes first."""
    size_K = np.bincount(labels_N, minlength=clusters)
    first_K = np.full(clusters, len(labels_N))
    np.minimum.at(first_K, labels_N, np.arange(len(labels_N)))
    name_K = np.empty(clusters, np.int64)
    name_K[np.lexsort((first_K, -size_K))] = np.arange(clusters)
    return name_K
