"""Several processes that train one network as if they were one: torchrun, gloo on CPUs, NCCL on CUDA.

The global batch is split over the processes. Each runs the backbone on its share; then the features of all
shares are gathered, with gradient, and every process computes the same loss of the whole batch and keeps the same
memory. Statistics of batch normalisation are those of the whole batch.

What a process propagates backwards is the gradient through its own share alone, times the number of processes:
`DistributedDataParallel` then averages, so that every process holds the sum, the gradient of the whole batch.

Letters in shapes: V views, B batch of one process, G of all of them, R rows of one process, F features, C channels.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did; yields the device of this one.

    Without torchrun's environment there is one process, and its device is the one given.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.startswith("cuda"):
        device = f"cuda:{int(os.environ['LOCAL_RANK'])}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(minutes=30))
    try:
        yield device
        dist.barrier()  # none leaves while another still answers
    finally:
        dist.destroy_process_group()


def replicated(network: nn.Module, *, device: str) -> nn.Module:
    """The network as every process runs it on its share; itself where there is a single process."""
    if world_size() == 1:
        return network
    network = synchronised(network, cuda=device.startswith("cuda"))
    # The running statistics are equal by construction.
    return DistributedDataParallel(network, forward_sync_buffers=False, gradient_as_bucket_view=True)


def gather(h_VBF: Tensor) -> Tensor:
    """The features of every process's share, in the order of the processes; shape (V, G, F)."""
    if world_size() == 1:
        return h_VBF
    gathered: Tensor = _Gather.apply(h_VBF)
    return gathered


@torch.no_grad()
def concatenate(own_RF: Tensor, *, rows: int) -> Tensor:
    """All `rows` rows, of which `torch.tensor_split` gave each process its own; R of this process."""
    if world_size() == 1:
        return own_RF
    room = -(-rows // world_size())
    padded_RF = torch.cat([own_RF, own_RF.new_zeros(room - len(own_RF), own_RF.shape[1])])
    shares = [torch.empty_like(padded_RF) for _ in range(world_size())]
    dist.all_gather(shares, padded_RF)
    sizes = [len(share) for share in torch.arange(rows).tensor_split(world_size())]
    return torch.cat([share_RF[:size] for share_RF, size in zip(shares, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    """Backwards it gives the gradient of the own share, scaled as the module's text says; nothing is sent."""

    @staticmethod
    def forward(_context: Any, h_VBF: Tensor) -> Tensor:
        shares = [torch.empty_like(h_VBF, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(shares, h_VBF.contiguous())
        return torch.cat(shares, dim=1)

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        share_VBF = gradients[0].chunk(world_size(), dim=1)[rank()]
        return share_VBF * world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make equal what every process computed alike, but for rounding that may differ between devices."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


@torch.no_grad()
def broadcast(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    if world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor, 0)


def anywhere(value: bool, *, device: str) -> bool:  # noqa: FBT001  # the one thing that it is about
    """Whether it is true in any process; every process gets the same answer."""
    if world_size() == 1:
        return value
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())


def synchronised(network: nn.Module, *, cuda: bool) -> nn.Module:
    """The network with batch normalisation over the batch of all processes; parameters stay the same objects."""
    if cuda:
        from timm.layers.norm_act import convert_sync_batchnorm  # noqa: PLC0415  # seconds that only GPUs pay

        # timm's knows its own layers besides torch's.
        converted: nn.Module = convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]  # timm's
        return converted
    for name, child in network.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001  # what torch's own converter asks for
            setattr(network, name, HostSyncBatchNorm(child))
        else:
            synchronised(child, cuda=False)
    return network


class HostSyncBatchNorm(nn.Module):
    """Batch normalisation over the batch of all processes (Ioffe and Szegedy 2015) on CPUs, which torch's refuses.

    Parameters and running statistics are those of the layer it stands for, under the same names.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps, self.momentum = layer.eps, layer.momentum
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("running_mean", layer.running_mean)
        self.register_buffer("running_var", layer.running_var)
        self.register_buffer("num_batches_tracked", layer.num_batches_tracked)
        # timm's layers of this kind bring what comes after them.
        self.drop, self.act = getattr(layer, "drop", None), getattr(layer, "act", None)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        others = [axis for axis in range(x.dim()) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
        if self.training or self.running_mean is None or self.running_var is None:
            # Sums in double precision, as torch's own layer keeps them on a CPU.
            count = total(torch.tensor(float(x.numel() // x.shape[1]), dtype=torch.float64))
            mean_C = (total(wide.sum(dim=others, dtype=torch.float64)) / count).to(wide.dtype)
            centred = wide - mean_C.view(shape)
            variance_C = (total(centred.square().sum(dim=others, dtype=torch.float64)) / count).to(wide.dtype)
            self.track(mean_C.detach(), variance_C.detach() * float(count / (count - 1).clamp_min(1)))
        else:
            centred, variance_C = wide - self.running_mean.view(shape), self.running_var
        y = centred * torch.rsqrt(variance_C + self.eps).view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        y = y.to(x.dtype)
        for layer in (self.drop, self.act):
            y = y if layer is None else layer(y)
        return y

    def track(self, mean_C: Tensor, variance_C: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C, share)
        self.running_var.lerp_(variance_C, share)


def total(value: Tensor) -> Tensor:
    """The sum over the processes, with gradient."""
    if world_size() == 1:
        return value
    summed: Tensor = _Total.apply(value)
    return summed


class _Total(torch.autograd.Function):
    """Every process uses the sum, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(_context: Any, value: Tensor) -> Tensor:
        summed = value.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone()
        dist.all_reduce(summed)
        return summed
