"""A grouping at several levels: every cluster split into finer ones, and a tree that merges all of them into one.

Below the clusters, k-means splits each of them; above, and among the parts of one cluster, average linkage of the
centres (Sokal and Michener 1958, by SciPy) says which two are merged next. `docs/auto.md` has the figures.

Letters in shapes: N images, B of them in one cluster, K clusters that have images, L leaves, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.sparse import csr_array
from scipy.spatial.distance import squareform

from models import space
from models.fit import seed_of

LEAVES_PER_CLUSTER = 3
IMAGES_PER_LEAF = 20  # on average at least
SMALLEST_LEAF = 5
MOST_LEAVES = 4096  # the distances of every pair are held at once: 134 MB
ROUNDS = 30


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Two nodes become one. Nodes 0 to L-1 are the leaves, node L+m is what merge m makes."""

    a: int
    b: int
    height: float  # 1 minus the mean cosine similarity of the centres on both sides; never falls from merge to merge
    size: int  # images below


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Leaves in the order of the clusters, the largest of a cluster first; within-cluster merges come first."""

    fine_N: np.ndarray  # int64: the leaf of every image
    cluster_L: np.ndarray  # int64: the cluster of every leaf
    merges: tuple[Merge, ...]  # L-1 of them

    @property
    def leaves(self) -> int:
        return len(self.cluster_L)

    @cached_property
    def clusters(self) -> int:
        """How many clusters have images: the level that is the grouping itself."""
        return len(np.unique(self.cluster_L))

    @cached_property
    def levels(self) -> list[int]:
        """Numbers of groups worth reading: of every doubling the one with the widest gap, the clusters, the leaves."""
        ends = {self.clusters, self.leaves}
        height_by_groups = {self.leaves - 1 - m: merge.height for m, merge in enumerate(self.merges)}
        start = 2
        while start < self.clusters:
            band = range(start, min(2 * start, self.clusters))
            # A level lasts from the merge that made it to the one that ends it.
            ends.add(max(band, key=lambda groups: height_by_groups[groups - 1] - height_by_groups[groups]))
            start *= 2
        return sorted(ends)

    def at(self, level: int) -> np.ndarray:
        """The group of every image when there are `level` groups, int64; groups are numbered by their first leaf.

        At the level of the clusters these are the labels that the tree was made from.

        Raises:
            ValueError: there is no such level.

        """
        if not 1 <= level <= self.leaves:
            raise ValueError(f"level is {level}; it must be from 1 to {self.leaves}")
        if level == self.clusters:
            labels_N: np.ndarray = self.cluster_L[self.fine_N]
            return labels_N
        made = self.leaves - level
        top = np.arange(self.leaves + made)
        for m in reversed(range(made)):
            top[self.merges[m].a] = top[self.merges[m].b] = top[self.leaves + m]
        _, first, group_L = np.unique(top[: self.leaves], return_index=True, return_inverse=True)
        groups_N: np.ndarray = np.argsort(np.argsort(first))[group_L][self.fine_N]
        return groups_N

    def columns(self) -> dict[str, np.ndarray]:
        """A column for every level, as `groups_10`, coarsest first."""
        return {f"groups_{level}": self.at(level) for level in self.levels}

    def to_dict(self) -> dict[str, Any]:
        """The tree without its images, for JSON."""
        return {
            "clusters": self.clusters,
            "levels": self.levels,
            "leaf_clusters": self.cluster_L.tolist(),
            "leaf_sizes": np.bincount(self.fine_N, minlength=self.leaves).tolist(),
            "merges": [[merge.a, merge.b, round(merge.height, 6), merge.size] for merge in self.merges],
        }


def tree(x_ND: np.ndarray, labels_N: np.ndarray, *, seed: int) -> Tree:
    """Split every cluster and link all parts; linear in N, the same on every call.

    About three leaves a cluster, more for a cluster that is large and wide; on average at least 20 images a leaf,
    and none below 5 unless its cluster is. Clusters without images are left out.

    Args:
        x_ND: unit vectors in which similarity is measured.
        labels_N: the cluster of every image.
        seed: of the k-means that splits.

    """
    clusters, place_N = np.unique(labels_N, return_inverse=True)
    rows_K = np.split(np.argsort(place_N, kind="stable"), np.cumsum(np.bincount(place_N))[:-1])
    fine_N = np.empty(len(x_ND), np.int64)
    parts_K: list[np.ndarray] = []  # the leaves of every cluster
    leaves = 0
    for k, parts in enumerate(leaf_counts(x_ND, rows_K)):
        part_B = split(x_ND[rows_K[k]], parts, seed=seed_of(seed, k))
        fine_N[rows_K[k]] = leaves + part_B
        parts_K.append(np.arange(leaves, leaves + part_B.max() + 1))
        leaves += len(parts_K[-1])
    size_L = np.bincount(fine_N, minlength=leaves)
    return Tree(
        fine_N=fine_N,
        cluster_L=np.repeat(clusters.astype(np.int64), [len(parts) for parts in parts_K]),
        merges=join(sums(x_ND, fine_N, leaves), size_L, parts_K),
    )


def leaf_counts(x_ND: np.ndarray, rows_K: Sequence[np.ndarray]) -> np.ndarray:
    """How many leaves each cluster gets, in proportion to its squared distances from its centre; int64 (K,)."""
    clusters, size_K = len(rows_K), np.array([len(rows_B) for rows_B in rows_K])
    spread_K = np.array([len(rows_B) - (np.square(x_ND[rows_B].sum(axis=0)).sum() / len(rows_B)) for rows_B in rows_K])
    spread_K = spread_K.clip(min=0)
    wanted = min(LEAVES_PER_CLUSTER * clusters, size_K.sum() // IMAGES_PER_LEAF, MOST_LEAVES)
    share_K = spread_K / max(spread_K.sum(), 1e-12) * max(wanted, clusters)
    counts_K: np.ndarray = np.minimum(np.rint(share_K).astype(np.int64), size_K // SMALLEST_LEAF).clip(min=1)
    while counts_K.sum() > max(wanted, clusters):  # clusters that got their one leaf for nothing
        counts_K[counts_K.argmax()] -= 1
    return counts_K


def split(x_BD: np.ndarray, parts: int, *, seed: int) -> np.ndarray:
    """Parts of one cluster by k-means, numbered by size; too small ones go to the nearest other part. int64 (B,)."""
    part_B = np.zeros(len(x_BD), np.int64)
    if parts > 1:
        part_B = space.k_means(x_BD, parts, rounds=ROUNDS, seed=seed).labels_.astype(np.int64)
    part_B = np.unique(part_B, return_inverse=True)[1]
    size = np.bincount(part_B)
    while len(size) > 1 and size.min() < SMALLEST_LEAF:
        small = size.argmin()
        centre = sums(x_BD, part_B, len(size)) / size[:, None]
        gap = np.square(centre - centre[small]).sum(axis=1)
        gap[small] = np.inf
        part_B[part_B == small] = gap.argmin()
        part_B = np.unique(part_B, return_inverse=True)[1]
        size = np.bincount(part_B)
    by_size: np.ndarray = np.argsort(np.argsort(-size, kind="stable"))
    return by_size[part_B]


def join(sum_LD: np.ndarray, size_L: np.ndarray, parts_K: Sequence[np.ndarray]) -> tuple[Merge, ...]:
    """All merges: first those among the leaves of one cluster, by height, then those of the clusters."""
    inner: list[tuple[float, int, int, int, int]] = []  # height, cluster, number, and the two nodes of its own count
    for k, parts in enumerate(parts_K):
        inner.extend((height, k, m, a, b) for m, (a, b, height) in enumerate(link(sum_LD[parts])))
    node_of = {(k, part): int(leaf) for k, parts in enumerate(parts_K) for part, leaf in enumerate(parts)}
    size, merges, reached = size_L.tolist(), [], 0.0

    def merge(a: int, b: int, height: float) -> int:
        nonlocal reached
        reached = max(reached, height)
        size.append(size[a] + size[b])
        merges.append(Merge(a=min(a, b), b=max(a, b), height=reached, size=size[-1]))
        return len(size) - 1

    for height, k, m, a, b in sorted(inner):
        node_of[k, len(parts_K[k]) + m] = merge(node_of[k, a], node_of[k, b], height)
    # The last node of every cluster is the cluster.
    nodes = [node_of[k, 2 * len(parts) - 2] for k, parts in enumerate(parts_K)]
    for a, b, height in link(np.stack([sum_LD[parts].sum(axis=0) for parts in parts_K])):
        nodes.append(merge(nodes[a], nodes[b], height))
    return tuple(merges)


def link(sum_LD: np.ndarray) -> list[tuple[int, int, float]]:
    """Average linkage of directions under 1 minus cosine: the two nodes and the height of every merge."""
    if len(sum_LD) == 1:
        return []
    length_L1 = np.linalg.norm(sum_LD, axis=1, keepdims=True)
    unit_LD = sum_LD / length_L1.clip(min=1e-12)
    gap_LL = (1 - unit_LD @ unit_LD.T).clip(min=0)
    np.fill_diagonal(gap_LL, 0)
    merges = linkage(squareform(gap_LL, checks=False), "average")
    return [(int(a), int(b), float(height)) for a, b, height, _ in merges]


def sums(x_BD: np.ndarray, group_B: np.ndarray, groups: int) -> np.ndarray:
    """The sum of every group's vectors, float64 (groups, D)."""
    images = len(x_BD)
    members = csr_array((np.ones(images), (group_B, np.arange(images))), shape=(groups, images))
    total: np.ndarray = members @ x_BD
    return total
