"""What each part of teaching the last layers is worth: `python -m benchmarks.finetuning --data ZIP ZIP … --seeds 3`.

Every row but the first two changes one thing of `train = "finetune"`: what the views are, which images count, which
layers learn, or whose labels are taught. `head` is what SCL's heads found before, on the frozen features; the last
column is the mean ACC over the archives minus that of the whole. The same heads answer in every row, so what a row
loses is not the answer's.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
import torch
from joblib import cpu_count

from benchmarks.ablation import cell
from benchmarks.archives import Selection, frozen_features, unpack
from models import pixels
from models.config import METHODS
from models.fit import Fit
from models.full import Training
from models.metrics import quality
from models.objective import Objective, ObjectiveFactory, Strength
from models.progress import finish
from models.selflabelling import SelfLabelling, SelfLabellingConfig
from models.train import HEADS

IMAGE_SIZE = 224
EPOCHS = METHODS["scl"]["finetune"].epochs
RESTARTS = METHODS["scl"]["finetune"].restarts


@dataclass(frozen=True, kw_only=True)
class Variant:
    teacher: str = "scl"  # whose labels, and whose confidence and consensus
    view: Strength = "strong"
    trust: bool = True  # else every image counts as much
    smoothing: float = SelfLabellingConfig.smoothing
    trained_share: float = SelfLabelling.trained_share
    own_statistics: bool = SelfLabelling.own_statistics

    def objective(self, frozen: Fit, features_NF: np.ndarray) -> ObjectiveFactory:
        """Makes what is minimised, from a grouping of the frozen features and those."""
        variant = self

        class Taught(SelfLabelling):
            view_strengths = (variant.view,)
            trained_share, own_statistics = variant.trained_share, variant.own_statistics

        def make(*, feature_size: int, images: int, clusters: int, epochs: int) -> Objective:
            made = Taught(
                feature_size=feature_size,
                images=images,
                clusters=clusters,
                epochs=epochs,
                frozen=frozen,
                features_NF=features_NF,
                config=SelfLabellingConfig(smoothing=variant.smoothing),
            )
            if not variant.trust:
                made.trust_N.fill_(1)
            return made

        return make


VARIANTS = {
    "finetune": Variant(),
    "weak views": Variant(view="weak"),
    "the images as they are": Variant(view="plain"),
    "every image trusted alike": Variant(trust=False),
    "labels not smoothed": Variant(smoothing=0.0),
    "all layers": Variant(trained_share=1.0),
    "batches normalised by their own statistics": Variant(own_statistics=True),
    "k-means' labels": Variant(teacher="kmeans"),
    "TEMI's labels": Variant(teacher="temi"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetuning", description=__doc__)
    parser.add_argument(
        "--data", type=Selection.parse, nargs="+", required=True, metavar="ZIP", help="ZIP, ZIP:N or ZIP:N:skewed"
    )
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="seeds 0 to S-1; default 3")
    options = parser.parse_args(arguments)
    faiss.omp_set_num_threads(cpu_count())
    found_SD: list[list[dict[str, dict[str, float]]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [decoded(selection, Path(scratch) / str(number)) for number, selection in enumerate(options.data)]
        for seed in range(options.seeds):
            found_SD.append([])
            for selection, folder in zip(options.data, folders, strict=True):
                found_SD[-1].append(run(folder, seed, options.only))
                print(json.dumps({"data": selection.name, "seed": seed, "found": found_SD[-1][-1]}), flush=True)
    print(" | ".join(["variant", *(f"{selection.name}: ACC, NMI, ARI" for selection in options.data), "mean ACC"]))
    whole = None
    for name in ("head", *options.only):
        columns = [[found_D[number][name] for found_D in found_SD] for number in range(len(folders))]
        mean = statistics.mean(each["acc"] for column in columns for each in column)
        whole = mean if name == "finetune" else whole
        against = "" if whole is None else f" ({mean - whole:+.3f})"
        print(" | ".join([name, *map(cell, columns), f"{mean:.3f}{against}"]))


def decoded(selection: Selection, folder: Path) -> Path:
    """The folder, with features and pixels of every image in it, and the true labels."""
    sources, truth = unpack(selection, folder / "images")
    np.save(folder / "features.npy", frozen_features(sources))
    gathered = pixels.gather(sources, image_size=IMAGE_SIZE, cache_dir=None, threads=cpu_count())
    np.save(folder / "pixels.npy", finish(gathered))
    (folder / "truth.json").write_text(json.dumps(truth))
    return folder


def run(folder: Path, seed: int, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """ACC, NMI and ARI of the heads on the frozen features, and of every variant that is named."""
    torch.set_num_threads(1)  # for heads, as the service does
    truth = json.loads((folder / "truth.json").read_text())
    features_NF = np.load(folder / "features.npy")
    clusters = len(set(truth))

    def grouped(method: str) -> Fit:
        usual = METHODS[method]["head"]
        steps = HEADS[method](features_NF, clusters=clusters, epochs=usual.epochs, restarts=usual.restarts, seed=seed)
        return finish(steps)

    frozen = grouped("scl")
    found = {"head": quality(truth, frozen.assignment.labels_N)}
    for name in names:
        variant = VARIANTS[name]
        taught = frozen
        if variant.teacher != "scl":
            taught = replace(frozen, assignment=grouped(variant.teacher).assignment)
        training = Training(
            np.load(folder / "pixels.npy", mmap_mode="r"),
            objective=variant.objective(taught, features_NF),
            backbone="efficientnet_lite0",
            weights=None,
            clusters=clusters,
            epochs=EPOCHS,
            seed=seed,
        )
        torch.set_num_threads(cpu_count())
        finish(training.run())
        trained_NF = finish(training.features())
        torch.set_num_threads(1)
        steps = training.objective.answer(trained_NF, seed=seed, restarts=RESTARTS)
        found[name] = quality(truth, finish(steps).assignment.labels_N)
    return found


if __name__ == "__main__":
    main()
