import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import adjusted_rand_score

from models import hierarchy


def directions(degrees):
    radians = np.deg2rad(np.asarray(degrees, dtype=float))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def unit(x_ND):
    return (x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True).clip(min=1e-9)).astype(np.float32)


def coarsens(coarse_N, fine_N):
    """Every group of the finer one lies in one group of the coarser one."""
    return len(np.unique(np.stack([coarse_N, fine_N]), axis=1).T) == len(np.unique(fine_N))


def test_four_directions_merge_as_by_hand():
    # Clusters at 0, 10, 90 and 120 degrees: 0 with 10, then 90 with 120, then both pairs.
    labels_N = np.repeat([0, 1, 2, 3], 3)
    tree = hierarchy.tree(directions([0, 10, 90, 120])[labels_N], labels_N, seed=0)
    cosine = lambda degrees: np.cos(np.deg2rad(degrees))  # noqa: E731
    assert [(merge.a, merge.b, merge.size) for merge in tree.merges] == [(0, 1, 6), (2, 3, 6), (4, 5, 12)]
    between = 1 - np.mean([cosine(90), cosine(120), cosine(80), cosine(110)])
    heights = [merge.height for merge in tree.merges]
    assert heights == pytest.approx([1 - cosine(10), 1 - cosine(30), between], abs=1e-6)
    assert tree.at(2).tolist() == [0] * 6 + [1] * 6
    assert tree.at(3).tolist() == [0] * 6 + [1] * 3 + [2] * 3
    assert tree.at(1).tolist() == [0] * 12
    # Two groups last from 0.134 to 1.19, three only from 0.015 to 0.134.
    assert tree.levels == [2, 4]


def test_a_cluster_of_two_kinds_is_split_into_them():
    rng = np.random.default_rng(0)
    kind_N = np.repeat([0, 1, 2], 40)
    x_ND = directions(np.array([0, 30, 120])[kind_N] + rng.normal(size=120))
    labels_N = np.array([0, 0, 1])[kind_N]
    tree = hierarchy.tree(x_ND, labels_N, seed=0)
    assert tree.clusters == 2
    assert adjusted_rand_score(kind_N, tree.at(3)) == 1
    assert np.array_equal(tree.at(2), labels_N)


@settings(max_examples=60, deadline=None)
@given(
    x_ND=arrays(np.float32, st.tuples(st.integers(1, 150), st.just(3)), elements=st.integers(-2, 2)).map(unit),
    clusters=st.integers(1, 6),
    seed=st.integers(0, 3),
)
def test_levels_nest_and_heights_never_fall(x_ND, clusters, seed):
    labels_N = np.random.default_rng(seed).integers(clusters, size=len(x_ND))
    tree = hierarchy.tree(x_ND, labels_N, seed=seed)
    levels = [tree.at(level) for level in range(1, tree.leaves + 1)]
    for level, groups_N in enumerate(levels, start=1):
        assert len(np.unique(groups_N)) == level
    assert all(coarsens(coarse, fine) for coarse, fine in itertools.pairwise(levels))
    assert np.array_equal(tree.at(tree.clusters), labels_N)
    assert np.array_equal(tree.at(tree.leaves), tree.fine_N) or tree.leaves == tree.clusters
    heights = [merge.height for merge in tree.merges]
    assert heights == sorted(heights)
    assert len(tree.merges) == tree.leaves - 1
    assert not tree.merges or tree.merges[-1].size == len(x_ND)
    assert {tree.clusters, tree.leaves} <= set(tree.levels)


def test_leaves_are_few_and_none_is_tiny():
    rng = np.random.default_rng(1)
    x_ND = unit(rng.normal(size=(1000, 16)))
    labels_N = rng.choice(10, size=1000, p=[0.55, *[0.05] * 9])
    tree = hierarchy.tree(x_ND, labels_N, seed=0)
    assert 15 <= tree.leaves <= 30
    assert np.bincount(tree.fine_N).min() >= 5
    # The largest cluster holds half of the images, and gets about half of the leaves.
    assert 8 <= (tree.cluster_L == 0).sum() <= 21


@pytest.mark.parametrize(("small", "sizes"), [(5, [20, 20, 5]), (4, [24, 20])])
def test_a_part_of_less_than_five_images_goes_to_the_nearest(small, sizes):
    kind_N = np.repeat([0, 1, 2], [20, 20, small])
    part_N = hierarchy.split(directions(np.array([0, 120, 30])[kind_N]), 3, seed=0)
    assert np.bincount(part_N).tolist() == sizes
    assert (part_N[kind_N == 2] == (part_N[0] if small < 5 else 2)).all()


@pytest.mark.parametrize("labels", [[0], [0, 1], [1, 1], [0, 0, 0, 3, 3, 1]])
def test_tiny_and_gappy_groupings_have_a_tree(labels):
    labels_N = np.array(labels)
    tree = hierarchy.tree(directions(np.arange(len(labels)) * 20), labels_N, seed=0)
    assert tree.clusters == len(set(labels))
    assert np.array_equal(tree.at(tree.clusters), labels_N)
    assert np.array_equal(tree.columns()[f"groups_{tree.clusters}"], labels_N)


def test_equal_images_are_one_leaf_a_cluster():
    labels_N = np.repeat([0, 1], 100)
    tree = hierarchy.tree(np.tile(directions([45]), (200, 1)), labels_N, seed=0)
    assert tree.leaves == 2
    assert tree.merges[0].height == pytest.approx(0, abs=1e-6)


def test_the_same_seed_gives_the_same_tree_and_it_is_json():
    rng = np.random.default_rng(2)
    x_ND, labels_N = unit(rng.normal(size=(400, 8))), rng.integers(5, size=400)
    one, two = (hierarchy.tree(x_ND, labels_N, seed=3) for _ in range(2))
    assert np.array_equal(one.fine_N, two.fine_N)
    described = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert described == two.to_dict()
    assert sum(described["leaf_sizes"]) == 400
    assert list(one.columns()) == [f"groups_{level}" for level in one.levels]


def test_a_level_that_is_not_there_is_refused():
    tree = hierarchy.tree(directions([0, 90]), np.array([0, 1]), seed=0)
    with pytest.raises(ValueError, match="level is 3; it must be from 1 to 2"):
        tree.at(3)
