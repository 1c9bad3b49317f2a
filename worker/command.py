"""How the trainer is started: one process, or one for each GPU where several train one network."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.config import settings
from app.processes import launch_command

# What a run fails with, whether the trainer or its supervisor finds no room.
STORAGE_FULL = {
    "code": "storage-full",
    "detail": "The service has no room left for what this run makes; start it again when there is some.",
}
INTERNAL_ERROR = {
    "code": "internal-error",
    "detail": "The service failed at this for a reason of its own, not of your images; its log holds the details.",
}
_TRAINER = ("-m", "worker.trainer")


def trainer_command(folder: Path, parameters: Mapping[str, Any]) -> list[str]:
    """The command line that trains what `folder` specifies.

    A head trains on cached features in seconds; only a backbone is worth more than one GPU.
    """
    several = gpus() if parameters.get("train") in ("finetune", "full") else 1
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(several)]
    # It dies with us from its first moment on. The trainer itself comes to see to that only once it has loaded PyTorch,
    # some seconds in which its supervisor may be gone; torchrun never does.
    return launch_command([sys.executable, *(torchrun if several > 1 else ()), *_TRAINER, str(folder)], None)


def gpus() -> int:
    """How many CUDA devices a trainer would see, without loading what could ask them."""
    told = settings().gpus
    if told is not None:
        return told
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA sees the devices before the first that is none.
        names = [name.strip() for name in visible.split(",")]
        return next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
