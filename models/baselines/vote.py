"""A second opinion on the clusters of a method that has only one: the vote of the nearest neighbours.

So every baseline fills the same columns as SCL. The label is the method's own; consensus means that the vote of
its neighbours' clusters names it too.

Letters in shapes: N images, B of them, K clusters, D feature size, M neighbours.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models import space
from models.assign import Assignment, concatenate

NEIGHBOURS = 15
BLOCK = 2048


def electors(x_ND: np.ndarray, clusters: int) -> np.ndarray:
    """The neighbours that vote, of shape (N, M); looked up in the reduced space, whose axes some thousand images tell.

    They are the same ones as among `x_ND`, float32 unit vectors, and found many times faster.
    """
    wanted = space.neighbour_count(len(x_ND), clusters, wanted=NEIGHBOURS)
    some_SD = x_ND[:: max(1, len(x_ND) // space.SCATTERED)]
    return space.nearest(space.fit(some_SD, dimensions=96).project(x_ND).numpy(), wanted)


def confirm(
    x_ND: np.ndarray,
    labels_N: np.ndarray,
    clusters: int,
    predict: Callable[[slice], Tensor],
    *,
    neighbours_NM: np.ndarray | None = None,
) -> Assignment:
    """The labels with their confidence, and whether the neighbours agree.

    Args:
        x_ND: float32 unit vectors in which neighbours are looked up.
        labels_N: int64, the method's answer.
        clusters: how many there are.
        predict: the method's probabilities of some rows, shape (B, K), on the CPU. Confidence is that of the label;
            where the method labels by something else than its likeliest cluster the margin can be below 0.
        neighbours_NM: its `electors`, where they are known already.

    """
    label_N = torch.from_numpy(labels_N)
    near_NM = torch.from_numpy(electors(x_ND, clusters) if neighbours_NM is None else neighbours_NM)
    parts = []
    for start in range(0, len(x_ND), BLOCK):
        rows_B = slice(start, start + BLOCK)
        label_B = label_N[rows_B]
        q_BK = predict(rows_B)
        own_B = q_BK.gather(1, label_B[:, None])[:, 0]
        rest_B, runner_up_B = q_BK.scatter(1, label_B[:, None], -1).max(dim=1)
        said_BM = label_N[near_NM[rows_B]]
        vote_BK = torch.zeros_like(q_BK).scatter_add_(1, said_BM, torch.ones(said_BM.shape, dtype=q_BK.dtype))
        part = Assignment(
            labels_N=label_B.numpy(),
            confidence_N=own_B.numpy(),
            runner_up_N=runner_up_B.numpy(),
            margin_N=(own_B - rest_B).numpy(),
            consensus_N=(vote_BK.argmax(dim=1) == label_B).numpy(),
        )
        parts.append(part)
    return concatenate(parts)


def likeliest(images: int, predict: Callable[[slice], Tensor]) -> np.ndarray:
    """The likeliest cluster of every image, int64: of shape (N,), or (H, N) where H heads predict (H, B, K)."""
    blocks = [predict(slice(start, start + BLOCK)).argmax(dim=-1) for start in range(0, images, BLOCK)]
    labels: np.ndarray = torch.cat(blocks, dim=-1).numpy()
    return labels
