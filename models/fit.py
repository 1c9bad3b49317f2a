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
    scores: list[float]  # of every restart, higher is better; the best one's assignment is above
    restarts_agreement: float | None  # None with a single restart


def seed_of(seed: int, restart: int) -> int:
    """An independent seed for every restart of a run."""
    return int(np.random.SeedSequence((seed, restart)).generate_state(1)[0])


def agreement(labels: Sequence[np.ndarray]) -> float | None:
    """How alike the restarts' groupings are: mean adjusted Rand index over their pairs, 1 for identical ones."""
    pairs = [float(adjusted_rand_score(a, b)) for a, b in combinations(labels, 2)]
    return sum(pairs) / len(pairs) if pairs else None
