"""The optimiser of a full training: its groups, its rate, and its state in a checkpoint."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def optimiser(
    modules: Sequence[tuple[nn.Module, float]], *, kind: str, weight_decay: float, recorded_on: str | None
) -> torch.optim.Optimizer:
    """AdamW or SGD for what trains of these modules, each at its own peak rate.

    Args:
        modules: with the rate of each.
        kind: "adamw" or "sgd".
        weight_decay: of matrices and filters; biases and normalisations are not drawn to zero, as usual.
        recorded_on: the GPU that records its steps, which take the rate from its memory; None: none does.

    """
    groups = []
    for module, rate in modules:
        for decay, wanted in ((weight_decay, True), (0.0, False)):
            found = [p for p in module.parameters() if p.requires_grad and (p.dim() > 1) == wanted]
            if found:
                kept = rate if recorded_on is None else torch.tensor(rate, device=recorded_on)
                groups.append({"params": found, "lr": kept, "peak_rate": rate, "weight_decay": decay})
    if kind == "sgd":
        # The fused one wants all parameters of a group to have had a gradient, or none.
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, fused=True, capturable=recorded_on is not None)


def set_rate(optimizer: torch.optim.Optimizer, done: int, *, total: int, warmup: float) -> None:
    """The learning rates after so many of all steps."""
    for group in optimizer.param_groups:
        rate = group["peak_rate"] * schedule(done / total, warmup=warmup, total=total)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def schedule(through: float, *, warmup: float, total: int) -> float:
    """The learning rate as a share of its peak: a rising line, then half a cosine (Loshchilov and Hutter 2017)."""
    if through < warmup:
        return (through + 1 / total) / (warmup + 1 / total)
    return (1 + math.cos(math.pi * (through - warmup) / (1 - warmup))) / 2


def state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What it remembers of every parameter, by the parameter's number and the name of it."""
    remembered = optimizer.state_dict()["state"].items()
    return {f"{number}.{name}": value for number, own in remembered for name, value in own.items() if value is not None}


def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Go back to what `state` gave; moments get the memory layout of their parameter, as the optimiser made them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        number, name = key.split(".", maxsplit=1)
        like = parameters[int(number)]
        found[int(number)][name] = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
    # Fewer of them, or none, where the optimiser had not made a step.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(found)})
