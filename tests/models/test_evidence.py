"""Metrics, assignment and representatives, each against a calculation by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from models import metrics, representatives
from models.assign import assign, by_size, calibrated_temperature, matching
from models.fit import agreement, likeness, seed_of


def test_accuracy_matches_clusters_to_classes_once():
    # clusters 1 and 2 both hold class b: only the larger may claim it
    truth = ["a", "a", "a", "b", "b", "b", "b", "b"]
    labels_N = np.array([0, 0, 1, 1, 1, 1, 2, 2])
    found = metrics.quality(truth, labels_N)
    assert found["acc"] == pytest.approx(5 / 8)


def test_a_renamed_truth_is_perfect():
    found = metrics.quality(["x", "y", "y", "z"], np.array([2, 0, 0, 1]))
    assert found == {"acc": 1.0, "nmi": pytest.approx(1.0), "ari": 1.0}


def test_more_clusters_than_classes_can_be_scored():
    assert metrics.accuracy(np.array([0, 0, 0, 0]), np.array([0, 1, 2, 2])) == 0.5


def test_calibration_is_the_mean_gap_of_its_bins():
    # Both bins hold two images: 0.95 sure and all right, 0.55 sure and half right.
    found = metrics.calibration(["a", "a", "b", "b"], np.array([0, 0, 1, 0]), np.array([0.95, 0.55, 0.95, 0.55]))
    assert found["ece"] == pytest.approx((0.05 + 0.05) / 2)
    assert [(row["images"], row["accuracy"]) for row in found["bins"]] == [(2, 0.5), (2, 1.0)]


def test_a_sure_answer_falls_into_the_last_bin():
    assert metrics.calibration(["a", "b"], np.array([0, 1]), np.array([1.0, 1.0]))["ece"] == 0


def test_clusters_of_two_groupings_are_matched():
    reference_N, labels_N = np.array([0, 0, 1, 1, 2]), np.array([2, 2, 0, 0, 1])
    assert matching(reference_N, labels_N, 3).tolist() == [2, 0, 1]


def test_balance_is_the_entropy_in_units_of_its_maximum():
    assert metrics.balance([5, 5, 5, 5]) == pytest.approx(1)
    assert metrics.balance([5, 5, 0, 0]) == pytest.approx(0.5)
    assert metrics.balance([9, 0]) == 0


def test_collapse_and_empty_clusters_are_named():
    assert metrics.warnings([10, 9, 8]) == []
    codes = [warning["code"] for warning in metrics.warnings([98, 2, 0])]
    assert codes == ["empty_clusters", "collapse"]
    assert "98%" in metrics.warnings([98, 2, 0])[1]["message"]


def test_a_balance_below_a_half_is_a_collapse():
    assert metrics.balance([9, 1]) == pytest.approx(0.469, abs=1e-3)
    assert [warning["code"] for warning in metrics.warnings([9, 1])] == ["collapse"]
    assert metrics.balance([8, 1]) == pytest.approx(0.503, abs=1e-3)
    assert metrics.warnings([8, 1]) == []


def test_two_witnesses_by_hand():
    p_BK, q_BK = torch.tensor([[0.6, 0.3, 0.1]]), torch.tensor([[0.2, 0.5, 0.3]])
    found = assign(p_BK, q_BK)  # roots of the products 0.12, 0.15 and 0.03
    assert (found.labels_N[0], found.runner_up_N[0], found.consensus_N[0]) == (1, 0, False)
    total = math.sqrt(0.12) + math.sqrt(0.15) + math.sqrt(0.03)
    assert found.confidence_N[0] == pytest.approx(math.sqrt(0.15) / total)
    assert found.margin_N[0] == pytest.approx((math.sqrt(0.15) - math.sqrt(0.12)) / total)
    assert assign(p_BK, q_BK, rule="similarity").labels_N[0] == 0
    assert assign(p_BK, q_BK, rule="boundary").confidence_N[0] == pytest.approx(0.5)


def test_witnesses_who_exclude_each_other_leave_it_to_the_boundaries():
    found = assign(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert found.labels_N[0] == 1
    assert math.isfinite(found.confidence_N[0])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=50))
def test_clusters_are_named_by_size(labels):
    renamed = by_size(np.array(labels), 5)[np.array(labels)]
    sizes = np.bincount(renamed, minlength=5)
    assert (np.diff(sizes) <= 0).all()
    assert len(set(zip(labels, renamed.tolist(), strict=True))) == len(set(labels))
    assert all(a != b or list(renamed).index(i) < list(renamed).index(i + 1) for i, (a, b) in pairs_in_use(sizes))


def pairs_in_use(sizes):
    return [(i, pair) for i, pair in enumerate(itertools.pairwise(sizes)) if pair[1] > 0]


def test_agreement_of_restarts():
    a, b = np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0])
    assert agreement([a]) is None
    assert agreement([a, b, a]) == 1
    assert len({seed_of(seed, restart) for seed in range(5) for restart in range(5)}) == 25


@pytest.mark.parametrize(("restarts", "images", "groups"), [(2, 50, 3), (5, 300, 40), (4, 7, 2), (3, 4, 4)])
def test_likeness_is_the_mean_adjusted_rand_index_to_the_others(restarts, images, groups):
    rng = np.random.default_rng(images)
    labels_RN = rng.integers(0, groups, (restarts, images)) * 3  # numbers may be left out
    labels_RN[1:] = np.where(rng.random((restarts - 1, images)) < 0.5, labels_RN[0], labels_RN[1:])
    expected = [
        np.mean([adjusted_rand_score(one, other) for place, other in enumerate(labels_RN) if place != own])
        for own, one in enumerate(labels_RN)
    ]
    np.testing.assert_allclose(likeness(labels_RN), expected, atol=1e-12)


def test_likeness_of_groupings_that_say_nothing():
    one, single = np.zeros(5, int), np.arange(5)
    assert likeness([one, one]).tolist() == likeness([single, single, single])[:2].tolist() == [1, 1]
    assert likeness([one, single]).tolist() == [0, 0]
    assert likeness([single]).tolist() == [0]


def on_circle(degrees):
    radians = np.deg2rad(np.asarray(degrees, np.float32))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_typicality_is_the_cosine_to_the_mean_direction():
    x_ND, labels_N = on_circle([0, 90, 180]), np.array([0, 0, 1])
    centre_KD = representatives.centres(x_ND, labels_N, 3)
    np.testing.assert_allclose(centre_KD, [*on_circle([45, 180]), [0, 0]], atol=1e-6)
    typicality_N = representatives.typicality(x_ND, labels_N, centre_KD)
    np.testing.assert_allclose(typicality_N, [math.sqrt(0.5), math.sqrt(0.5), 1], rtol=1e-6)
    found = representatives.cohesion(typicality_N, labels_N, 3)
    np.testing.assert_allclose(found, [math.sqrt(0.5), 1, 0], rtol=1e-6)


def test_representatives_are_typical_diverse_and_never_twice():
    # 60 copies of the centre must not fill the row: an image 10 degrees away comes in.
    x_ND = on_circle([0] * 60 + [10, -10] * 20)
    labels_N = np.zeros(100, np.int64)
    centre_KD = representatives.centres(x_ND, labels_N, 2)
    typicality_N = representatives.typicality(x_ND, labels_N, centre_KD)
    chosen, none = representatives.choose(x_ND, labels_N, typicality_N, 2)
    assert none == []
    assert len(chosen) == len(set(chosen)) == 12
    assert (np.diff(typicality_N[chosen]) <= 1e-6).all()


def test_what_is_far_from_the_centre_shows_no_cluster():
    # 80 images about one direction and 20 in directions of their own, which differ most from what is chosen.
    x_ND = np.eye(21, dtype=np.float32)[[0] * 80 + list(range(1, 21))]
    x_ND[:80] += np.random.default_rng(0).normal(scale=0.01, size=(80, 21))
    labels_N = np.zeros(100, np.int64)
    typicality_N = representatives.typicality(x_ND, labels_N, representatives.centres(x_ND, labels_N, 1))
    (chosen,) = representatives.choose(x_ND, labels_N, typicality_N, 1)
    assert len(chosen) == 12
    assert max(chosen) < 80


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_a_cluster_is_shown_by_its_own_members(labels):
    labels_N = np.array(labels)
    x_ND = on_circle(np.random.default_rng(0).uniform(0, 360, len(labels)))
    centre_KD = representatives.centres(x_ND, labels_N, 4)
    typicality_N = representatives.typicality(x_ND, labels_N, centre_KD)
    for cluster, rows in enumerate(representatives.choose(x_ND, labels_N, typicality_N, 4)):
        assert len(rows) == len(set(rows)) == min(12, labels.count(cluster))
        assert all(labels[row] == cluster for row in rows)


def test_the_temperature_moves_confidence_and_no_image():
    generator = torch.Generator().manual_seed(0)
    p_BK, q_BK = torch.rand(50, 4, generator=generator).softmax(1), torch.rand(50, 4, generator=generator).softmax(1)
    plain, sure = assign(p_BK, q_BK), assign(p_BK, q_BK, temperature=0.5)
    assert np.array_equal(plain.labels_N, sure.labels_N)
    # At half the temperature the geometric mean is squared: the product of both, normalised.
    product_BK = p_BK * q_BK
    expected_B = (product_BK.amax(dim=1) / product_BK.sum(dim=1)).numpy()
    np.testing.assert_allclose(sure.confidence_N, expected_B, rtol=1e-5)


def test_the_temperature_is_that_of_the_law_and_falls_where_both_predictions_agree():
    assert calibrated_temperature(0.095, 100) == pytest.approx(0.41 * 0.1**0.21 * 100**0.27)
    assert calibrated_temperature(0.0, 100) < calibrated_temperature(0.1, 100) < calibrated_temperature(0.1, 200)
