"""Where the clusters of SCL start: many small groups of k-means, merged until the wanted number is left.

k-means alone cuts large classes into pieces of equal size and drops small ones; merging small pieces by Ward's
criterion follows the density instead. On samples of CIFAR-10, even and skewed, heads that start so end better and
differ less (`docs/method.md` has the figures).

Letters in shapes: N images, P pieces, K clusters, D dimensions.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from joblib import cpu_count

from models import space
from models.fit import seed_of

PIECES = 5  # a cluster, on average
IMAGES_PER_PIECE = 8  # at least, on average
SEEN_PER_PIECE = 64  # on average, where a sample is looked at
MOST_PIECES = 2048  # every merge looks at all pairs
ROUNDS = 25  # pieces need not have settled


def centres(x_ND: np.ndarray, clusters: int, *, seed: int, most: int | None = None) -> np.ndarray:
    """The means of `clusters` groups of unit vectors, float32 of shape (K, D); needs at least K images.

    Args:
        x_ND: the images.
        clusters: how many means.
        seed: of the sample and of k-means.
        most: images in the random sample that is looked at, or `SEEN_PER_PIECE` for every piece if that is more; None:
            all images are.

    """
    pieces, seen = sizes(len(x_ND), clusters, most=most)
    if seen < len(x_ND):
        x_ND = x_ND[np.sort(np.random.default_rng(seed).choice(len(x_ND), seen, replace=False))]
    found = space.k_means(x_ND, pieces, rounds=ROUNDS, seed=seed)
    used_P, piece_N = np.unique(found.labels_, return_inverse=True)
    centre_PD: np.ndarray = found.cluster_centers_.astype(np.float32)
    if pieces == clusters or len(used_P) <= clusters:
        return centre_PD[:clusters]
    centre_PD, size_P = centre_PD[used_P], np.bincount(piece_N)
    group_P = merge(centre_PD, size_P, clusters)
    weight_KP = (np.eye(clusters)[group_P].T * size_P).astype(np.float32)
    merged_KD: np.ndarray = weight_KP @ centre_PD / weight_KP.sum(axis=1, keepdims=True)
    return merged_KD


def sizes(images: int, clusters: int, *, most: int | None) -> tuple[int, int]:
    """How many pieces a start merges, and how many images it looks at."""
    pieces = max(clusters, min(PIECES * clusters, images // IMAGES_PER_PIECE, MOST_PIECES))
    return pieces, images if most is None else min(images, max(most, SEEN_PER_PIECE * pieces))


def several(x_ND: np.ndarray, clusters: int, *, seeds: Sequence[int], most: int | None = None) -> np.ndarray:
    """`centres` of every seed, shape (R, K, D), some at a time: each of them uses one core."""
    with space.one_core(), ThreadPoolExecutor(min(len(seeds), cpu_count())) as pool:
        return np.stack(list(pool.map(lambda seed: centres(x_ND, clusters, seed=seed, most=most), seeds)))


def best_centres(x_ND: np.ndarray, clusters: int, *, seed: int, tries: int = 8) -> np.ndarray:
    """Of several starts the one whose centres are nearest to the images on average; on a sample of a large memory."""
    x_SD = x_ND[:: max(1, len(x_ND) // max(16_384, 16 * clusters))]
    found = several(x_SD, clusters, seeds=[seed_of(seed, number) for number in range(tries)])

    def nearness(centre_KD: np.ndarray) -> float:
        unit_KD = centre_KD / np.linalg.norm(centre_KD, axis=1, keepdims=True).clip(min=1e-12)
        return float((x_SD @ unit_KD.T).max(axis=1).mean())

    return max(found, key=nearness)


def merge(centre_PD: np.ndarray, size_P: np.ndarray, clusters: int) -> np.ndarray:
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
