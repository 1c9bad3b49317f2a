"""CUDA graphs: the kernels of a training's step, recorded once and started together ever after.

A step is a long row of small kernels, which take the processor longer to start one by one than the GPU to run
(`docs/decisions/0020-a-step-on-a-gpu-is-recorded.md` has the times).

Letters in shapes: B batch, C colours, S pixels a side.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from models.views import Draw

log = logging.getLogger(__name__)

# Steps that run kernel by kernel first: libraries choose their kernels, the optimiser makes its state.
UNRECORDED = 3
MOST_MEMORY = 0.9  # of the GPU's

# Which images, their pixels (B, S, S, C), and the choices for each of their views; losses come out.
Step = Callable[[Tensor, Tensor, Sequence[Draw]], dict[str, Tensor]]


class Recorder:
    """Records a step for every phase and every shape of batch, and replays it from then on.

    What the step changes has to stay where it is in memory; everything else that it reads has to be among what it is
    given, or be told by the phase. A step that cannot be recorded runs as it is, and the log says why.
    """

    def __init__(self) -> None:
        self.recordings: dict[Hashable, Recording] = {}
        self.steps: dict[Hashable, int] = {}
        self.possible = True
        self.pool: Any = None  # torch's handle of the memory of all recordings, of which no two run side by side

    def __call__(
        self, step: Step, phase: Hashable, rows_B: Tensor, pixels_BSSC: Tensor, choices: Sequence[Draw]
    ) -> dict[str, Tensor]:
        """Do the step; its tensors are on the GPU, but for the choices, which may come from elsewhere."""
        key = (phase, pixels_BSSC.shape)
        self.steps[key] = self.steps.get(key, 0) + 1
        if self.possible and key not in self.recordings and self.steps[key] > UNRECORDED:
            self.record(key, step, rows_B, pixels_BSSC, choices)
        if key in self.recordings:
            return self.recordings[key].replay(rows_B, pixels_BSSC, choices)
        return step(rows_B, pixels_BSSC, [choice.to(pixels_BSSC.device) for choice in choices])

    def record(self, key: Hashable, step: Step, rows_B: Tensor, pixels_BSSC: Tensor, choices: Sequence[Draw]) -> None:
        try:
            if not room(pixels_BSSC.device):
                self.possible = False
                log.info("the GPU has no memory to keep a step beside another, so kernels are started one by one")
                return
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.recordings[key] = Recording(step, rows_B, pixels_BSSC, choices, pool=self.pool)
        except Exception as error:  # noqa: BLE001  # what is the step's own fault, it raises again as it runs
            self.possible = False
            log.warning("a step cannot be recorded, so its kernels are started one by one: %s", error)


def room(device: torch.device) -> bool:
    """Whether the memory of a recorded step and that of one that is not, of another phase, fit on the GPU together."""
    return 2 * torch.cuda.max_memory_allocated(device) < MOST_MEMORY * torch.cuda.mem_get_info(device)[1]


class Recording:
    """The kernels of one step, and the memory that they read from and write to."""

    def __init__(
        self,
        step: Step,
        rows_B: Tensor,
        pixels_BSSC: Tensor,
        choices: Sequence[Draw],
        *,
        pool: Any,
    ) -> None:
        self.rows_B, self.pixels_BSSC = rows_B.clone(), pixels_BSSC.clone()
        self.choices = [choice.each(lambda value: value.to(pixels_BSSC.device, copy=True)) for choice in choices]
        self.graph = torch.cuda.CUDAGraph()
        # The thread that fetches pixels may ask for memory meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.losses = step(self.rows_B, self.pixels_BSSC, self.choices)

    def replay(self, rows_B: Tensor, pixels_BSSC: Tensor, choices: Sequence[Draw]) -> dict[str, Tensor]:
        self.rows_B.copy_(rows_B)
        self.pixels_BSSC.copy_(pixels_BSSC)
        for own, choice in zip(self.choices, choices, strict=True):
            own.copy(choice)
        self.graph.replay()
        return {name: value.clone() for name, value in self.losses.items()}
