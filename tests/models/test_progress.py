"""From the steps of stages to the progress of the whole."""

import pytest

from models.progress import Clock, Step


def steps(*done: int):
    for each in done:
        yield Step(done=each, total=4)


def test_stages_count_by_what_they_are_expected_to_cost():
    clock = Clock({"features": 90.0, "training": 10.0})
    fractions = [step.fraction for stage in ("features", "training") for step in clock.follow(stage, steps(0, 2, 4))]
    assert fractions == pytest.approx([0, 0.45, 0.9, 0.9, 0.95, 1])


def test_what_lay_in_the_cache_costs_nothing():
    clock = Clock({"features": 80.0, "training": 10.0})
    fractions = [step.fraction for step in clock.follow("features", steps(3, 4), ready=True)]
    assert fractions == pytest.approx([0, 20 / 30])
    clock = Clock({"features": 80.0, "training": 10.0})
    fractions = [step.fraction for step in clock.follow("features", steps(4), ready=True)]
    fractions += [step.fraction for step in clock.follow("training", steps(0, 2, 4))]
    assert fractions == pytest.approx([0, 0, 0.5, 1])
