"""What every method answers with, so that the caller need not know which one ran.

Letters in shapes: N images, K clusters, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from sklearn.metrics import adjusted_rand_score

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


def agreement(labels: Sequence[np.ndarray]) -> float | None:
    """How alike the restarts' groupings are: mean adjusted Rand index over their pairs, 1 for identical ones."""
    return float(likeness(labels).mean()) if len(labels) > 1 else None


def likeness(labels: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Mean adjusted Rand index of each grouping to the others, shape (R,); 0 where there is no other."""
    total_R = np.zeros(len(labels))
    for one, other in combinations(range(len(labels)), 2):
        alike = adjusted_rand_score(labels[one], labels[other])
        total_R[one] += alike
        total_R[other] += alike
    return total_R / max(1, len(labels) - 1)
