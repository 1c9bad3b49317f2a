"""Usual criteria for the number of clusters, beside `clusters = auto`, which `benchmarks.auto --others` measures.

Letters in shapes: N images, D dimensions.
"""

import itertools

import numpy as np
from sklearn.cluster import HDBSCAN
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score

from models import space

NUMBERS = (*range(2, 13), 14, 16, 18, 20, 24, 28, 32)
ROUNDS = 100
NEIGHBOURS = 15


def answers(features_NF: np.ndarray, *, seed: int) -> dict[str, float]:
    """The number of clusters by every criterion."""
    x_ND = space.fit(features_NF, dimensions=96).project(features_NF).numpy()
    numbers = [number for number in NUMBERS if number <= len(x_ND) // 6]
    labels = {number: group(x_ND, number, seed=seed) for number in numbers}
    nearest_NM = space.nearest(x_ND, NEIGHBOURS)
    scores = {
        "silhouette, k-means": lambda number: silhouette_score(x_ND, labels[number]),
        "Calinski-Harabasz, k-means": lambda number: calinski_harabasz_score(x_ND, labels[number]),
        "Davies-Bouldin, k-means": lambda number: -davies_bouldin_score(x_ND, labels[number]),
        "modularity, k-means": lambda number: modularity(nearest_NM, labels[number]),
    }
    strength = {number: prediction_strength(x_ND, number, seed=seed) for number in numbers}
    found = {name: float(max(numbers, key=score)) for name, score in scores.items()}
    found["prediction strength of 0.8"] = float(max((n for n in numbers if strength[n] >= 0.8), default=1))
    found["gap statistic, k-means"] = float(gap_statistic(x_ND, labels, seed=seed))
    main_ND = space.fit(features_NF, dimensions=10).project(features_NF).numpy()
    density = HDBSCAN(min_cluster_size=5, copy=True).fit_predict(main_ND)
    found["HDBSCAN, groups of 5 or more"] = float(max(1, density.max() + 1))
    return found


def group(x_ND: np.ndarray, clusters: int, *, seed: int) -> np.ndarray:
    starts = [space.k_means(x_ND, clusters, rounds=ROUNDS, seed=seed + start) for start in range(3)]
    labels_N: np.ndarray = min(starts, key=lambda start: start.inertia_).labels_
    return labels_N


def prediction_strength(x_ND: np.ndarray, clusters: int, *, seed: int) -> float:
    """Tibshirani and Walther 2005: pairs of one half's weakest cluster that the other half's centres keep together."""
    order = np.random.default_rng(seed).permutation(len(x_ND))
    one, other = x_ND[order[::2]], x_ND[order[1::2]]
    predicted = space.k_means(one, clusters, rounds=ROUNDS, seed=seed).predict(other)
    own = group(other, clusters, seed=seed)
    strength = []
    for cluster in range(clusters):
        size_K = np.bincount(predicted[own == cluster], minlength=clusters)
        pairs = size_K.sum() * (size_K.sum() - 1)
        strength.append((size_K * (size_K - 1)).sum() / pairs if pairs else 0.0)
    return float(min(strength))


def gap_statistic(x_ND: np.ndarray, labels: dict[int, np.ndarray], *, seed: int, references: int = 3) -> int:
    """Tibshirani, Walther and Hastie 2001, with Gaussian references: the first that the next does not surpass."""
    generator = np.random.default_rng(seed)
    gap, error = {}, {}
    clouds = [generator.normal(size=x_ND.shape).astype(np.float32) * x_ND.std(axis=0) for _ in range(references)]
    clouds = [cloud / np.linalg.norm(cloud, axis=1, keepdims=True) for cloud in clouds]
    for number, label_N in labels.items():
        logs = [np.log(dispersion(cloud, group(cloud, number, seed=seed))) for cloud in clouds]
        gap[number] = np.mean(logs) - np.log(dispersion(x_ND, label_N))
        error[number] = np.std(logs) * (1 + 1 / references) ** 0.5
    numbers = list(labels)
    for number, following in itertools.pairwise(numbers):
        if gap[number] >= gap[following] - error[following]:
            return number
    return numbers[-1]


def dispersion(x_ND: np.ndarray, label_N: np.ndarray) -> float:
    return float(sum(((x_ND[label_N == k] - x_ND[label_N == k].mean(axis=0)) ** 2).sum() for k in np.unique(label_N)))


def modularity(nearest_NM: np.ndarray, label_N: np.ndarray) -> float:
    """Newman and Girvan 2004, on the graph of nearest neighbours."""
    ends = np.stack([np.repeat(label_N, nearest_NM.shape[1]), label_N[nearest_NM].ravel()])
    share_K2 = np.stack([np.bincount(end, minlength=int(label_N.max()) + 1) / ends.shape[1] for end in ends], axis=1)
    return float((ends[0] == ends[1]).mean() - (share_K2.mean(axis=1) ** 2).sum())
