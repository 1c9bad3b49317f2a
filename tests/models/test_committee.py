import numpy as np
import pytest

from models import committee
from models.heads import HeadConfig
from tests.models.test_heads import train


@pytest.mark.parametrize("rule", ["consensus", "similarity", "boundary"])
def test_many_images_are_answered_as_few_are(blobs, monkeypatch, rule):
    """Of many, a part tells how often both predictions differ, here never; then all are answered by blocks."""
    features_NF, _ = blobs
    few = train(features_NF, config=HeadConfig(rule=rule))[1].assignment
    assert few.consensus_N.all()
    monkeypatch.setattr(committee, "SURVEYED", 100)
    many = train(features_NF, config=HeadConfig(rule=rule))[1].assignment
    assert np.array_equal(many.labels_N, few.labels_N)
    np.testing.assert_allclose(many.confidence_N, few.confidence_N, rtol=1e-5)


def test_the_central_restart_scores_well_and_is_like_the_others():
    labels_RS = np.array([[0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    assert committee.central(labels_RS, [0.1, 0.0, 0.05]) == 2
    assert committee.central(labels_RS, [9.0, 0.0, 0.05]) == 0
