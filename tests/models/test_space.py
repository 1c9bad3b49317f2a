import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from models import space


def random_features(n=300, size=40):
    return np.random.default_rng(0).normal(size=(n, size)).astype(np.float32) + 1


# More images than features, and fewer: the axes come from the products of the fewer.
@pytest.mark.parametrize("images", [300, 30])
def test_the_space_is_that_of_scikit_learns_pca(images):
    features_NF = random_features(images)
    ours = space.fit(features_NF, dimensions=5).project(features_NF).numpy()
    theirs = normalize(PCA(5, svd_solver="full").fit_transform(normalize(features_NF)))
    np.testing.assert_allclose(np.abs((ours * theirs).sum(axis=0)), (theirs**2).sum(axis=0), rtol=1e-3)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-3)


@pytest.mark.parametrize("images", [300, 30])
def test_whitened_axes_are_those_of_scikit_learns_whitening(images):
    features_NF = random_features(images)
    ours = space.fit(features_NF, dimensions=5, whitening=1.0).project(features_NF).numpy()
    theirs = normalize(PCA(5, svd_solver="full", whiten=True).fit_transform(normalize(features_NF)))
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-3)


def test_two_images_have_one_dimension():
    features_NF = np.array([[1, 0, 2], [0, 1, 2]], np.float16)
    x_ND = space.fit(features_NF, dimensions=96).project(features_NF)
    assert x_ND.shape == (2, 1)
    torch.testing.assert_close(x_ND[0], -x_ND[1])


def test_neighbours_are_those_of_scikit_learn():
    x_ND = normalize(random_features())
    _, expected = NearestNeighbors(n_neighbors=6).fit(x_ND).kneighbors(x_ND)
    assert np.array_equal(space.nearest(x_ND, 5), expected[:, 1:])


def test_copies_are_neighbours_and_the_image_itself_is_none():
    x_ND = normalize(np.repeat(random_features(4), 5, axis=0))
    found = space.nearest(x_ND, 4)
    for row, neighbours in enumerate(found):
        assert set(neighbours) == set(range(row - row % 5, row - row % 5 + 5)) - {row}


def test_the_inverted_file_finds_nearly_the_same_neighbours(monkeypatch):
    rng = np.random.default_rng(0)
    x_ND = normalize(rng.normal(size=(30, 8))[rng.integers(30, size=3000)] + 0.3 * rng.normal(size=(3000, 8)))
    x_ND = x_ND.astype(np.float32)
    exact = space.nearest(x_ND, 5)
    monkeypatch.setattr(space, "EXACT_LIMIT", 1000)
    one, two = space.nearest(x_ND, 5), space.nearest(x_ND, 5)
    assert np.array_equal(one, two)
    assert not (one == np.arange(3000)[:, None]).any()
    shared = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(exact, one, strict=True)])
    assert shared > 0.9


@pytest.mark.parametrize(("images", "clusters", "count"), [(2, 2, 0), (7, 3, 1), (2000, 10, 15), (100, 10, 9)])
def test_no_more_neighbours_than_a_cluster_has(images, clusters, count):
    assert space.neighbour_count(images, clusters, wanted=15) == count


def test_batches_stand_in_for_a_large_collection(monkeypatch):
    rng = np.random.default_rng(0)
    group_N = rng.integers(4, size=400)
    x_ND = normalize(4 * np.eye(8)[group_N] + 0.1 * rng.normal(size=(400, 8))).astype(np.float32)
    monkeypatch.setattr(space, "LLOYD_LIMIT", 100)
    one = space.k_means(x_ND, 4, rounds=50, seed=0).labels_
    assert np.array_equal(one, space.k_means(x_ND, 4, rounds=50, seed=0).labels_)
    assert len(set(zip(one, group_N, strict=True))) == len(set(one))
