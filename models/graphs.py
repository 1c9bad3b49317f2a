"""CUDA graphs: the kernels of a training's step, recorded once and started together ever after.

A step of a small network is hundreds of kernels of some microseconds each, which take the processor longer to start
one by one than the GPU to run.

Letters in shapes: B batch, C colours, S pixels a side.
"""

import logging
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from models.views import Draw

log = logging.getLogger(__name__)

# Steps that run kernel by kernel first: libraries choose their kernels, the optimiser makes its state.
UNRECORDED = 3

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
            self.recordings[key] = Recording(step, rows_B, pixels_BSSC, choices)
        except RuntimeError as error:
            self.possible = False
            log.warning("a step cannot be recorded, so its kernels are started one by one: %s", error)


class Recording:
    """The kernels of one step, and the memory that they read from and write to."""

    def __init__(self, step: Step, rows_B: Tensor, pixels_BSSC: Tensor, choices: Sequence[Draw]) -> None:
        self.rows_B, self.pixels_BSSC = rows_B.clone(), pixels_BSSC.clone()
        self.choices = [choice.each(lambda value: value.to(pixels_BSSC.device, copy=True)) for choice in choices]
        self.graph = torch.cuda.CUDAGraph()
        # The thread that fetches pixels may ask for memory meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.losses = step(self.rows_B, self.pixels_BSSC, self.choices)

    def replay(self, rows_B: Tensor, pixels_BSSC: Tensor, choices: Sequence[Draw]) -> dict[str, Tensor]:
        self.rows_B.copy_(rows_B)
        self.pixels_BSSC.copy_(pixels_BSSC)
        for own, choice in zip(self.choices, choices, strict=True):
            own.copy(choice)
        self.graph.replay()
        return {name: value.clone() for name, value in self.losses.items()}
