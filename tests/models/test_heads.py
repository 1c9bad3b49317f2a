import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import normalize

from models import committee, heads, space, starts
from models.committee import Committee
from models.fit import draw, seed_of
from models.heads import HeadConfig
from tests.models.conftest import finish


def train(features_NF, **settings):
    options = {"clusters": 6, "epochs": 5, "restarts": 2, "seed": 0, **settings}
    return finish(heads.train(features_NF, **options))


@pytest.fixture
def mist(blobs):
    """240 images without clear groups, on which restarts differ."""
    features_NF, _ = blobs
    return features_NF[np.random.default_rng(3).permutation(240)] + features_NF


def test_far_groups_are_found(blobs):
    features_NF, class_N = blobs
    steps, fit = train(features_NF)
    assert adjusted_rand_score(class_N, fit.assignment.labels_N) == 1
    assert fit.assignment.consensus_N.all()
    assert [step.total - step.done for step in steps[-5:]] == [8, 6, 4, 2, 0]  # both restarts side by side
    assert all(math.isfinite(value) for step in steps for value in step.details.values())


def test_the_same_seed_gives_the_same_bits(mist):
    (_, one), (_, two), (_, other) = train(mist), train(mist), train(mist, seed=1)
    assert np.array_equal(one.assignment.confidence_N, two.assignment.confidence_N)
    assert all(np.array_equal(one.model[name], two.model[name]) for name in one.model)
    assert not np.array_equal(one.model["centres"], other.model["centres"])


def test_the_number_of_cores_changes_no_bit(monkeypatch):
    """Of 531 images and 30 clusters restarts lie at odd places in memory: groups of 24 end in other bits."""
    features_NF = np.random.default_rng(0).normal(size=(531, 128)).astype(np.float16)
    fits = []
    for cores in (1, 2):
        monkeypatch.setattr(heads, "cpu_count", lambda cores=cores: cores)
        steps, fit = train(features_NF, clusters=30, restarts=24, epochs=4)
        left = [step.total - step.done for step in steps if step.total - step.done < 64]  # epochs of all, then of 8
        assert left[:2] == ([52, 40] if cores == 1 else [40, 16])
        assert steps[-1].done == steps[-1].total
        fits.append(fit)
    assert np.array_equal(fits[0].assignment.confidence_N, fits[1].assignment.confidence_N)
    assert all(np.array_equal(fits[0].model[name], fits[1].model[name]) for name in fits[0].model)


def test_nor_does_it_where_cores_share_neighbours_and_answers(monkeypatch):
    """5,000 images are looked up in two parts and answered in five blocks, each by whichever core is free."""
    features_NF = np.random.default_rng(1).normal(size=(5000, 48)).astype(np.float16)
    fits = []
    for cores in (1, 3):
        for module in (heads, space, starts, committee):
            monkeypatch.setattr(module, "cpu_count", lambda cores=cores: cores)
        fits.append(train(features_NF, epochs=2)[1])
    one, three = (fit.assignment for fit in fits)
    assert np.array_equal(one.confidence_N, three.confidence_N)
    assert np.array_equal(one.labels_N, three.labels_N)


def test_every_start_looks_at_other_images_of_a_large_collection(monkeypatch):
    features_NF = np.random.default_rng(2).normal(size=(2500, 32)).astype(np.float16)
    looked_at, k_means = [], space.k_means

    def watched(x_ND, clusters, **settings):
        looked_at.append(x_ND.copy())
        return k_means(x_ND, clusters, **settings)

    monkeypatch.setattr(space, "k_means", watched)
    enough = starts.SEEN_PER_PIECE * starts.PIECES * 6  # 1,920
    for most, seen in ((100, enough), (2000, 2000), (4096, 2500)):
        looked_at.clear()
        train(features_NF, restarts=3, epochs=1, config=HeadConfig(start_images=most))
        assert [x_SD.shape for x_SD in looked_at] == [(seen, 32)] * 3
        assert len({x_SD.tobytes() for x_SD in looked_at}) == (3 if seen < 2500 else 1)


@pytest.mark.parametrize(
    "config",
    [
        HeadConfig(consistency=False),
        HeadConfig(contrast="none"),
        HeadConfig(contrast="instance"),
        HeadConfig(trust=False),
        HeadConfig(balance=0.5),
        HeadConfig(rule="similarity"),
        HeadConfig(rule="boundary"),
    ],
)
def test_every_switch_trains(blobs, config):
    features_NF, class_N = blobs
    _, fit = train(features_NF, config=config)
    assert adjusted_rand_score(class_N, fit.assignment.labels_N) > 0.9


def untrained(features_NF, **settings):
    """Two restarts before their first step, which remember what they say."""
    together = group_of(features_NF, [0, 1], **settings)
    return together, together.refresh()


def group_of(features_NF, seeds, **settings):
    z_SD = space.fit(features_NF, dimensions=12).project(features_NF)
    neighbours_SM = torch.from_numpy(space.nearest(z_SD.numpy(), 5))
    centres_RKD = torch.from_numpy(starts.several(z_SD.numpy(), 6, seeds=seeds))
    config = HeadConfig(dimensions=12, **settings)
    return heads.Heads(z_SD, neighbours_SM, centres_RKD=centres_RKD, seeds=seeds, config=config)


def test_the_loss_is_consistency_plus_the_weighted_contrast(mist):
    rows_RB = torch.arange(64).repeat(2, 1)
    told = {}
    for weight in (0.0, 0.25):
        together, x_RSD = untrained(mist, contrast_weight=weight)
        weights_RBM = torch.stack([together.neighbour_weights(x_SD, rows_RB[0]) for x_SD in x_RSD])
        told[weight] = together.step(rows_RB, weights_RBM, 0.01)
    assert told[0.25]["contrast"].item() == told[0.0]["contrast"].item() > 0.1
    expected = told[0.0]["loss"].item() + 0.25 * told[0.0]["contrast"].item()
    assert told[0.25]["loss"].item() == pytest.approx(expected)


def test_steps_become_smaller_along_half_a_cosine(blobs, monkeypatch):
    features_NF, _ = blobs
    rates, step = [], heads.Heads.step

    def watched(self, rows_RB, weights_RBM, learning_rate):
        rates.append(learning_rate)
        return step(self, rows_RB, weights_RBM, learning_rate)

    monkeypatch.setattr(heads.Heads, "step", watched)
    train(features_NF, epochs=2, config=HeadConfig(batch=120, learning_rate=0.04))
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.04, 0.02 * (1 + half), 0.02, 0.02 * (1 - half)])


def test_a_large_collection_is_sampled_in_every_epoch(blobs):
    # 240 images, 100 drawn an epoch: the memory of the others must follow the head.
    features_NF, class_N = blobs
    _, fit = train(features_NF, config=HeadConfig(epoch_images=100, batch=50))
    assert adjusted_rand_score(class_N, fit.assignment.labels_N) == 1


@pytest.mark.parametrize(
    ("restarts", "stay"), [(1, 1), (2, 2), (4, 4), (5, 4), (12, 4), (13, 4), (15, 5), (24, 8), (100, 33)]
)
def test_a_third_of_many_restarts_answers(restarts, stay):
    assert heads.staying(restarts) == stay


def test_restarts_that_stay_go_on_as_if_no_other_had_been_there(mist, monkeypatch):
    steps, chosen = train(mist, restarts=9, epochs=4)
    total = steps[-1].total
    assert [step.done - total for step in steps[-5:]] == [-26, -17, -8, -4, 0]
    assert steps[0].done == 0
    assert {step.total for step in steps} == {total}
    assert (len(chosen.scores), chosen.started) == (4, 9)
    monkeypatch.setattr(heads, "staying", lambda restarts: restarts)
    whole = train(mist, restarts=9, epochs=4)[1]
    assert len(whole.scores) == 9
    gaps = np.abs(chosen.model["projection"][:, None] - whole.model["projection"][None]).max(axis=(2, 3))
    assert (gaps.min(axis=1) < 1e-5).all()
    assert len(set(gaps.argmin(axis=1))) == 4
    assert (np.sort(gaps, axis=1)[:, 1] > 1e-3).all()  # the others are others


def test_a_single_epoch_is_trained_by_those_that_start_best(blobs):
    features_NF, class_N = blobs
    steps, fit = train(features_NF, restarts=6, epochs=1)
    assert [step.done - step.total for step in steps[-2:]] == [-4, 0]
    assert adjusted_rand_score(class_N, fit.assignment.labels_N) == 1


@pytest.mark.parametrize("at_once", [6, 2])
def test_a_restart_that_went_wrong_is_left_behind(blobs, at_once):
    features_NF, _ = blobs
    groups = [group_of(features_NF, list(range(first, first + at_once))) for first in range(0, 6, at_once)]
    with torch.no_grad():
        groups[0].centres_RKD[1] = groups[0].centres_RKD[1, :1]  # all boundaries in one place
    right = torch.cat([each.centres_RKD.detach() for each in groups])[[0, 2, 3, 4, 5]]
    with ThreadPoolExecutor(2) as pool:
        kept = heads.keep_best(groups, 5, pool)
    assert torch.equal(torch.cat([each.centres_RKD.detach() for each in kept]), right)
    assert [len(each) for each in kept] == [len(each.projection_RDD) for each in kept]


def test_what_heads_say_of_their_memory_may_be_kept_or_not(mist, monkeypatch):
    kept = train(mist)[1]
    monkeypatch.setattr(committee, "SAID_FLOATS", 0)
    anew = train(mist)[1]
    np.testing.assert_allclose(kept.assignment.confidence_N, anew.assignment.confidence_N, rtol=1e-4)
    assert np.array_equal(kept.assignment.labels_N, anew.assignment.labels_N)


def test_restarts_trained_in_turn_are_those_trained_side_by_side(blobs, monkeypatch):
    features_NF, _ = blobs
    together = train(features_NF, restarts=3)[1]
    monkeypatch.setattr(heads, "MEMORY_FLOATS", 1)
    in_turn = train(features_NF, restarts=3)[1]
    np.testing.assert_allclose(in_turn.scores, together.scores, rtol=1e-3)
    assert np.array_equal(in_turn.assignment.labels_N, together.assignment.labels_N)


def test_images_outside_of_the_sample_are_assigned_too(blobs):
    features_NF, class_N = blobs
    _, fit = train(features_NF, config=HeadConfig(sample=120))
    assert adjusted_rand_score(class_N, fit.assignment.labels_N) == 1


def test_clusters_of_the_restarts_have_the_same_numbers(blobs):
    features_NF, _ = blobs
    _, fit = train(features_NF, restarts=4)
    centres_RKD = fit.model["centres"]
    assert centres_RKD.shape[:2] == (4, 6)
    nearest = (centres_RKD @ centres_RKD[0].T).argmax(axis=2)
    assert (nearest == np.arange(6)).all()


def test_an_empty_cluster_gets_half_of_the_widest(blobs):
    features_NF, class_N = blobs  # 240 images in 6 groups
    axes = space.fit(features_NF, dimensions=12)
    z_ND = axes.project(features_NF)
    centres_KD = torch.stack([z_ND[class_N == k].mean(dim=0) for k in np.unique(class_N)])
    away_1D = -centres_KD[:1]  # no image is near: the seventh cluster is empty
    heads_together = Committee(
        z_ND,
        projection_RDD=torch.eye(z_ND.shape[1])[None],
        centres_RKD=torch.cat([centres_KD, away_1D])[None],
        labels_RS=class_N[None],
        scores=[0.0],
        images_each=40,
        config=HeadConfig(),
    )
    neighbours_NM = torch.from_numpy(space.nearest(z_ND.numpy(), 5))
    before_N = heads_together.answer(z_ND, neighbours_NM).labels_N
    assert set(before_N) == set(range(6))
    assert heads_together.refill(before_N)
    after_N = heads_together.answer(z_ND, neighbours_NM).labels_N
    assert set(after_N) == set(range(7))
    halves = set(before_N[after_N == 6])
    assert len(halves) == 1  # all from one cluster, of which the rest stayed
    assert (after_N[~np.isin(before_N, list(halves))] == before_N[~np.isin(before_N, list(halves))]).all()
    assert not heads_together.refill(after_N)


def test_every_cluster_that_was_asked_for_gets_images(blobs):
    # Before empty clusters are filled, a quarter of them are empty.
    features_NF, _ = blobs
    _, fit = train(features_NF, clusters=20, epochs=2)
    assert set(fit.assignment.labels_N) == set(range(20))


def test_equal_images_cannot_fill_a_cluster():
    z_ND = torch.eye(4)[:2].repeat_interleave(10, dim=0)
    heads_together = Committee(
        z_ND,
        projection_RDD=torch.eye(4)[None],
        centres_RKD=torch.eye(4)[None, :3],
        labels_RS=np.repeat([0, 1], 10)[None],
        scores=[0.0],
        images_each=40,
        config=HeadConfig(),
    )
    assert not heads_together.refill(np.repeat([0, 1], 10))


def test_pieces_are_merged_as_ward_merges_their_images():
    # Every piece is a number of equal points: Ward's tree of all points must agree, found by scikit-learn.
    rng = np.random.default_rng(0)
    centre_PD, size_P = rng.normal(size=(12, 3)), rng.integers(1, 9, 12)
    group_P = starts.merge(centre_PD, size_P, 4)
    ward = AgglomerativeClustering(4, linkage="ward").fit_predict(np.repeat(centre_PD, size_P, axis=0))
    assert adjusted_rand_score(ward, np.repeat(group_P, size_P)) == 1


def test_starts_are_as_many_as_asked_and_means_of_their_groups():
    x_ND = normalize(np.random.default_rng(0).normal(size=(400, 5))).astype(np.float32)
    found_KD = starts.centres(x_ND, 7, seed=0)
    assert found_KD.shape == (7, 5)
    assert found_KD.dtype == np.float32
    assert np.array_equal(found_KD, starts.centres(x_ND, 7, seed=0))
    np.testing.assert_allclose(starts.centres(x_ND, 1, seed=0)[0], x_ND.mean(axis=0), atol=1e-5)
    assert starts.centres(x_ND[:3], 3, seed=0).shape == (3, 5)


def test_of_several_starts_the_nearest_to_the_images_is_taken():
    x_ND = normalize(np.random.default_rng(0).normal(size=(400, 5))).astype(np.float32)
    tried = starts.several(x_ND, 7, seeds=[seed_of(3, number) for number in range(5)])
    nearness = [(x_ND @ normalize(centres_KD).T).max(axis=1).mean() for centres_KD in tried]
    found_KD = starts.best_centres(x_ND, 7, seed=3, tries=5)
    assert np.array_equal(found_KD, tried[np.argmax(nearness)])


@pytest.mark.parametrize(
    ("images", "clusters", "shrinkage"),
    [
        (10_000, 2, 0.5),
        (10_000, 12, 0.5),
        (10_000, 24, 0.25),
        (6000, 60, 0.1),
        (600, 50, 0.25),
        (600, 100, 0.5),
        (60, 40, 0.5),
    ],
)
def test_the_scatter_is_shrunk_by_how_many_clusters_and_images_there_are(images, clusters, shrinkage):
    assert HeadConfig().shrunk(images, clusters) == shrinkage
    assert HeadConfig(shrinkage=0.3).shrunk(images, clusters) == 0.3


def test_an_image_of_which_too_few_neighbours_are_found(monkeypatch):
    """In the inverted file, which many copies make uneven, a search may end with nothing found."""
    monkeypatch.setattr(space, "EXACT_LIMIT", 2000)
    rng = np.random.default_rng(0)
    different = rng.normal(size=(400, 64)).astype(np.float16)
    features_NF = different[np.minimum(rng.zipf(1.3, 6000) - 1, 399)]
    sample = draw(6000, 3000, seed=0).numpy()
    searched = np.ascontiguousarray(features_NF[sample].astype(np.float32))
    assert (space.search(searched, features_NF.astype(np.float32), 16) < 0).any()
    config = HeadConfig(sample=3000)
    _, fit = finish(heads.train(features_NF, clusters=20, epochs=2, restarts=2, seed=0, config=config))
    assert np.isfinite(fit.assignment.confidence_N).all()
    assert fit.assignment.labels_N.shape == (6000,)
