"""How the pages say figures."""

import pytest

from app import cli
from app.web import wording
from models.config import Config
from models.train import expected_cost_s


@pytest.mark.parametrize(
    ("share", "words"),
    [(0, "0%"), (0.001, "<1%"), (0.5, "50%"), (0.9949, "99%"), (0.9975, ">99%"), (1, "100%")],
)
def test_a_share_is_not_rounded_to_all_or_nothing(share: float, words: str):
    assert wording.percent(share) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (12.4, "12 s"), (59.7, "1 min 0 s"), (67, "1 min 7 s"), (7325, "2 h 2 min")]
)
def test_durations(seconds: float, words: str):
    assert wording.duration(seconds) == words


@pytest.mark.parametrize(
    ("bytes_", "words"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (21_250_062, "21 MB"), (5e12, "5000 GB")]
)
def test_file_sizes(bytes_: int, words: str):
    assert wording.filesize(bytes_) == words


def test_why_a_number_was_not_taken_is_said_in_words():
    said = wording.why_not("named by eigengap in 3 and reproduced in 2 of 5 samples; the mean of all is 8")
    assert said == (
        "said by “How far groups of neighbours lie apart” in 3 and “How alike are the groups of two halves” in 2 "
        "of 5 samples; the mean of all is 8"
    )
    assert wording.why_not("named by no witness") == "none of the three says so"
    assert [wording.vote(number) for number in (7.0, 6.89)] == ["7", "6.9"]


def test_every_stage_has_words_on_the_dashboard_and_on_the_command_line():
    stages = set(expected_cost_s(Config(clusters=2), 10))
    assert "encoding" in stages
    assert stages == set(wording.STAGES) == set(cli.STAGES) - {None, "done"}
