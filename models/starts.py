"""Where the clusters of SCL start: many small groups of k-means, merged until the wanted number is left.

k-means alone cuts large classes into pieces of equal size and drops small ones; merging small pieces follows the
density instead. Heads on frozen features are trained on the pieces before those are merged, `Scl` after.

Letters in shapes: N images, P pieces, K clusters, D dimensions.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage

from models import space
from models.features import cores
from models.fit import seed_of

IMAGES_PER_PIECE = 8  # at least, on average
MOST_PIECES = 2048  # every merge looks at all pairs
ROUNDS = 25  # pieces need not have settled


def piece_count(images: int, clusters: int, *, each: int) -> int:
    """`each` pieces for a cluster where images and time suffice; never fewer pieces than clusters."""
    return max(clusters, min(each * clusters, images // IMAGES_PER_PIECE, MOST_PIECES))


def pieces(x_ND: np.ndarray, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of `count` groups of k-means, float32 of shape (P, D), and their sizes; needs at least P images."""
    found = space.k_means(x_ND, count, rounds=ROUNDS, seed=seed)
    return found.cluster_centers_.astype(np.float32), np.bincount(found.labels_, minlength=count)


def centres(x_ND: np.ndarray, clusters: int, *, seed: int, each: int) -> np.ndarray:
    """The means of `clusters` groups, merged from `each` times as many pieces by Ward's criterion, of shape (K, D)."""
    centre_PD, size_P = pieces(x_ND, piece_count(len(x_ND), clusters, each=each), seed=seed)
    used_P = size_P > 0
    if used_P.sum() <= clusters:
        return centre_PD[:clusters]
    return means(centre_PD[used_P], size_P[used_P], ward(centre_PD[used_P], size_P[used_P], clusters))


def side_by_side(make: Callable[[int], np.ndarray], seeds: Sequence[int]) -> np.ndarray:
    """What is made of every seed, stacked, some at a time: each of them uses one core."""
    with space.one_core(), ThreadPoolExecutor(min(len(seeds), cores())) as pool:
        return np.stack(list(pool.map(make, seeds)))


def best_centres(x_ND: np.ndarray, clusters: int, *, seed: int, each: int = 5, tries: int = 8) -> np.ndarray:
    """Of several starts the one whose centres are nearest to the images on average; on a sample of a large memory."""
    x_SD = x_ND[:: max(1, len(x_ND) // max(16_384, 16 * clusters))]
    seeds = [seed_of(seed, number) for number in range(tries)]
    found = side_by_side(lambda own: centres(x_SD, clusters, seed=own, each=each), seeds)

    def nearness(centre_KD: np.ndarray) -> float:
        unit_KD = centre_KD / np.linalg.norm(centre_KD, axis=1, keepdims=True).clip(min=1e-12)
        return float((x_SD @ unit_KD.T).max(axis=1).mean())

    return max(found, key=nearness)


def means(centre_PD: np.ndarray, size_P: np.ndarray, group_P: np.ndarray) -> np.ndarray:
    """The mean of every group of pieces, weighted by their sizes, float32 of shape (K, D)."""
    weight_KP = (np.eye(group_P.max() + 1)[group_P].T * size_P).astype(np.float32)
    mean_KD: np.ndarray = weight_KP @ centre_PD / weight_KP.sum(axis=1, keepdims=True)
    return mean_KD


def average(centre_PD: np.ndarray, clusters: int) -> np.ndarray:
    """Average linkage (Sokal and Michener 1958) of unit centres, cut at `clusters` groups; the group of every piece."""
    group_P: np.ndarray = cut_tree(linkage(centre_PD, "average"), n_clusters=clusters)[:, 0]
    return group_P


def ward(centre_PD: np.ndarray, size_P: np.ndarray, clusters: int) -> np.ndarray:
    """Ward's tree (Ward 1963) over weighted pieces, cut at `clusters` groups; the group of every piece.

    The first merge of two pieces costs `2 a b / (a + b)` times their squared distance, for sizes a and b. Lance and
    Williams's update then needs the true sizes, which SciPy's linkage does not take, so it is written out here.
    """
    p = len(size_P)
    size_P = size_P.astype(np.float64)
    square_PP = np.square(centre_PD).sum(axis=1)
    gap_PP = (square_PP[:, None] + square_PP[None, :] - 2 * centre_PD @ centre_PD.T).clip(min=0).astype(np.float64)
    cost_PP = gap_PP * size_P[:, None] * size_P[None, :] / (size_P[:, None] + size_P[None, :])
    np.fill_diagonal(cost_PP, np.inf)
    group_P, alive_P = np.arange(p), np.ones(p, bool)
    for _ in range(p - clusters):
        a, b = sorted(np.unravel_index(cost_PP.argmin(), cost_PP.shape))
        rest = size_P
        total = size_P[a] + size_P[b] + rest
        merged = ((size_P[a] + rest) * cost_PP[a] + (size_P[b] + rest) * cost_PP[b] - rest * cost_PP[a, b]) / total
        merged[~alive_P] = np.inf
        cost_PP[a], cost_PP[:, a] = merged, merged
        cost_PP[b], cost_PP[:, b] = np.inf, np.inf
        cost_PP[a, a] = np.inf
        alive_P[b], size_P[a] = False, size_P[a] + size_P[b]
        group_P[group_P == b] = a
    return np.unique(group_P, return_inverse=True)[1]
