"""What every method answers with, so that the caller need not know which one ran.

Letters in shapes: N images, K clusters, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from models.assign import Assignment


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A finished training."""

    assignment: Assignment
    x_ND: np.ndarray  # unit vectors in which the method measures similarity
    model: dict[str, np.ndarray]  # arrays; those with one row a cluster are named `centres`
    scores: list[float]  # of every restart that has a part in the answer, or from which it was chosen; higher is better
    restarts_agreement: float | None  # of those; None with a single one
    started: int | None = None  # restarts that training began with, where some were left behind on the way


def seed_of(seed: int, restart: int) -> int:
    """An independent seed for every restart of a run."""
    return int(np.random.SeedSequence((seed, restart)).generate_state(1)[0])


def draw(images: int, most: int, *, seed: int) -> Tensor:
    """Indices of at most `most` images, in their order, shape (S,)."""
    if images <= most:
        return torch.arange(images)
    generator = torch.Generator().manual_seed(seed_of(seed, 2**20))
    return torch.randperm(images, generator=generator)[:most].sort().values


def agreement(labels: Sequence[np.ndarray]) -> float | None:
    """How alike the restarts' groupings are: mean adjusted Rand index over their pairs, 1 for identical ones."""
    return float(likeness(labels).mean()) if len(labels) > 1 else None


def likeness(labels: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Mean adjusted Rand index of each grouping to the others, shape (R,); 0 where there is no other.

    The index of Hubert and Arabie (Journal of Classification, 1985), from sparse products that give the contingency
    tables of one grouping with all others at once: `sklearn.metrics.adjusted_rand_score` takes ten times as long.
    """
    restarts, images = len(labels), len(labels[0])
    group_RN = np.stack([np.unique(each, return_inverse=True)[1] for each in labels])
    first_R = np.concatenate([[0], np.cumsum(group_RN.max(axis=1) + 1)])
    all_NG = _members((group_RN + first_R[:-1, None]).T, int(first_R[-1]))
    own_G = np.repeat(np.arange(restarts), np.diff(first_R))
    squares_RR = np.empty((restarts, restarts))
    for restart, group_N in enumerate(group_RN):
        common = (_members(group_N[:, None], int(group_N.max()) + 1).T @ all_NG).tocoo()
        squares_RR[restart] = np.bincount(own_G[common.col], np.square(common.data), minlength=restarts)
    together_RR = (squares_RR - images) / 2  # pairs of images that both groupings put together
    together_R = together_RR.diagonal()
    chance_RR = np.outer(together_R, together_R) / max(1, images * (images - 1) / 2)
    most_RR = (together_R[:, None] + together_R[None, :]) / 2
    same_RR = most_RR == chance_RR  # one group, or nothing but single images, in both
    index_RR = np.where(same_RR, 1.0, (together_RR - chance_RR) / np.where(same_RR, 1.0, most_RR - chance_RR))
    mean_R: np.ndarray = (index_RR.sum(axis=1) - 1) / max(1, restarts - 1)
    return mean_R


def _members(group_NC: np.ndarray, groups: int) -> csr_array:
    """Which images are in which groups, as ones of shape (N, groups); each of the N images is in C of them."""
    images, each = group_NC.shape
    starts_N = np.arange(0, images * each + 1, each)
    return csr_array((np.ones(images * each), group_NC.ravel(), starts_N), shape=(images, groups))
