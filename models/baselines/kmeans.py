"""k-means on the unit features: what SCL has to beat.

Its two predictions, for the same columns as SCL: the boundary prediction is a softmax over the similarities to
the centres, the similarity prediction is the vote of the nearest neighbours' clusters. The label is k-means' own;
consensus means that the neighbours' vote names it too. Confidence is the boundary prediction of that label; where
the centres are of different lengths the nearest direction can be another cluster's, and the margin is below 0.

Letters in shapes: N images, B of them, K clusters, D feature size, M neighbours.
"""

from collections.abc import Generator

import numpy as np
import torch
from torch.nn.functional import normalize, one_hot, softmax

from models import space
from models.assign import Assignment, concatenate
from models.fit import Fit, agreement, seed_of
from models.progress import Step

NEIGHBOURS = 15
TEMPERATURE = 0.1


def train(
    features_NF: np.ndarray, *, clusters: int, epochs: int, restarts: int, seed: int, device: str = "cpu"
) -> Generator[Step, None, Fit]:
    """Lloyd's algorithm from `restarts` k-means++ starts, `epochs` rounds at most; the least inertia wins."""
    del device  # scikit-learn runs on the CPU
    x_ND = space.unit(features_NF)
    ends = []
    for restart in range(restarts):
        ends.append(space.k_means(x_ND, clusters, rounds=epochs, seed=seed_of(seed, restart)))
        details = {"restart": restart + 1.0, "inertia": float(ends[-1].inertia_) / len(x_ND)}
        yield Step(done=restart + 1, total=restarts, details=details)
    best = min(ends, key=lambda end: end.inertia_)
    centre_KD = normalize(torch.from_numpy(best.cluster_centers_).float(), dim=1)
    labels = [end.labels_.astype(np.int64) for end in ends]
    return Fit(
        assignment=confidence(x_ND, best.labels_.astype(np.int64), centre_KD),
        x_ND=x_ND,
        model={"centres": centre_KD.numpy()},
        scores=[-float(end.inertia_) / len(x_ND) for end in ends],
        restarts_agreement=agreement(labels),
    )


def confidence(x_ND: np.ndarray, labels_N: np.ndarray, centre_KD: torch.Tensor) -> Assignment:
    clusters = len(centre_KD)
    label_N = torch.from_numpy(labels_N)
    wanted = space.neighbour_count(len(x_ND), clusters, wanted=NEIGHBOURS)
    # Neighbours are looked up in the reduced space: the same ones, found many times faster.
    reduced_ND = space.fit(x_ND, dimensions=96).project(x_ND).numpy()
    neighbours_NM = torch.from_numpy(space.nearest(reduced_ND, wanted))
    parts = []
    for start in range(0, len(x_ND), 2048):
        rows_B = slice(start, start + 2048)
        label_B = label_N[rows_B]
        q_BK = softmax(torch.from_numpy(x_ND[rows_B]) @ centre_KD.T / TEMPERATURE, dim=1)
        own_B = q_BK.gather(1, label_B[:, None])[:, 0]
        rest_B, runner_up_B = q_BK.scatter(1, label_B[:, None], -1).max(dim=1)
        vote_BK = one_hot(label_N[neighbours_NM[rows_B]], clusters).sum(dim=1)
        part = Assignment(
            labels_N=label_B.numpy(),
            confidence_N=own_B.numpy(),
            runner_up_N=runner_up_B.numpy(),
            margin_N=(own_B - rest_B).numpy(),
            consensus_N=(vote_BK.argmax(dim=1) == label_B).numpy(),
        )
        parts.append(part)
    return concatenate(parts)
