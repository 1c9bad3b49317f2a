"""Head training on synthetic features: `python -m benchmarks.scale --rows 10000 100000 1000000`.

Rows are points around random centres, float16 and 1,280 wide as the backbone's features are. Each size runs in a
process of its own, whose peak memory is shown beside that of the features themselves.
"""

import argparse
import resource
import time
from collections.abc import Generator, Sequence

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score

from benchmarks.children import processes
from models import heads
from models.config import METHODS
from models.fit import Fit
from models.progress import Step, finish

FEATURES = 1280
BLOCK = 10_000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], metavar="N")
    parser.add_argument("--clusters", type=int, default=10, metavar="K")
    options = parser.parse_args(arguments)
    columns = f"{'before s':>9} {'epoch s':>9} {'answer s':>9} {'whole s':>8} {'µs a row':>9} {'ARI':>6}"
    print(f"{'rows':>9} {'features MiB':>13} {'peak MiB':>9} {columns}")
    for rows in options.rows:
        with processes(1) as process:
            print(process.submit(measure, rows, options.clusters).result(), flush=True)


def measure(rows: int, clusters: int) -> str:
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    centre_KF = generator.normal(size=(clusters, FEATURES)).astype(np.float32)
    group_N = generator.integers(clusters, size=rows)
    features_NF = np.empty((rows, FEATURES), np.float16)
    for start in range(0, rows, BLOCK):
        own = group_N[start : start + BLOCK]
        features_NF[start : start + BLOCK] = centre_KF[own] + 2 * generator.normal(size=(len(own), FEATURES))
    defaults = METHODS["scl"]["head"]
    steps = heads.train(features_NF, clusters=clusters, epochs=defaults.epochs, restarts=defaults.restarts, seed=0)
    reached = [time.perf_counter()]

    def timed() -> Generator[Step, None, Fit]:
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                fit: Fit = end.value
                return fit
            reached.append(time.perf_counter())
            yield step

    fit = finish(timed())
    ended = time.perf_counter()
    epoch_s = (reached[-1] - reached[1]) / max(len(reached) - 2, 1)
    whole_s = ended - reached[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ari = adjusted_rand_score(group_N, fit.assignment.labels_N)
    return (
        f"{rows:>9} {rows * FEATURES * 2 / 2**20:>13.0f} {peak:>9.0f} {reached[1] - reached[0] - epoch_s:>9.1f}"
        f" {epoch_s:>9.2f} {ended - reached[-1]:>9.1f} {whole_s:>8.1f} {whole_s / rows * 1e6:>9.1f} {ari:>6.3f}"
    )


if __name__ == "__main__":
    main()
