import numpy as np
import pytest

from benchmarks import choices
from models import heads


@pytest.fixture
def groups():
    """Features of six far groups of 40 images each, and their names."""
    rng = np.random.default_rng(0)
    class_N = np.repeat(np.arange(6), 40)
    features_NF = rng.normal(size=(6, 64))[class_N] * 3 + rng.normal(size=(240, 64))
    return features_NF.astype(np.float16), [str(label) for label in class_N]


def test_a_choice_is_scored_with_every_seed(groups):
    features_NF, truth = groups
    assert choices.group(features_NF, truth, choices.CHOICES["as it is"]) == [[1.0, 1.0, 1.0]] * choices.SEEDS


@pytest.mark.parametrize("name", ["k-means", pytest.param("SCAN", marks=pytest.mark.slow)])
def test_a_baseline_is_scored_on_the_same_features(groups, name, monkeypatch):
    features_NF, truth = groups
    monkeypatch.setattr(heads, "train", None)  # it is not SCL that answers
    assert choices.group(features_NF, truth, choices.CHOICES[name]) == [[1.0, 1.0, 1.0]] * choices.SEEDS


def test_all_restarts_answer_only_where_the_choice_says_so(groups, monkeypatch):
    features_NF, truth = groups
    asked = []
    rule = heads.staying
    monkeypatch.setattr(heads, "staying", lambda restarts: asked.append(restarts) or rule(restarts))
    choices.group(features_NF, truth, choices.Choice(restarts=6, all_answer=True))
    assert asked == []  # replaced, so that all six go on
    choices.group(features_NF, truth, choices.Choice(restarts=6))
    assert asked == [6, 6]
    assert heads.staying(6) == 4
