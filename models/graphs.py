"""CUDA graphs: a network's kernels recorded once, and started together ever after.

A step of a small network is hundreds of kernels of some microseconds, which take the processor longer to start one by
one than the GPU to run.

Letters in shapes: B batch, C colours, S pixels a side, F features.
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


class Replayed:
    """A network in training mode: forward and backward as they were recorded for an input's shape, else as it is."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.recorded: dict[torch.Size, nn.Module] = {}

    def __call__(self, x_BCSS: Tensor) -> Tensor:
        h_BF: Tensor = self.recorded.get(x_BCSS.shape, self.network)(x_BCSS)
        return h_BF

    def record(self, shapes: Iterable[tuple[int, ...]], *, device: str, precision: torch.dtype) -> None:
        """Record the passes for inputs of these shapes, channels last; leaves weights, statistics and generators alone.

        No other thread may allocate memory of the GPU, or pinned memory, meanwhile. A network that cannot be recorded
        runs as it is.
        """
        self.network.train()
        before = {name: value.clone() for name, value in self.network.named_buffers()}
        pool = torch.cuda.graph_pool_handle()  # of one batch: two are never in work at once
        half = torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16, cache_enabled=False)
        try:
            with torch.cuda.device(device), torch.random.fork_rng(devices=[device]), half:
                for shape in shapes:
                    x_BCSS = torch.zeros(shape, device=device, dtype=next(self.network.parameters()).dtype)
                    x_BCSS = x_BCSS.contiguous(memory_format=torch.channels_last)
                    made = nn.Sequential(self.network)  # recording changes the module that it is given
                    torch.cuda.make_graphed_callables(made, (x_BCSS,), allow_unused_input=True, pool=pool)
                    self.recorded[x_BCSS.shape] = made
        except RuntimeError as error:
            self.recorded.clear()
            log.warning("the network cannot be recorded and its kernels are started one by one: %s", error)
        finally:
            for name, value in self.network.named_buffers():
                value.copy_(before[name])


class Recorded:
    """A network in evaluation mode on the GPU for inputs of one shape, as it was recorded."""

    @torch.inference_mode()
    def __init__(self, network: nn.Module, sample_BCSS: Tensor, *, precision: torch.dtype) -> None:
        self.x_BCSS = sample_BCSS.clone(memory_format=torch.channels_last)
        half = torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16, cache_enabled=False)
        with torch.cuda.device(self.x_BCSS.device), half:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                network(self.x_BCSS)  # libraries choose their kernels
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.h_BF = network(self.x_BCSS).float()

    @torch.inference_mode()
    def __call__(self, x_BCSS: Tensor) -> Tensor:
        """Features (B, F), which the next call overwrites."""
        self.x_BCSS.copy_(x_BCSS)
        self.graph.replay()
        return self.h_BF
