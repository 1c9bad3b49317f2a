"""What heads on frozen features are trained with: batches of images, each with one of its nearest neighbours.

Letters in shapes: N images, B batch, M neighbours.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def batches(images: int, size: int, *, least: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of one epoch, shape (B,) each: a pass in random order without the rest of less than a batch.

    Of a small collection as many passes as `least` batches need. All batches are of equal size, `images` at most.
    """
    size = min(size, images)
    steps = max(images // size, least)
    passes = [torch.randperm(images, generator=generator) for _ in range(math.ceil(steps * size / images))]
    yield from torch.split(torch.cat(passes)[: steps * size], size)


def partners(neighbours_NM: Tensor, rows_B: Tensor, *, generator: torch.Generator) -> Tensor:
    """A random one of every row's neighbours, shape (B,); the generator is a CPU's, the rows may be elsewhere."""
    drawn_B1 = torch.randint(neighbours_NM.shape[1], (len(rows_B), 1), generator=generator)
    return neighbours_NM[rows_B].gather(1, drawn_B1.to(rows_B.device))[:, 0]
