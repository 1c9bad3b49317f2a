"""All restarts of a head, which answer together: `docs/decisions/0007-all-restarts-answer.md` says why.

Letters in shapes: N images, S of them that the heads were trained on, B of some, K clusters, D dimensions,
M neighbours, R restarts.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from joblib import cpu_count
from torch import Tensor
from torch.nn.functional import log_softmax, normalize, softmax

from models import space
from models.assign import Assignment, assign, calibrated_temperature, concatenate, matching
from models.fit import likeness
from models.scl import SclConfig, boundary_logits, similarity_prediction, similarity_weights

SPLIT_ROUNDS = 25
# Confidence is calibrated by at most so many images.
SURVEYED = 2048
# What heads say of their memory is kept up to here: 256 MB.
SAID_FLOATS = 64 * 2**20


class Committee:
    """Restarts whose clusters have the numbers of the most central one.

    Args:
        z_SD: the images that they were trained on, in the space of the features.
        projection_RDD: of each restart.
        centres_RKD: that draw each restart's boundaries.
        labels_RS: each restart's own grouping.
        scores: of each restart, higher is better.
        images_each: images that a cluster saw in an epoch, on average.
        config: the terms' temperatures and the rule.
        differ: share of images on which the two predictions differ, by which confidence is calibrated; None: as it
            turns out.

    """

    def __init__(
        self,
        z_SD: Tensor,
        *,
        projection_RDD: Tensor,
        centres_RKD: Tensor,
        labels_RS: np.ndarray,
        scores: list[float],
        images_each: float,
        config: SclConfig,
        differ: float | None = None,
    ) -> None:
        self.images_each, self.differ = images_each, differ
        self.config, self.labels_RS, self.projection_RDD = config, labels_RS, projection_RDD
        self.reference = central(labels_RS, scores)
        clusters = centres_RKD.shape[1]
        aligned = [
            normalize(centres_KD[matching(labels_RS[self.reference], labels_S, clusters)], dim=1)
            for centres_KD, labels_S in zip(centres_RKD, labels_RS, strict=True)
        ]
        self.centres_RKD = torch.stack(aligned)
        self.memory_RSD = normalize(z_SD @ projection_RDD, dim=2)
        self.remember()

    def remember(self) -> None:
        """What every head says of its memory, shape (R, S, K), where that is not too much to keep."""
        restarts, images = self.memory_RSD.shape[:2]
        self.said_RSK: Tensor | None = None
        if restarts * images * self.centres_RKD.shape[1] <= SAID_FLOATS:
            self.said_RSK = softmax(self.logits(self.memory_RSD, self.centres_RKD), dim=2)

    def answer(self, z_ND: Tensor, neighbours_NM: Tensor) -> Assignment:
        """The consensus: each prediction is the normalised geometric mean of the heads'.

        Args:
            z_ND: images in the space of the features.
            neighbours_NM: of each, in the memory.

        """
        # Images from all over the collection tell how often the predictions differ.
        stride = -(-len(z_ND) // SURVEYED)
        surveyed = list(self.predictions(z_ND[::stride], neighbours_NM[::stride]))
        differ_B = np.concatenate([(p_BK.argmax(dim=1) != q_BK.argmax(dim=1)).cpu().numpy() for p_BK, q_BK in surveyed])
        differ = float(differ_B.mean()) if self.differ is None else self.differ
        rule, temperature = self.config.rule, calibrated_temperature(differ, self.images_each)
        if stride == 1:
            return concatenate([assign(p_BK, q_BK, rule=rule, temperature=temperature) for p_BK, q_BK in surveyed])

        def answer(rows_B: slice) -> Assignment:
            p_BK, q_BK = self.predict(z_ND[rows_B], neighbours_NM[rows_B])
            return assign(p_BK, q_BK, rule=rule, temperature=temperature)

        threads = max(1, cpu_count() // torch.get_num_threads()) if z_ND.device.type == "cpu" else 1
        with ThreadPoolExecutor(threads, thread_name_prefix="answer") as pool:
            return concatenate(list(pool.map(answer, self.blocks(neighbours_NM))))

    def predictions(self, z_ND: Tensor, neighbours_NM: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """By similarity and by boundary, a block of images at a time."""
        for rows_B in self.blocks(neighbours_NM):
            yield self.predict(z_ND[rows_B], neighbours_NM[rows_B])

    def blocks(self, neighbours_NM: Tensor) -> list[slice]:
        """Rows that are looked at together: as many as fit the caches of a core."""
        images, neighbours = neighbours_NM.shape
        return space.blocks(images, max(64, min(space.GATHERED, 2**25 // (neighbours * self.centres_RKD.shape[1]))))

    @torch.no_grad()
    def predict(self, z_BD: Tensor, neighbours_BM: Tensor) -> tuple[Tensor, Tensor]:
        """By similarity and by boundary, both of shape (B, K)."""
        log_p_BK = log_q_BK = torch.zeros((), device=z_BD.device)
        for restart, (memory_SD, projection_DD, centres_KD) in enumerate(
            zip(self.memory_RSD, self.projection_RDD, self.centres_RKD, strict=True)
        ):
            x_BD = normalize(z_BD @ projection_DD, dim=1)
            log_q_BK = log_q_BK + log_softmax(self.logits(x_BD, centres_KD), dim=1)
            memory_BMD = space.take(memory_SD, neighbours_BM)
            weights_BM = similarity_weights(x_BD, memory_BMD, temperature=self.config.similarity_temperature)
            if self.said_RSK is None:
                said_BMK = softmax(self.logits(memory_BMD, centres_KD), dim=2)
            else:
                said_BMK = space.take(self.said_RSK[restart], neighbours_BM)
            log_p_BK = log_p_BK + similarity_prediction(weights_BM, said_BMK).clamp_min(1e-12).log()
        restarts = len(self.projection_RDD)
        return softmax(log_p_BK / restarts, dim=1), softmax(log_q_BK / restarts, dim=1)

    def logits(self, x_BD: Tensor, centres_KD: Tensor) -> Tensor:
        return boundary_logits(x_BD, centres_KD, temperature=self.config.boundary_temperature)

    def refill(self, labels_S: np.ndarray) -> bool:
        """Give every empty cluster the smaller half of the one whose images lie furthest apart; whether any was.

        Args:
            labels_S: what the committee answered on the images that it was trained on.

        """
        clusters = self.centres_RKD.shape[1]
        labels_S = labels_S.copy()
        x_SD = self.memory_RSD[self.reference].cpu().numpy()
        filled = False
        empty_E = np.flatnonzero(np.bincount(labels_S, minlength=clusters) == 0)
        spread_K = np.array([spread(x_SD[labels_S == k]) for k in range(clusters if len(empty_E) else 0)])
        for empty in empty_E:
            widest = int(np.argmax(spread_K))
            rows_B = np.flatnonzero(labels_S == widest)
            if len(np.unique(x_SD[rows_B], axis=0)) < 2:  # nothing to split
                break
            half_B = space.k_means(x_SD[rows_B], 2, rounds=SPLIT_ROUNDS, seed=0).labels_
            labels_S[rows_B[half_B == np.bincount(half_B).argmin()]] = empty
            for k in (widest, empty):
                own_S = torch.from_numpy(labels_S == k).to(self.memory_RSD.device)
                self.centres_RKD[:, k] = normalize(self.memory_RSD[:, own_S].mean(dim=1), dim=1)
                spread_K[k] = spread(x_SD[labels_S == k])
            filled = True
        if filled:
            self.remember()
        return filled


def central(labels_RS: np.ndarray, scores: list[float]) -> int:
    """The restart with the largest sum of its score and of its mean adjusted Rand index to the others."""
    return int(np.argmax(scores + likeness(labels_RS)))


def spread(x_BD: np.ndarray) -> float:
    """Sum of the squared distances of unit vectors to their mean."""
    return len(x_BD) - float(np.square(x_BD.sum(axis=0)).sum()) / max(1, len(x_BD))
