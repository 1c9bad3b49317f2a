import logging

import pytest
import torch

from models.graphs import UNRECORDED, Recorder
from models.views import augmentation, draw


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so the step can be recorded")
def test_what_cannot_be_recorded_runs_as_it_is(caplog):
    done = []

    def step(rows_B, pixels_BSSC, choices):
        done.append((rows_B, pixels_BSSC, choices[0].gray_B))
        return {"loss": rows_B.sum()}

    recorder, choices = Recorder(), draw(augmentation("strong", image_size=8), 4, torch.Generator())
    rows_B, pixels_BSSC = torch.arange(4), torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    with caplog.at_level(logging.WARNING):
        losses = [recorder(step, "always", rows_B, pixels_BSSC, [choices])["loss"] for _ in range(UNRECORDED + 3)]
    assert losses == [6] * (UNRECORDED + 3)
    assert all(found[0] is rows_B and torch.equal(found[2], choices.gray_B) for found in done)
    assert not recorder.recordings
    assert len(caplog.records) == 1
    assert "cannot be recorded" in caplog.records[0].getMessage()
