"""What each part of teaching the backbone is worth: `python -m benchmarks.finetuning --data ZIP ZIP … --seeds 3`.

Every row but the first two changes one thing of `train = "finetune"`: what the views are, which images count, which
layers learn, or whose labels are taught. `head` is what SCL's heads found before, on the frozen features; the last
column is the mean ACC over the archives minus that of the whole. The same heads answer in every row, so what a row
loses is not the answer's.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
import torch
from joblib import cpu_count

from benchmarks.ablation import heading, mean_acc, parsed, row
from benchmarks.archives import Selection, frozen_features, unpack
from models import pixels
from models.config import METHODS, Config
from models.fit import Fit
from models.full import Training
from models.metrics import quality
from models.objective import Objective, ObjectiveFactory, Strength
from models.progress import finish
from models.selflabelling import SelfLabelling
from models.train import fit_head


@dataclass(frozen=True, kw_only=True)
class Variant:
    teacher: str = "scl"  # whose labels, and whose confidence and consensus
    view: Strength = "strong"
    trust: bool = True  # else every image counts as much
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
    "the last third of the layers": Variant(trained_share=1 / 3),
    "batches normalised by their own statistics": Variant(own_statistics=True),
    "k-means' labels": Variant(teacher="kmeans"),
    "TEMI's labels": Variant(teacher="temi"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments, prog="python -m benchmarks.finetuning", description=__doc__, variants=VARIANTS)
    faiss.omp_set_num_threads(cpu_count())
    found_SD: list[list[dict[str, dict[str, float]]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = [decoded(selection, Path(scratch) / str(number)) for number, selection in enumerate(options.data)]
        for seed in range(options.seeds):
            found_SD.append([])
            for selection, folder in zip(options.data, folders, strict=True):
                found_SD[-1].append(run(folder, seed, options.only))
                print(json.dumps({"data": selection.name, "seed": seed, "found": found_SD[-1][-1]}), flush=True)
    found = {
        name: [[found_D[number][name] for found_D in found_SD] for number in range(len(folders))]
        for name in ("head", *options.only)
    }
    whole = mean_acc(found.get("finetune", found["head"]))
    print(heading(options.data))
    for name, columns in found.items():
        print(row(name, columns, whole))


def decoded(selection: Selection, folder: Path) -> Path:
    """The folder, with features and pixels of every image in it, and the true labels."""
    sources, truth = unpack(selection, folder / "images")
    np.save(folder / "features.npy", frozen_features(sources))
    gathered = pixels.gather(sources, image_size=Config.image_size, cache_dir=None, threads=cpu_count())
    np.save(folder / "pixels.npy", finish(gathered))
    (folder / "truth.json").write_text(json.dumps(truth))
    return folder


def run(folder: Path, seed: int, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """ACC, NMI and ARI of the heads on the frozen features, and of every variant that is named."""
    torch.set_num_threads(1)  # for heads, as the service does
    truth = json.loads((folder / "truth.json").read_text())
    features_NF = np.load(folder / "features.npy")
    clusters, usual = len(set(truth)), METHODS["scl"]["finetune"]

    def grouped(method: str) -> Fit:
        head = Config(clusters=clusters, method=method, seed=seed).resolved()
        return finish(fit_head(head, features_NF, device="cpu"))

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
            backbone=Config.backbone,
            weights=None,
            clusters=clusters,
            epochs=usual.epochs,
            seed=seed,
        )
        torch.set_num_threads(cpu_count())
        finish(training.run())
        trained_NF = finish(training.features())
        torch.set_num_threads(1)
        steps = training.objective.answer(trained_NF, seed=seed, restarts=usual.restarts)
        found[name] = quality(truth, finish(steps).assignment.labels_N)
    return found


if __name__ == "__main__":
    main()
