"""How good a grouping is, with and without true labels.

Letters in shapes: N images, K clusters.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score


def quality(truth: Sequence[str], labels_N: np.ndarray) -> dict[str, float]:
    """ACC, NMI and ARI against true class names; labels are matched to classes, never trained on them."""
    class_N = np.unique(np.asarray(truth, dtype=str), return_inverse=True)[1]
    return {
        "acc": accuracy(class_N, labels_N),
        "nmi": float(normalized_mutual_info_score(class_N, labels_N)),
        "ari": float(adjusted_rand_score(class_N, labels_N)),
    }


def accuracy(class_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of images in the right cluster under the best one-to-one match of clusters and classes."""
    together = np.zeros((int(class_N.max()) + 1, int(labels_N.max()) + 1), np.int64)
    np.add.at(together, (class_N, labels_N), 1)
    rows, columns = linear_sum_assignment(together, maximize=True)
    return float(together[rows, columns].sum() / len(labels_N))


def balance(sizes: Sequence[int]) -> float:
    """Entropy of the cluster sizes over its maximum: 1 for equal sizes, 0 when one cluster holds everything."""
    share_K = np.asarray(sizes, np.float64) / sum(sizes)
    share_K = share_K[share_K > 0]
    return float(-(share_K * np.log(share_K)).sum() / np.log(len(sizes)))


def warnings(sizes: Sequence[int]) -> list[dict[str, str]]:
    """What a user must know before trusting the clusters."""
    found = []
    empty = sum(size == 0 for size in sizes)
    if empty:
        message = f"{empty} of {len(sizes)} clusters are empty; the collection may hold fewer groups"
        found.append({"code": "empty_clusters", "message": message})
    if balance(sizes) < 0.5:
        share = max(sizes) / sum(sizes)
        message = f"the clusters are very uneven: the largest of {len(sizes)} holds {share:.0%} of the images"
        found.append({"code": "collapse", "message": message})
    return found
