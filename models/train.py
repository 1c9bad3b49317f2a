"""Group a collection of pictures: one generator that every caller drives.

    python -m models.train IMAGES_DIR --clusters K --out DIR

Letters in shapes: N images, K clusters, D dimensions.
"""

import json
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import safetensors.numpy
import torch
from sklearn.metrics import adjusted_rand_score

from models import metrics, representatives, scl
from models.assign import by_size
from models.baselines import kmeans
from models.config import Config, InputError
from models.features import Source, UnreadableImageError, cores, extract
from models.files import write_atomically
from models.fit import Fit
from models.images import PREPROCESSING
from models.networks import digest
from models.progress import Clock, Progress, Step

__all__ = ["Config", "Grouping", "InputError", "Progress", "Source", "group", "save_model"]

METHODS = {"scl": scl.train, "kmeans": kmeans.train}
BASELINE = "kmeans"
MANY_CLUSTERS = 128


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
    metrics: dict[str, Any]
    model: dict[str, Any]


def group(
    config: Config,
    sources: Sequence[Source],
    *,
    cache_dir: Path | None = None,
    truth: Sequence[str] | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> Generator[Progress, None, Grouping]:
    """Extract features, train, choose representatives; yields its progress and returns the grouping.

    Args:
        config: what to do.
        sources: the pictures.
        cache_dir: where features are kept between runs; None keeps none.
        truth: a class name for every picture, used only to report quality at the end.
        threads: for the network and the training; by default one for every core. Sets those of torch and FAISS.
        device: "cpu", "cuda" or "cuda:1"; by default CUDA where there is one.

    Raises:
        InputError: the collection cannot be grouped so.

    """
    config = config.resolved()
    check_collection(config, sources, truth)
    threads = threads or cores()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    clock = Clock(expected_cost_s(config, len(sources)))
    extraction = extract(
        sources,
        backbone=config.backbone,
        weights=config.weights,
        image_size=config.image_size,
        cache_dir=cache_dir,
        threads=threads,
        device=device,
    )
    try:
        features_NF = yield from clock.follow("features", extraction)
    except UnreadableImageError as error:
        raise InputError(str(error)) from error
    check_distinct(config, features_NF)
    # Threads wait for each other longer than they compute on few clusters: ten times longer on a busy machine.
    torch.set_num_threads(threads if config.clusters > MANY_CLUSTERS else 1)
    fit = yield from clock.follow("training", fit_method(config, features_NF, device))
    baseline = None
    if config.method != BASELINE:
        # Starts differ less the more images there are, and the baseline must not cost more than the method.
        starts = None if len(sources) <= 5000 else 3
        plain = replace(config, method=BASELINE, epochs=None, restarts=starts).resolved()
        baseline = yield from clock.follow("baseline", fit_method(plain, features_NF, device))
    grouping = yield from clock.follow("representatives", describe(config, fit, baseline, truth=truth))
    grouping.metrics["seconds"] = clock.seconds
    grouping.metrics["backbone_sha256"] = digest(config.backbone, config.weights)
    return grouping


def check_collection(config: Config, sources: Sequence[Source], truth: Sequence[str] | None) -> None:
    if config.clusters > len(sources):
        raise InputError(f"{config.clusters} clusters asked of {len(sources)} images; ask for fewer clusters")
    if truth is not None and len(truth) != len(sources):
        raise InputError(f"{len(truth)} true labels came with {len(sources)} images; there must be one for each")


def check_distinct(config: Config, features_NF: np.ndarray) -> None:
    seen: set[bytes] = set()
    for row in features_NF:
        seen.add(row.tobytes())
        if len(seen) >= config.clusters:
            return
    raise InputError(
        f"{config.clusters} clusters asked of {len(features_NF)} images, of which only {len(seen)} differ"
        " for the backbone; ask for fewer clusters"
    )


def fit_method(config: Config, features_NF: np.ndarray, device: str) -> Generator[Step, None, Fit]:
    train: Callable[..., Generator[Step, None, Fit]] = METHODS[config.method]
    return train(
        features_NF,
        clusters=config.clusters,
        epochs=config.epochs,
        restarts=config.restarts,
        seed=config.seed,
        device=device,
    )


def describe(
    config: Config, fit: Fit, baseline: Fit | None, *, truth: Sequence[str] | None
) -> Generator[Step, None, Grouping]:
    """Clusters by size, typical images, and the evidence for how far to trust them."""
    yield Step(done=0, total=1)
    clusters = config.clusters
    name_K = by_size(fit.assignment.labels_N, clusters)
    assignment = fit.assignment.renamed(name_K)
    labels_N = assignment.labels_N
    model: dict[str, Any] = dict(fit.model)
    model["centres"] = fit.model["centres"][np.argsort(name_K)]
    centre_KD = representatives.centres(fit.x_ND, labels_N, clusters)
    typicality_N = representatives.typicality(fit.x_ND, labels_N, centre_KD)
    evidence = {**evidence_of(fit, clusters, truth), "baseline": None}
    if baseline is not None:
        evidence["baseline"] = {
            "method": BASELINE,
            "agreement": float(adjusted_rand_score(baseline.assignment.labels_N, labels_N)),
            **evidence_of(baseline, clusters, truth),
        }
    grouping = Grouping(
        labels_N=labels_N,
        confidence_N=assignment.confidence_N,
        runner_up_N=assignment.runner_up_N,
        margin_N=assignment.margin_N,
        consensus_N=assignment.consensus_N,
        typicality_N=typicality_N,
        representatives=representatives.choose(fit.x_ND, labels_N, typicality_N, clusters),
        cohesion_K=representatives.cohesion(typicality_N, labels_N, clusters),
        metrics=evidence,
        model=model,
    )
    yield Step(done=1, total=1)
    return grouping


def evidence_of(fit: Fit, clusters: int, truth: Sequence[str] | None) -> dict[str, Any]:
    labels_N = fit.assignment.labels_N
    sizes = sorted(np.bincount(labels_N, minlength=clusters).tolist(), reverse=True)
    return {
        "sizes": sizes,
        "balance": metrics.balance(sizes),
        "consensus_rate": float(fit.assignment.consensus_N.mean()),
        "restarts": {"count": len(fit.scores), "scores": fit.scores, "agreement": fit.restarts_agreement},
        "warnings": metrics.warnings(sizes),
        "quality": None if truth is None else metrics.quality(truth, labels_N),
    }


def expected_cost_s(config: Config, images: int) -> dict[str, float]:
    """Rough seconds of every stage on two cores: they only shape the progress bar."""
    epochs, restarts = config.epochs or 1, config.restarts or 1
    k_means_s = 10 * images * (0.0001 + 5e-6 * config.clusters)
    steps = max(1, min(images, max(2048, 64 * config.clusters)) / 256)
    training_s = epochs * restarts * steps * 0.004 if config.method == "scl" else k_means_s
    return {
        "features": 0.1 + images * 0.007 * (config.image_size / 224) ** 2,
        "training": 0.1 + training_s,
        "baseline": k_means_s if config.method != BASELINE else 0.0,
        "representatives": 0.1 + images * 2e-5,
    }


def save_model(grouping: Grouping, config: Config, folder: Path) -> None:
    """`model.safetensors` with the arrays, `model.json` with what they need to be used again."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in grouping.model.items()}
    description = {
        "version": 1,
        "config": asdict(config.resolved()),
        "backbone_sha256": digest(config.backbone, config.weights),
        "preprocessing": PREPROCESSING,
        "arrays": {name: list(array.shape) for name, array in arrays.items()},
    }
    weights = safetensors.numpy.save(arrays)
    write_atomically(folder / "model.safetensors", lambda file: file.write(weights))
    text = json.dumps(description, indent=2) + "\n"
    write_atomically(folder / "model.json", lambda file: file.write(text.encode()))


if __name__ == "__main__":
    from models.folder import main

    sys.exit(main())
