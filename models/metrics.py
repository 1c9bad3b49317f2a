"""How good a grouping is, with and without true labels.

Letters in shapes: N images, K clusters, J bins.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

BINS = 15


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
    return float(right(class_N, labels_N).mean())


def right(class_N: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Whether each image is in the cluster that the best one-to-one match gives to its class; bool (N,)."""
    together = np.zeros((int(class_N.max()) + 1, int(labels_N.max()) + 1), np.int64)
    np.add.at(together, (class_N, labels_N), 1)
    rows, columns = linear_sum_assignment(together, maximize=True)
    class_of = np.full(together.shape[1], -1)
    class_of[columns] = rows
    found_N: np.ndarray = class_of[labels_N] == class_N
    return found_N


def calibration(truth: Sequence[str], labels_N: np.ndarray, confidence_N: np.ndarray) -> dict[str, Any]:
    """Expected calibration error: mean distance of confidence from accuracy, in bins of equal width.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, with its 15 bins.
    """
    class_N = np.unique(np.asarray(truth, dtype=str), return_inverse=True)[1]
    right_N = right(class_N, labels_N)
    bin_N = np.minimum((confidence_N * BINS).astype(np.int64), BINS - 1)
    images_J = np.bincount(bin_N, minlength=BINS)
    confidence_J = np.bincount(bin_N, confidence_N, minlength=BINS)
    right_J = np.bincount(bin_N, right_N, minlength=BINS)
    bins = [
        {"images": int(images), "confidence": float(sure / images), "accuracy": float(correct / images)}
        for images, sure, correct in zip(images_J, confidence_J, right_J, strict=True)
        if images
    ]
    return {"ece": float(np.abs(confidence_J - right_J).sum() / len(labels_N)), "bins": bins}


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
