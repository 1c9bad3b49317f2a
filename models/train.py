"""Group a collection of pictures: one generator that every caller drives.

    python -m models.train IMAGES_DIR --clusters K --out DIR

Letters in shapes: N images, K clusters, D dimensions.
"""

import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import safetensors.numpy
import torch
from joblib import cpu_count

from models import auto, distributed, full, heads, pixels, scl
from models.baselines import cc, kmeans, pica, scan, simclr, temi
from models.baselines import pixels as raw
from models.config import Config, InputError
from models.features import Source, UnreadableImageError, extract
from models.files import write_atomically
from models.fit import Fit
from models.images import PREPROCESSING
from models.networks import POOLING, digest
from models.objective import ObjectiveFactory
from models.progress import Clock, Progress, Step
from models.report import Grouping, describe
from models.selflabelling import SelfLabelling

__all__ = ["Config", "Grouping", "InputError", "Progress", "Source", "group", "save_model"]

Train = Callable[..., Generator[Step, None, Fit]]

HEADS: Mapping[str, Train] = {
    "scl": heads.train,
    "kmeans": kmeans.train,
    "kmeans_pixels": kmeans.train,
    "temi": temi.train,
    "scan": scan.train,
}
OBJECTIVES: Mapping[str, ObjectiveFactory] = {
    "scl": scl.Scl,
    "simclr": simclr.Simclr,
    "cc": cc.Cc,
    "pica": pica.Pica,
}
BASELINE = "kmeans"
MANY_CLUSTERS = 128


def group(
    config: Config,
    sources: Sequence[Source],
    *,
    cache_dir: Path | None = None,
    truth: Sequence[str] | None = None,
    threads: int | None = None,
    device: str | None = None,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 30.0,
    stop: Callable[[], bool] | None = None,
) -> Generator[Progress, None, Grouping]:
    """Extract features, train, choose representatives; yields its progress and returns the grouping.

    Under torchrun every process calls this alike; the answer of the first one counts.

    Args:
        config: what to do.
        sources: the pictures.
        cache_dir: where features and decoded pictures are kept between runs; None keeps none.
        truth: a class name for every picture, used only to report quality at the end.
        threads: for the pictures and the network; by default one for every core. Sets those of torch and FAISS. Starts
            and restarts are spread over all cores whatever it is (`joblib.cpu_count`, so `LOKY_MAX_CPU_COUNT`).
        device: "cpu", "cuda" or "cuda:1"; by default CUDA where there is one.
        checkpoint: folder for the state of a training of the backbone, to go on from after a kill. Another run's, or
            that of another version of the algorithm, is replaced.
        checkpoint_every_s: seconds between the checkpoints of such a training.
        stop: asked often during such a training; once true, the state is saved.

    Raises:
        InputError: the collection cannot be grouped so.
        full.Stopped: `stop` said so.

    """
    config = config.resolved()
    check_collection(config, sources, truth)
    threads = threads or cpu_count()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    clock = Clock(expected_cost_s(config, len(sources)))
    with distributed.process_group(device) as own_device:
        job = _Job(
            config,
            sources,
            cache_dir=cache_dir,
            threads=threads,
            device=own_device,
            clock=clock,
            checkpoint=checkpoint,
            checkpoint_every_s=checkpoint_every_s,
            stop=stop,
        )
        try:
            way = {"head": job.train_head, "finetune": job.finetune, "full": job.train_in_full}[config.train]
            fit, features_NF = yield from way()
        except UnreadableImageError as error:
            raise InputError(str(error)) from error
    clusters = job.clusters
    baseline = None
    if config.method != BASELINE:
        # Starts differ less the more images there are, and the baseline must not cost more than the method.
        starts = None if len(sources) <= 5000 else 3
        plain = Config(clusters=clusters, method=BASELINE, seed=config.seed, restarts=starts).resolved()
        baseline = (BASELINE, (yield from clock.follow("baseline", fit_head(plain, features_NF, device="cpu"))))

    def describing() -> Generator[Step, None, Grouping]:
        yield Step(done=0, total=1)
        described = describe(
            fit, clusters=clusters, seed=config.seed, baseline=baseline, frozen=job.frozen, truth=truth
        )
        yield Step(done=1, total=1)
        return described

    grouping = yield from clock.follow("representatives", describing())
    grouping.metrics["auto"] = job.estimate
    grouping.metrics["seconds"] = clock.seconds
    grouping.metrics["backbone_sha256"] = digest(config.backbone, config.weights)
    grouping.metrics["device"] = "cpu" if own_device == "cpu" else torch.cuda.get_device_name(own_device)
    return grouping


class _Job:
    """The stages from the pictures to the answer of the method."""

    def __init__(
        self,
        config: Config,
        sources: Sequence[Source],
        *,
        cache_dir: Path | None,
        threads: int,
        device: str,
        clock: Clock,
        checkpoint: Path | None,
        checkpoint_every_s: float,
        stop: Callable[[], bool] | None,
    ) -> None:
        self.config, self.sources, self.cache_dir = config, sources, cache_dir
        self.threads, self.device, self.clock = threads, device, clock
        self.checkpoint, self.checkpoint_every_s, self.stop = checkpoint, checkpoint_every_s, stop
        self.estimate: dict[str, Any] | None = None  # of the number of clusters
        self.clusters = cast("int", config.clusters)
        self.frozen: Fit | None = None  # what a head found before the backbone learned it

    def train_head(self) -> Generator[Progress, None, tuple[Fit, np.ndarray]]:
        """Group by a head on frozen features; the answer, and the features."""
        features_NF = yield from self.features()
        config = yield from self.settle(features_NF)
        rows_NF = features_NF
        if config.method == "kmeans_pixels":
            rows_NF = raw.rows((yield from self.clock.follow("pixels", self.pixels(raw.SIDE))))
        self.set_threads_of_heads()
        fit = yield from self.clock.follow("training", fit_head(config, rows_NF, device=self.device))
        return fit, features_NF

    def finetune(self) -> Generator[Progress, None, tuple[Fit, np.ndarray]]:
        """Group by a head on frozen features first, and teach the backbone what it found."""
        features_NF = yield from self.features()
        config = yield from self.settle(features_NF)
        self.set_threads_of_heads()
        of_head = replace(config, train="head", epochs=None).resolved()
        self.frozen = yield from self.clock.follow("heads", fit_head(of_head, features_NF, device=self.device))
        torch.set_num_threads(self.threads)
        objective = partial(SelfLabelling, frozen=self.frozen, features_NF=features_NF)
        return (yield from self.train_backbone(objective))

    def train_in_full(self) -> Generator[Progress, None, tuple[Fit, np.ndarray]]:
        """Group by a whole backbone that trains too."""
        if self.config.clusters == "auto":
            yield from self.settle((yield from self.features()))
        return (yield from self.train_backbone(OBJECTIVES[self.config.method]))

    def train_backbone(self, objective: ObjectiveFactory) -> Generator[Progress, None, tuple[Fit, np.ndarray]]:
        """Train by this objective; its answer, and the features of the trained backbone."""
        pixels_NSSC = yield from self.clock.follow("pixels", self.pixels(self.config.image_size))
        check_distinct(self.clusters, pixels_NSSC.reshape(len(pixels_NSSC), -1), "pixel by pixel")
        training = full.Training(
            pixels_NSSC,
            objective=objective,
            backbone=self.config.backbone,
            weights=self.config.weights,
            clusters=self.clusters,
            epochs=cast("int", self.config.epochs),
            seed=self.config.seed,
            device=self.device,
            checkpoint_dir=self.checkpoint,
            replace=True,
            checkpoint_every_s=self.checkpoint_every_s,
            images_digest=sha256("\n".join(source.key for source in self.sources).encode()).hexdigest(),
            stop=self.stop,
        )
        yield from self.clock.follow("training", training.run())
        features_NF = yield from self.clock.follow("encoding", training.features())
        self.set_threads_of_heads()
        steps = training.objective.answer(
            features_NF, seed=self.config.seed, restarts=cast("int", self.config.restarts)
        )
        fit = yield from self.clock.follow("answer", steps)
        # New images can only be assigned by the backbone that was trained.
        state = {f"backbone.{name}": value.cpu().numpy() for name, value in training.network.state_dict().items()}
        return replace(fit, model={**fit.model, **state}), features_NF

    def set_threads_of_heads(self) -> None:
        """Threads wait for each other longer than they compute on few clusters: ten times longer on a busy machine.

        Where torch was loaded before FAISS, which then shares its OpenMP, neighbours are looked up by as many.
        """
        torch.set_num_threads(self.threads if self.clusters > MANY_CLUSTERS else 1)

    def features(self) -> Generator[Progress, None, np.ndarray]:
        extraction = extract(
            self.sources,
            backbone=self.config.backbone,
            weights=self.config.weights,
            image_size=self.config.image_size,
            cache_dir=self.cache_dir,
            threads=self.threads,
            device=self.device,
        )
        return (yield from self.clock.follow("features", extraction, ready=True))

    def pixels(self, image_size: int) -> Generator[Step, None, np.ndarray]:
        return pixels.gather(self.sources, image_size=image_size, cache_dir=self.cache_dir, threads=self.threads)

    def settle(self, features_NF: np.ndarray) -> Generator[Progress, None, Config]:
        """Estimate the number of clusters where it was left open; the configuration with a number."""
        if not np.isfinite(features_NF).all():
            row = int(np.flatnonzero(~np.isfinite(features_NF).all(axis=1))[0])
            raise InputError(f"the features of image {self.sources[row].path.name} are not numbers (NaN or infinite)")
        if self.config.clusters == "auto":
            found = yield from self.clock.follow("auto", auto.estimate(features_NF, seed=self.config.seed))
            self.estimate, self.clusters = found.to_dict(), found.clusters
        check_distinct(self.clusters, features_NF, "for the backbone")
        return replace(self.config, clusters=self.clusters)


def check_collection(config: Config, sources: Sequence[Source], truth: Sequence[str] | None) -> None:
    if len(sources) < 2:
        raise InputError(f"{len(sources)} images cannot be grouped; at least 2 are needed")
    if config.clusters == "auto" and not config.pretrained:
        raise InputError(
            "clusters is 'auto' and weights is 'random'; a number can only be found on pretrained features"
        )
    if config.clusters != "auto" and config.clusters > len(sources):
        raise InputError(f"{config.clusters} clusters asked of {len(sources)} images; ask for fewer clusters")
    if truth is not None and len(truth) != len(sources):
        raise InputError(f"{len(truth)} true labels came with {len(sources)} images; there must be one for each")


def check_distinct(clusters: int, rows_NF: np.ndarray, how: str) -> None:
    seen: set[bytes] = set()
    for row in rows_NF:
        seen.add(sha256(row.tobytes()).digest())
        if len(seen) >= clusters:
            return
    raise InputError(
        f"{clusters} clusters asked of {len(rows_NF)} images, of which only {len(seen)} differ"
        f" {how}; ask for fewer clusters"
    )


def fit_head(config: Config, features_NF: np.ndarray, *, device: str) -> Generator[Step, None, Fit]:
    return HEADS[config.method](
        features_NF,
        clusters=config.clusters,
        epochs=config.epochs,
        restarts=config.restarts,
        seed=config.seed,
        device=device,
    )


def expected_cost_s(config: Config, images: int) -> dict[str, float]:
    """Rough seconds of every stage on two cores: they only shape the progress bar."""
    epochs, restarts = config.epochs or 1, config.restarts or 1
    clusters = 20 if config.clusters == "auto" else config.clusters
    squares = images * (config.image_size / 224) ** 2
    k_means_s = 10 * images * (0.0001 + 5e-6 * clusters)
    start_s, epoch_s = heads.costs_s(images, clusters, heads.HeadConfig())
    head_epochs = epochs if config.train == "head" else heads.EPOCHS
    head_s = images * 3e-5 + restarts / 2 * (start_s + head_epochs * 2 / 3 * epoch_s)
    encoding_s = answer_s = 0.0
    training_s = k_means_s
    if config.train != "head":
        training_s = epochs * squares * 0.05
        encoding_s = 0.1 + squares * 0.007
        answer_s = head_s if config.method == "scl" else k_means_s
    elif config.method == "scl":
        training_s = head_s
    elif config.method in ("temi", "scan"):
        training_s = epochs * restarts * max(1, min(images, max(2048, 64 * clusters)) / 256) * 0.003
    pixels_s = squares * 0.002 if config.train != "head" or config.method == "kmeans_pixels" else 0.0
    needs_features = config.train != "full" or config.clusters == "auto"
    return {
        "features": 0.1 + squares * 0.007 if needs_features else 0.0,
        "auto": 5.0 if config.clusters == "auto" else 0.0,
        "heads": head_s if config.train == "finetune" else 0.0,
        "pixels": pixels_s,
        "training": 0.1 + training_s,
        "encoding": encoding_s,
        "answer": answer_s,
        "baseline": k_means_s if config.method != BASELINE else 0.0,
        "representatives": 0.1 + images * 5e-5,
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
        "pooling": POOLING,
        "arrays": {name: list(array.shape) for name, array in arrays.items()},
    }
    weights = safetensors.numpy.save(arrays)
    write_atomically(folder / "model.safetensors", lambda file: file.write(weights))
    text = json.dumps(description, indent=2) + "\n"
    write_atomically(folder / "model.json", lambda file: file.write(text.encode()))


if __name__ == "__main__":
    from models.folder import main

    sys.exit(main())
