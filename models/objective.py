"""What `full` training minimises: one interface for SCL and for every baseline whose backbone trains too.

The engine (`models.full`) owns the backbone, the views, the optimiser and the checkpoint; an objective owns its
heads, its memory and the loss. Letters in shapes: N images, V views, B batch, F features of the backbone,
D dimensions, K clusters.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Hashable
from typing import ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor, nn

from models import space
from models.fit import Fit
from models.progress import Step

# How far a view is from its image: "strong" as SimCLR's, "weak" a slight crop and a flip, "plain" the image itself.
Strength = Literal["strong", "weak", "plain"]


class Objective(nn.Module, ABC):
    """A loss on the backbone's features of several views, and the grouping that it leads to.

    Parameters are optimised together with the backbone's. What has to survive a kill is a parameter or a buffer
    of fixed shape and is in the checkpoint; buffers registered with `persistent=False` are not. On resuming,
    `begin_epoch` is called on a new object first and the saved state is loaded after, so whatever else
    `begin_epoch` sets must depend on the epoch alone.

    Everything here sees the whole batch, also where several processes share it: each of them then computes the
    same loss and keeps the same memory. Random numbers come from torch's global generator, which the engine
    seeds alike in all processes and keeps in the checkpoint.
    """

    # One entry a view, so that V is its length.
    view_strengths: ClassVar[tuple[Strength, ...]] = ("strong", "strong")
    # Of the backbone's layers the last ones that train; and whether batches are normalised by statistics of their own,
    # or, with every dropout at rest, by those that the weights came with.
    trained_share: ClassVar[float] = 1.0
    own_statistics: ClassVar[bool] = True
    # The loss of a batch is the mean of its images' own, and so are the other scalars: it may be computed in pieces.
    separable: ClassVar[bool] = False

    def __init__(self, *, feature_size: int, images: int, clusters: int, epochs: int) -> None:
        super().__init__()
        self.feature_size, self.images, self.clusters, self.epochs = feature_size, images, clusters, epochs

    def begin_epoch(self, epoch: int) -> None:
        """Set schedules, or look at the whole memory, before the first step of `epoch` (from 0)."""

    def phase(self) -> Hashable | None:
        """What `loss` and `end_step` look at besides tensors that stay where they are, as few values as there are.

        A step of a phase is the same kernels each time, so a GPU may be told them once. None: they are told anew in
        every step, which is always right.
        """
        return None

    @abstractmethod
    def loss(self, h_VBF: Tensor, rows_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and scalars worth showing, without gradient and on the same device.

        Args:
            h_VBF: pooled features of the views, float32, with gradient; not normalised.
            rows_B: which images they are, int64, on the same device; no image twice.

        """

    def end_step(self) -> None:
        """Called after the optimiser's step: move the memory, the running means, the targets."""

    @abstractmethod
    def answer(self, features_NF: np.ndarray, *, seed: int, restarts: int) -> Generator[Step, None, Fit]:
        """The grouping, from the float32 features of every image without augmentation, after the training.

        What is random in it follows from `seed` alone.
        """

    def layers(self, features_NF: np.ndarray) -> dict[str, np.ndarray]:
        """Unit vectors (N, D) of every layer that a grouping could be made on, by the layer's name."""
        return {"features": space.unit(features_NF)}


class ObjectiveFactory(Protocol):
    """Makes the objective of one run: the class itself, or a function that adds settings of its own."""

    def __call__(self, *, feature_size: int, images: int, clusters: int, epochs: int) -> Objective: ...
