"""The pictures that show what a cluster is: near its centre, and not twelve times the same.

Letters in shapes: N images, M members of a cluster, K clusters, D dimensions.
"""

import numpy as np

COUNT = 12
# Representatives come from the members nearest to the centre: this many, or a quarter if that is fewer.
CANDIDATES = 240


def centres(x_ND: np.ndarray, labels_N: np.ndarray, clusters: int) -> np.ndarray:
    """The mean direction of every cluster, shape (K, D); zero for an empty cluster."""
    centre_KD = np.zeros((clusters, x_ND.shape[1]), np.float32)
    for cluster, members_M in enumerate(members(labels_N, clusters)):
        if len(members_M):
            mean_D = x_ND[members_M].mean(axis=0)
            centre_KD[cluster] = mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)
    return centre_KD


def members(labels_N: np.ndarray, clusters: int) -> list[np.ndarray]:
    """Indices of the images of every cluster."""
    order_N = np.argsort(labels_N, kind="stable")
    ends_K = np.cumsum(np.bincount(labels_N, minlength=clusters))
    return np.split(order_N, ends_K[:-1])


def typicality(x_ND: np.ndarray, labels_N: np.ndarray, centre_KD: np.ndarray) -> np.ndarray:
    """Cosine similarity of every image to its own cluster's centre."""
    similarity_N = np.empty(len(x_ND), np.float32)
    for start in range(0, len(x_ND), 8192):
        rows = slice(start, start + 8192)
        similarity_N[rows] = np.einsum("nd,nd->n", x_ND[rows], centre_KD[labels_N[rows]])
    return similarity_N


def cohesion(typicality_N: np.ndarray, labels_N: np.ndarray, clusters: int) -> np.ndarray:
    """Mean typicality of every cluster's members; 0 for an empty cluster."""
    size_K = np.bincount(labels_N, minlength=clusters)
    total_K = np.bincount(labels_N, weights=typicality_N, minlength=clusters)
    mean_K: np.ndarray = (total_K / np.maximum(size_K, 1)).astype(np.float32)
    return mean_K


def choose(x_ND: np.ndarray, labels_N: np.ndarray, typicality_N: np.ndarray, clusters: int) -> list[list[int]]:
    """Up to `COUNT` images of every cluster, most typical first."""
    return [diverse(x_ND, members_M, typicality_N) for members_M in members(labels_N, clusters)]


def diverse(x_ND: np.ndarray, members_M: np.ndarray, typicality_N: np.ndarray) -> list[int]:
    """Maximal marginal relevance: the next is typical of the cluster and unlike those already chosen.

    Source: Carbonell and Goldstein, SIGIR 1998, with equal weights.
    """
    by_typicality_M = members_M[np.argsort(-typicality_N[members_M], kind="stable")]
    pool = by_typicality_M[: max(COUNT, min(CANDIDATES, len(members_M) // 4))]
    x_PD, typical_P = x_ND[pool], typicality_N[pool]
    chosen = [0] if len(pool) else []
    closest_P = np.full(len(pool), -np.inf, np.float32)
    while len(chosen) < min(COUNT, len(pool)):
        closest_P = np.maximum(closest_P, x_PD @ x_PD[chosen[-1]])
        gain_P = typical_P - closest_P
        gain_P[chosen] = -np.inf
        chosen.append(int(gain_P.argmax()))
    return [int(pool[position]) for position in sorted(chosen)]
