import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
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


def groups_in_uneven_noise():
    """Images (400, 12) of four groups, and a direction that says nothing of them, in which images differ most."""
    rng = np.random.default_rng(0)
    noise_F = np.array([0.6] + [0.1] * 11)
    truth_N = rng.integers(4, size=400)
    return 0.7 * np.eye(4, 12, k=1)[truth_N] + rng.normal(size=(400, 12)) * noise_F + 5, truth_N


def test_with_clear_groups_the_directions_are_those_of_linear_discriminants():
    features_NF, truth_N = groups_in_uneven_noise()
    main = space.fit(features_NF, dimensions=12)
    ours = space.discriminant(main, features_NF, dimensions=3, neighbours=30, shrinkage=0.0)
    seen_NF = normalize(features_NF) - main.mean_F.numpy()
    theirs = LinearDiscriminantAnalysis(solver="eigen").fit_transform(seen_NF, truth_N)
    principal = PCA(3).fit_transform(seen_NF)
    found = cca(seen_NF @ ours.axes_FD.numpy(), theirs)
    assert found.min() > 0.97
    assert cca(principal, theirs).min() < 0.9


def test_along_every_direction_neighbours_differ_equally():
    features_NF, _ = groups_in_uneven_noise()
    main = space.fit(features_NF, dimensions=8)
    ours = space.discriminant(main, features_NF, dimensions=8, neighbours=5, shrinkage=0.0)
    near_NM = space.nearest(main.project(features_NF).numpy(), 5)
    turn_DD = torch.linalg.lstsq(main.axes_FD, ours.axes_FD).solution
    x_ND = (main.project(features_NF) @ turn_DD).numpy()
    apart_NMD = x_ND[:, None] - x_ND[near_NM]
    scatter_DD = np.einsum("nmd,nme->de", apart_NMD, apart_NMD) / (2 * near_NM.size)
    np.testing.assert_allclose(scatter_DD, np.eye(8), atol=1e-2)


def test_shrunk_altogether_the_directions_are_principal():
    features_NF = random_features()
    main = space.fit(features_NF, dimensions=40)
    ours = space.discriminant(main, features_NF, dimensions=5, neighbours=5, shrinkage=1.0)
    seen_ND = main.project(features_NF).numpy()
    theirs = PCA(5, svd_solver="full").fit_transform(seen_ND)
    assert cca(seen_ND @ torch.linalg.lstsq(main.axes_FD, ours.axes_FD).solution.numpy(), theirs).min() > 0.999


@pytest.mark.parametrize("neighbours", [0, 4])
def test_where_neighbours_do_not_differ_the_main_directions_stay(neighbours):
    features_NF = np.repeat(random_features(6), 5, axis=0)
    main = space.fit(features_NF, dimensions=96)
    ours = space.discriminant(main, features_NF, dimensions=3, neighbours=neighbours, shrinkage=0.5)
    assert torch.equal(ours.axes_FD, main.axes_FD[:, :3])


def test_some_thousand_images_tell_the_scatter(monkeypatch):
    features_NF, _ = groups_in_uneven_noise()
    main = space.fit(features_NF, dimensions=12)
    asked = {"dimensions": 3, "neighbours": 10, "shrinkage": 0.5}
    every = space.discriminant(main, features_NF, **asked).project(features_NF)
    monkeypatch.setattr(space, "SCATTERED", 100)
    some = space.discriminant(main, features_NF, **asked).project(features_NF)
    assert cca(every.numpy(), some.numpy()).min() > 0.99


def cca(one_ND, other_ND):
    """Canonical correlations: all 1 where both span the same directions."""
    bases = [np.linalg.qr(x_ND - x_ND.mean(axis=0))[0] for x_ND in (one_ND, other_ND)]
    return np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)


def test_two_images_have_one_dimension():
    features_NF = np.array([[1, 0, 2], [0, 1, 2]], np.float16)
    x_ND = space.fit(features_NF, dimensions=96).project(features_NF)
    assert x_ND.shape == (2, 1)
    torch.testing.assert_close(x_ND[0], -x_ND[1])


def test_neighbours_are_those_of_scikit_learn():
    x_ND = normalize(random_features())
    _, expected = NearestNeighbors(n_neighbors=6).fit(x_ND).kneighbors(x_ND)
    assert np.array_equal(space.nearest(x_ND, 5), expected[:, 1:])


def test_neighbours_of_some_images_are_those_among_all():
    x_ND = normalize(random_features())
    assert np.array_equal(space.nearest(x_ND, 5, rows=np.array([7, 3])), space.nearest(x_ND, 5)[[7, 3]])


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
