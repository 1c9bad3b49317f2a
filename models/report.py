"""From the answer of a method to the grouping that the user gets, with the evidence for how far to trust it.

Letters in shapes: N images, K clusters, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

from models import hierarchy, metrics, representatives
from models.assign import by_size
from models.fit import Fit


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """The answer. Clusters are ordered by size, the largest is 0."""

    labels_N: np.ndarray  # int64
    confidence_N: np.ndarray  # float32
    runner_up_N: np.ndarray  # int64
    margin_N: np.ndarray  # float32
    consensus_N: np.ndarray  # bool
    typicality_N: np.ndarray  # float32: cosine similarity to the own cluster's centre
    representatives: list[list[int]]  # of every cluster, most typical first
    cohesion_K: np.ndarray  # mean typicality
    levels: dict[str, np.ndarray]  # `groups_3`, `groups_10`: the group of every image at a level of the merge tree
    metrics: dict[str, Any]
    model: dict[str, Any]


def describe(
    fit: Fit,
    *,
    clusters: int,
    seed: int,
    baseline: tuple[str, Fit] | None,
    frozen: Fit | None = None,
    truth: Sequence[str] | None,
) -> Grouping:
    """Clusters by size, typical images, the merge tree, and the evidence.

    `baseline` and `frozen`, what was found before the backbone learned it, stand beside the answer.
    """
    name_K = by_size(fit.assignment.labels_N, clusters)
    assignment = fit.assignment.renamed(name_K)
    labels_N = assignment.labels_N
    model: dict[str, Any] = dict(fit.model)
    model["centres"] = fit.model["centres"].take(np.argsort(name_K), axis=-2)
    centre_KD = representatives.centres(fit.x_ND, labels_N, clusters)
    typicality_N = representatives.typicality(fit.x_ND, labels_N, centre_KD)
    tree = hierarchy.tree(fit.x_ND, labels_N, seed=seed)

    def beside(other: Fit) -> dict[str, Any]:
        agreement = float(adjusted_rand_score(other.assignment.labels_N, labels_N))
        return {"agreement": agreement, **evidence_of(other, clusters, truth)}

    found = {
        **evidence_of(fit, clusters, truth),
        "baseline": None if baseline is None else {"method": baseline[0], **beside(baseline[1])},
        "frozen": None if frozen is None else beside(frozen),
        "tree": tree.to_dict(),
    }
    return Grouping(
        labels_N=labels_N,
        confidence_N=assignment.confidence_N,
        runner_up_N=assignment.runner_up_N,
        margin_N=assignment.margin_N,
        consensus_N=assignment.consensus_N,
        typicality_N=typicality_N,
        representatives=representatives.choose(fit.x_ND, labels_N, typicality_N, clusters),
        cohesion_K=representatives.cohesion(typicality_N, labels_N, clusters),
        levels=tree.columns(),
        metrics=found,
        model=model,
    )


def evidence_of(fit: Fit, clusters: int, truth: Sequence[str] | None) -> dict[str, Any]:
    labels_N = fit.assignment.labels_N
    sizes = sorted(np.bincount(labels_N, minlength=clusters).tolist(), reverse=True)
    return {
        "sizes": sizes,
        "balance": metrics.balance(sizes),
        "consensus_rate": float(fit.assignment.consensus_N.mean()),
        "restarts": {
            "count": len(fit.scores),
            "started": fit.started or len(fit.scores),
            "scores": fit.scores,
            "agreement": fit.restarts_agreement,
        },
        "warnings": metrics.warnings(sizes),
        "calibration": None if truth is None else metrics.calibration(truth, labels_N, fit.assignment.confidence_N),
        "quality": None if truth is None else metrics.quality(truth, labels_N),
    }
