"""The process that trains: reads images, trains, writes artefacts. It knows no database and no queue.

    python -m worker.trainer FOLDER

FOLDER holds `specification.json` and receives `result.json`, `result.npz` and the model. Progress goes to
standard output, a JSON event a line; logs to standard error. Under torchrun the process of rank 0 speaks and writes
for all.

SIGTERM ends it. What trains a backbone first writes a checkpoint, from which the next one on the same FOLDER goes on;
a head has nothing worth keeping but its features, which are cached as they are made.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from joblib import cpu_count
from PIL import Image

from app.storage import atomic_write, is_full
from models.config import BackboneError
from models.full import Stopped
from models.train import Config, Grouping, InputError, Progress, Source, group, save_model
from worker.command import STORAGE_FULL

_PR_SET_PDEATHSIG = 1
# The ingest has refused what is too large.
Image.MAX_IMAGE_PIXELS = None
EXIT_INPUT_ERROR = 2
EXIT_STOPPED = 3
EXIT_STORAGE_FULL = 4
_LEADS = os.environ.get("RANK", "0") == "0"


def main() -> int:
    _die_with_parent()
    folder = Path(sys.argv[1])
    specification = json.loads((folder / "specification.json").read_text())
    _die_unwatched(folder / "alive", specification["lease_s"])
    try:
        _train(folder, specification)
    except InputError as error:
        code = "invalid-backbone" if isinstance(error, BackboneError) else "invalid-collection"
        _tell("error", code=code, detail=str(error))
        return EXIT_INPUT_ERROR
    except Stopped:
        _tell("stopped")
        return EXIT_STOPPED
    except OSError as error:
        if not is_full(error):
            raise
        _tell("error", **STORAGE_FULL)
        return EXIT_STORAGE_FULL
    return 0


def _die_with_parent() -> None:
    """A trainer whose supervisor is gone must not go on: another worker will claim its run and write its files."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def _die_unwatched(alive: Path, lease_s: float) -> None:
    """Nor must one whose supervisor is frozen: it touches a file for as long as it watches.

    Measured is how long the file stays as it is, so that no two clocks are compared.
    """
    if not alive.exists():
        return  # run by hand

    def watch() -> None:
        seen, since_s = alive.stat().st_mtime_ns, time.monotonic()
        while True:
            time.sleep(min(1.0, lease_s / 10))
            try:
                touched = alive.stat().st_mtime_ns
            except FileNotFoundError:  # the next attempt has cleared this one's files away
                break
            if touched != seen:
                seen, since_s = touched, time.monotonic()
            elif time.monotonic() - since_s > lease_s:
                break
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="watched", daemon=True).start()


def _train(folder: Path, specification: dict[str, Any]) -> None:
    parameters = dict(specification["parameters"])
    truth, weights = parameters.pop("truth"), parameters.pop("weights", None)
    config = Config(**parameters, weights=specification["weights"]).resolved()
    # Weights by their name, as they were asked for: where they lie is nobody's business.
    _tell("resolved", parameters={**vars(config), "weights": weights, "truth": truth})
    images = specification["images"]
    sources = [Source(key=image["key"], path=Path(image["path"])) for image in images]
    names = [PurePosixPath(image["filename"]).parent.name for image in images] if truth == "folder" else None
    threads = max(1, cpu_count() // int(os.environ.get("WORLD_SIZE", "1")))
    stop = threading.Event()
    if config.train != "head":
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    steps = group(
        config,
        sources,
        cache_dir=Path(specification["features"]),
        truth=names,
        threads=threads,
        checkpoint=Path(specification["checkpoint"]),
        checkpoint_every_s=specification["checkpoint_s"],
        stop=stop.is_set,
    )
    grouping = _follow(steps, stop)
    if not _LEADS:
        return
    save_model(grouping, config, folder)
    _save_result(grouping, folder)
    _tell(
        "provenance",
        provenance={
            "kindred": version("kindred"),
            "torch": version("torch"),
            "device": grouping.metrics["device"],
            "backbone_sha256": grouping.metrics["backbone_sha256"],
        },
    )


def _follow(steps: Generator[Progress, None, Grouping], stop: threading.Event) -> Grouping:
    """Report the steps to their end."""
    started = time.monotonic()
    first: float | None = None  # where a resumed training goes on
    while True:
        try:
            progress = next(steps)
        except StopIteration as end:
            grouping: Grouping = end.value
            return grouping
        if stop.is_set() and progress.stage != "training":  # the training itself stops with a checkpoint
            raise Stopped(f"stopped at the stage {progress.stage}")
        first = progress.fraction if first is None else first
        _tell_progress(progress, first, time.monotonic() - started)


def _tell(event: str, **values: Any) -> None:
    if not _LEADS and event != "error":
        return
    print(json.dumps({"event": event, **values}), flush=True)  # noqa: T201 - the protocol


def _tell_progress(progress: Progress, first: float, elapsed_s: float) -> None:
    done, through = progress.fraction, progress.fraction - first
    eta_s = round(elapsed_s * (1 - done) / through, 1) if through > 0.02 else None
    _tell("progress", stage=progress.stage, progress=round(min(done, 0.999), 4), eta_s=eta_s)


def _save_result(grouping: Grouping, folder: Path) -> None:
    """`result.json` last: who finds it finds the arrays too."""
    clusters = [
        {
            "size": int((grouping.labels_N == number).sum()),
            "confidence": _mean(grouping.confidence_N[grouping.labels_N == number]),
            "cohesion": float(grouping.cohesion_K[number]),
            "representatives": [int(position) for position in chosen],
        }
        for number, chosen in enumerate(grouping.representatives)
    ]
    arrays: dict[str, Any] = {
        "cluster": grouping.labels_N,
        "rank": _ranks(grouping.labels_N, grouping.typicality_N),
        "confidence": np.clip(grouping.confidence_N, 0, 1),
        "runner_up": grouping.runner_up_N,
        "margin": grouping.margin_N,
        "consensus": grouping.consensus_N,
        **grouping.levels,
    }
    with atomic_write(folder / "result.npz") as file:
        np.savez(file, **arrays)
    with atomic_write(folder / "result.json") as file:
        file.write(json.dumps({"clusters": clusters, "metrics": grouping.metrics}).encode())


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _ranks(labels_N: np.ndarray, typicality_N: np.ndarray) -> np.ndarray:
    """The place of each image in its cluster: 0 is the most typical. Shape (N,)."""
    order_N = np.lexsort((-typicality_N, labels_N))
    sorted_labels_N = labels_N[order_N]
    first_N = np.searchsorted(sorted_labels_N, sorted_labels_N, side="left")
    ranks_N = np.empty(len(labels_N), dtype=np.int64)
    ranks_N[order_N] = np.arange(len(labels_N)) - first_N
    return ranks_N


if __name__ == "__main__":
    sys.exit(main())
