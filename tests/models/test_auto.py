import json

import numpy as np
import pytest
from scipy.sparse.csgraph import laplacian
from sklearn.neighbors import kneighbors_graph

from models import auto
from models.auto import Evidence
from models.config import InputError
from tests.models.conftest import finish


def estimate(features_NF, seed=0):
    return finish(auto.estimate(features_NF, seed=seed))[1]


def groups(count, images, *, spread=0.4, seed=0):
    """`count` far groups, as float16 features."""
    rng = np.random.default_rng(seed)
    corner_KF = rng.normal(size=(count, 48))
    return (np.repeat(corner_KF, images, axis=0) + spread * rng.normal(size=(count * images, 48))).astype(np.float16)


def evidence(*, gap, height, reproduced):
    return Evidence(gap_G=np.array(gap), height_G=np.array(height), reproduced_G=np.array(reproduced))


@pytest.mark.parametrize(("count", "images"), [(2, 40), (3, 100), (5, 20), (12, 30), (30, 20)])
def test_groups_that_lie_apart_are_counted(count, images):
    found = estimate(groups(count, images))
    assert found.clusters == count
    assert found.interval == (count, count)
    assert found.clarity == 1


def test_groups_of_uneven_size_are_counted():
    features_NF = groups(6, 300)
    kept = np.concatenate([np.arange(300 * k, 300 * k + size) for k, size in enumerate([300, 200, 100, 60, 40, 30])])
    assert estimate(features_NF[kept]).clusters == 6


def test_a_large_collection_is_sampled(monkeypatch):
    monkeypatch.setattr(auto, "SAMPLE", 150)
    found = estimate(groups(5, 200))
    assert (found.clusters, found.sample_images, found.samples) == (5, 150, 5)


def test_without_a_clear_gap_the_witnesses_count_alike():
    # Gaps that hardly differ, widest after 4; 4 merges above the threshold; reproduced up to 9: (4 * 6 * 9)^(1/3) = 6.
    gap = [0.010, 0.010, 0.012, *[0.004] * 20]
    height = [0.9, 0.8, 0.7, 0.6, *[0.1] * 19]
    reproduced = [0.9, 0.6, 0.8, 0.8, 0.7, 0.7, 0.7, 0.76, *[0.5] * 15]
    one = evidence(gap=gap, height=height, reproduced=reproduced)
    assert one.votes == {"eigengap": 4, "height": 6, "reproduced": 9}
    assert one.clarity == 0
    found = auto.judge([one, one], most=100, sample_images=23)
    assert found.clusters == 6
    assert found.interval == (4, 9)
    assert found.steady is None  # 0.9 of two groups, which says little
    assert [other.clusters for other in found.rejected] == [4, 5, 7, 9]
    assert found.rejected[0].why == "named by eigengap in 2 of 2 samples; the mean of all is 6"
    assert found.rejected[1].why == "named by no witness"


def test_votes_of_samples_are_averaged_as_logarithms():
    # 2 and 8 make 4; without a high merge or a group found again the others name 2: (4 * 2 * 2)^(1/3) = 2.52.
    flat = {"height": [0.1] * 12, "reproduced": [0.5] * 12}
    low, high = ([0.001 + 0.009 * (number == at) for number in range(2, 14)] for at in (2, 8))
    found = auto.judge([evidence(gap=low, **flat), evidence(gap=high, **flat)], most=100, sample_images=50)
    assert found.votes["eigengap"] == pytest.approx(4)
    assert found.clusters == 3
    assert found.ballots == {"eigengap": [2, 8], "height": [2, 2], "reproduced": [2, 2]}


def test_the_steady_number_is_the_most_groups_of_which_nine_tenths_come_out_again():
    flat = {"gap": [0.004] * 8, "height": [0.1] * 8}
    ones = [evidence(reproduced=[0.99, 0.95, 0.6, 0.95, at_6, 0.8, 0.7, 0.7], **flat) for at_6 in (0.99, 0.85)]
    found = auto.judge(ones, most=100, sample_images=50)  # 6 by the mean of both, and 3 and 5 too
    assert found.steady == 6


def test_a_clear_gap_decides_alone():
    one = evidence(gap=[0.01, 0.01, 0.3, *[0.005] * 20], height=[0.9] * 7 + [0.1] * 16, reproduced=[0.9] * 23)
    found = auto.judge([one], most=100, sample_images=23)
    assert (found.clusters, found.interval, found.clarity) == (4, (4, 4), 1)
    assert any("the eigengap after 4 stands out" in other.why for other in found.rejected)


def test_the_gaps_are_those_of_the_normalised_laplacian():
    # Its spectrum is 1 minus ours; by SciPy on scikit-learn's graph, once densely and once by Lanczos' method.
    rng = np.random.default_rng(0)
    x_SD = auto.unit(rng.normal(size=(200, 6)))
    one_way = kneighbors_graph(x_SD, 20).toarray()
    spectrum = np.linalg.eigvalsh(laplacian(one_way + one_way.T, normed=True))
    for most in (10, 45):
        np.testing.assert_allclose(auto.eigengaps(x_SD, most), np.diff(spectrum)[1:most], atol=1e-5)


def test_groups_that_match_by_hand():
    # Group 0 shares 2 of 4 with its match, group 1 shares 2 of 3 with its own: (3 * 2/4 + 2 * 2/3) / 5.
    own_S, theirs_S = np.array([0, 0, 0, 1, 1]), np.array([2, 2, 1, 1, 1])
    assert auto.matched(own_S, theirs_S, 3) == pytest.approx((3 * 2 / 3 + 2 * 2 / 3) / 5)
    assert auto.matched(own_S, own_S, 2) == 1


def test_structureless_data_has_no_high_merge():
    noise_SD = auto.unit(np.random.default_rng(1).normal(size=(300, 48)))
    height_G = auto.heights(noise_SD, 10, seed=0)
    assert height_G.max() < 1.1
    assert np.all(np.diff(height_G) <= 0)


def test_copies_are_groups():
    ten_NF = np.random.default_rng(2).normal(size=(10, 32)).astype(np.float16)
    assert estimate(np.repeat(ten_NF, 30, axis=0)).clusters == 10
    assert estimate(np.repeat(ten_NF[:2], [1, 200], axis=0)).clusters == 2


@pytest.mark.parametrize("images", [2, 3, 5, 15, 16, 17, 20, 33])
def test_a_small_collection_has_an_answer(images):
    found = estimate(np.random.default_rng(3).normal(size=(images, 24)).astype(np.float16))
    assert 2 <= found.interval[0] <= found.clusters <= found.interval[1] <= max(2, images // 2)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("images", [1, 2, 30, 1000])
def test_equal_images_are_refused(images):
    with pytest.raises(InputError, match=f"of {images} images no two differ"):
        estimate(np.ones((images, 8), np.float16))


def test_the_same_seed_gives_the_same_evidence_and_it_is_json():
    noise_NF = np.random.default_rng(4).normal(size=(200, 24)).astype(np.float16)
    steps, one = finish(auto.estimate(noise_NF, seed=5))
    assert [step.done for step in steps] == [1, 2, 3, 4, 5]
    assert one == estimate(noise_NF, seed=5)
    assert one != estimate(noise_NF, seed=6)
    described = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert described == one.to_dict()
    assert [row["clusters"] for row in described["sweep"]] == list(range(2, 41))
    assert set(described["votes"]) < set(described["sweep"][0])
