"""ACC, NMI and ARI of the methods on a labelled archive: `python -m benchmarks.quality --data ZIP --seeds 3`.

Features are extracted once and shared, so that the methods differ in nothing else.
"""

import argparse
import hashlib
import statistics
import tempfile
import zipfile
from collections.abc import Generator, Sequence
from pathlib import Path

from models.config import METHODS
from models.train import Config, Grouping, Progress, Source, group


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="ZIP", help="one folder a class")
    parser.add_argument("--methods", nargs="+", default=["scl", "kmeans"], choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, metavar="S", help="seeds 0 to S-1; default 3")
    options = parser.parse_args(arguments)
    for archive in options.data:
        with tempfile.TemporaryDirectory() as scratch:
            measure(archive, options.methods, range(options.seeds), Path(scratch))


def measure(archive: Path, methods: Sequence[str], seeds: range, scratch: Path) -> None:
    sources, truth = unpack(archive, scratch / "images")
    classes = len(set(truth))
    print(f"{archive.stem}: {len(sources)} images, {classes} classes, seeds {seeds.start} to {seeds.stop - 1}")
    print(f"{'method':<8} {'ACC':>15} {'NMI':>15} {'ARI':>15} {'seconds':>8}  ACC of every seed")
    extracted_in_s = None
    for method in methods:
        found: dict[str, list[float]] = {"acc": [], "nmi": [], "ari": [], "seconds": []}
        for seed in seeds:
            config = Config(clusters=classes, method=method, seed=seed)
            grouping = finish(group(config, sources, cache_dir=scratch / "cache", truth=truth))
            if extracted_in_s is None:
                extracted_in_s = grouping.metrics["seconds"]["features"]
                print(f"features: {extracted_in_s:.1f} s, {len(sources) / extracted_in_s:.0f} images/s")
            for name, value in grouping.metrics["quality"].items():
                found[name].append(value)
            found["seconds"].append(grouping.metrics["seconds"]["training"])
        row = " ".join(f"{spread(found[name]):>15}" for name in ("acc", "nmi", "ari"))
        each = " ".join(f"{value:.3f}" for value in found["acc"])
        print(f"{method:<8} {row} {statistics.mean(found['seconds']):>8.1f}  {each}", flush=True)


def unpack(archive: Path, folder: Path) -> tuple[list[Source], list[str]]:
    """The files of an archive of our own choosing (names are ours to trust), and the folder each lies in."""
    sources, truth = [], []
    folder.mkdir()
    with zipfile.ZipFile(archive) as members:
        names = sorted(info.filename for info in members.infolist() if not info.is_dir())
        for number, name in enumerate(names):
            content = members.read(name)
            path = folder / f"{number}{Path(name).suffix}"
            path.write_bytes(content)
            sources.append(Source(key=hashlib.sha256(content).hexdigest(), path=path))
            truth.append(name.split("/", maxsplit=1)[0])
    return sources, truth


def finish(steps: Generator[Progress, None, Grouping]) -> Grouping:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Grouping = end.value
            return result


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
