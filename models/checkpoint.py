"""The state of a training on disk: whole or not there, of the same run or refused, undamaged or passed over.

A checkpoint is one safetensors file with a JSON description in its header; nothing in it is ever run. The one
before it is kept beside it for the case that the newest is damaged.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.config import InputError
from models.files import write_atomically

VERSION = 1
NEWEST, PREVIOUS = "checkpoint.safetensors", "checkpoint-previous.safetensors"


class OtherRun(InputError):
    """The checkpoint is whole, but of a run with other settings or images."""


class Damaged(ValueError):
    """The file is no checkpoint, or not what was written."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Named tensors on the CPU, and plain values beside them."""

    run: Mapping[str, Any]  # what identifies the run: settings, digests
    position: Mapping[str, int]  # how far it is
    tensors: Mapping[str, Tensor]


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the newest checkpoint; at every moment at least one whole checkpoint is there, once there was one."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    about = {
        "version": VERSION,
        "run": dict(checkpoint.run),
        "position": dict(checkpoint.position),
        "sha256": digest(tensors),
    }
    content = safetensors.torch.save(tensors, {"about": json.dumps(about, sort_keys=True)})
    with suppress(FileNotFoundError):
        (folder / NEWEST).replace(folder / PREVIOUS)
    write_atomically(folder / NEWEST, lambda file: file.write(content))


def load(folder: Path, *, run: Mapping[str, Any]) -> Checkpoint | None:
    """The newest undamaged checkpoint; None where there is none.

    Raises:
        OtherRun: there is one, but of another run.

    """
    for name in (NEWEST, PREVIOUS):
        try:
            checkpoint = read(folder / name)
        except FileNotFoundError:
            continue
        except Damaged:
            # Out of the way, or the next one written would push the undamaged one out.
            (folder / name).unlink(missing_ok=True)  # another process of the training may have been first
            continue
        wanted = json.loads(json.dumps(dict(run)))
        for key in sorted({*wanted, *checkpoint.run}):
            there, here = checkpoint.run.get(key), wanted.get(key)
            if there != here:
                raise OtherRun(f"the checkpoint in {folder} is of another run: {key} is {there!r} there, {here!r} here")
        return checkpoint
    return None


def read(path: Path) -> Checkpoint:
    """What a file holds.

    Raises:
        Damaged: not a byte of it can be trusted.
        OSError: it is not there, or cannot be read now.

    """
    with path.open("rb"):  # says why it cannot be read, of which safetensors says that it is not there
        pass
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise Damaged(f"{path.name} is no checkpoint: {error}") from error
    if about.get("version") != VERSION or about.get("sha256") != digest(tensors):
        raise Damaged(f"{path.name} is not what was written")
    return Checkpoint(run=about["run"], position=about["position"], tensors=tensors)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
