"""k-means on the unit features: what SCL has to beat.

Its two predictions, for the same columns as SCL: the boundary prediction is a softmax over the similarities to
the centres, the similarity prediction is the vote of the nearest neighbours' clusters. The label is k-means' own;
where the centres are of different lengths the nearest direction can be another cluster's, and the margin is below 0.

Letters in shapes: N images, B of them, K clusters, D feature size.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from joblib import cpu_count
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import Tensor
from torch.nn.functional import normalize, softmax

from models import space
from models.baselines.vote import confirm, electors
from models.fit import Fit, agreement, seed_of
from models.progress import Step

TEMPERATURE = 0.1


def train(
    features_NF: np.ndarray, *, clusters: int, epochs: int, restarts: int, seed: int, device: str = "cpu"
) -> Generator[Step, None, Fit]:
    """Lloyd's algorithm from `restarts` k-means++ starts, `epochs` rounds at most; the least inertia wins."""
    del device  # scikit-learn runs on the CPU
    x_ND = space.unit(features_NF)

    def fit(restart: int) -> KMeans | MiniBatchKMeans:
        return space.k_means(x_ND, clusters, rounds=epochs, seed=seed_of(seed, restart))

    ends = []
    with space.one_core(), ThreadPoolExecutor(min(restarts + 1, cpu_count())) as pool:
        starts = [pool.submit(fit, restart) for restart in range(restarts)]
        near = pool.submit(electors, x_ND, clusters)  # so that no core waits for the last start
        for restart, end in enumerate(start.result() for start in starts):
            ends.append(end)
            details = {"restart": restart + 1.0, "inertia": float(end.inertia_) / len(x_ND)}
            yield Step(done=restart + 1, total=restarts, details=details)
    best = min(ends, key=lambda end: end.inertia_)
    centre_KD = normalize(torch.from_numpy(best.cluster_centers_).float(), dim=1)

    def predict(rows_B: slice) -> Tensor:
        return softmax(torch.from_numpy(x_ND[rows_B]) @ centre_KD.T / TEMPERATURE, dim=1)

    labels = [end.labels_.astype(np.int64) for end in ends]
    return Fit(
        assignment=confirm(x_ND, best.labels_.astype(np.int64), clusters, predict, neighbours_NM=near.result()),
        x_ND=x_ND,
        model={"centres": centre_KD.numpy()},
        scores=[-float(end.inertia_) / len(x_ND) for end in ends],
        restarts_agreement=agreement(labels),
    )
