import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from models import distributed
from tests.checkpoints import steps_done
from tests.models.full_run import KINDS

SCRIPT = "tests.models.full_run"
# On one process, so that the trainings that they compare are run once.
TOGETHER = pytest.mark.xdist_group("processes")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", SCRIPT)


def start(out, *options, processes=2):
    out.mkdir(parents=True, exist_ok=True)
    command = TORCHRUN if processes == 2 else ("-m", SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command, "--out", str(out), *options], env=environment)


def losses(out, rank=0):
    return json.loads((out / f"losses-{rank}.json").read_text())


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(5), nn.BatchNorm2d(5, momentum=None), nn.BatchNorm2d(5, affine=False), BatchNormAct2d(5)],
)
def test_in_a_single_process_the_normalisation_is_torchs(layer):
    twin = nn.Sequential(type(layer)(5))
    twin[0].load_state_dict(layer.state_dict(), strict=False)
    twin[0].momentum, twin[0].affine = layer.momentum, layer.affine
    if layer.weight is None:
        twin[0].weight = twin[0].bias = None
    distributed.synchronised(twin, cuda=False)
    assert isinstance(twin[0], distributed.HostSyncBatchNorm)
    generator = torch.Generator().manual_seed(0)
    for training in (True, True, False):
        layer.train(training)
        twin.train(training)
        x = (3 + torch.randn(8, 5, 4, 4, generator=generator)).requires_grad_()
        ours, theirs = twin(x), layer(x)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        gradients = [torch.autograd.grad((y**3).sum(), x)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(twin[0].state_dict()[name], value, atol=1e-5, rtol=1e-5)


def test_alone_nothing_is_sent():
    h_VBF = torch.randn(2, 3, 4)
    assert distributed.gather(h_VBF) is h_VBF
    assert torch.equal(distributed.concatenate(h_VBF[0], rows=3), h_VBF[0])
    assert distributed.anywhere(True, device="cpu") is True
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folders of the same trainings in one and in two processes; see `full_run.KINDS`."""
    root = tmp_path_factory.mktemp("ran")
    for processes in (1, 2):
        assert start(root / str(processes), "--each", processes=processes).wait(280) == 0
    return root / "1", root / "2"


@pytest.mark.slow
@TOGETHER
@pytest.mark.parametrize("kind", ["double", "careful"])
def test_two_processes_compute_what_one_does(ran, kind):
    # Sums in another order: float64 hides all of it but the last digits, after nine steps too.
    one, two = (folder / kind for folder in ran)
    assert len(losses(one)) == 9
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-10)
    ends = [np.load(folder / "end.npz") for folder in (one, two)]
    assert ends[0].files == ends[1].files
    for name in ends[0].files:
        np.testing.assert_allclose(ends[1][name], ends[0][name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
@TOGETHER
@pytest.mark.parametrize("kind", KINDS)
def test_both_processes_see_the_same_loss(ran, kind):
    assert losses(ran[1] / kind, 0) == losses(ran[1] / kind, 1)


@pytest.mark.slow
@TOGETHER
def test_in_float32_the_first_losses_agree_and_the_rest_stay_close(ran):
    # Rounding flips some rectifiers, and batches of 16 make much of it: 1 % in the first three steps, 10 % in all.
    one, two = (losses(folder / "single") for folder in ran)
    np.testing.assert_allclose(two[:3], one[:3], rtol=0.01)
    np.testing.assert_allclose(two, one, rtol=0.1)


@pytest.mark.slow
@TOGETHER
def test_told_to_stop_both_processes_leave_one_checkpoint_and_go_on_from_it(ran, tmp_path):
    kept = ("--double", "--checkpoint", str(tmp_path / "kept"))
    process = start(tmp_path / "out", *kept, "--slow")
    while steps_done(tmp_path / "kept") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)  # torchrun passes it on to all
    assert process.wait(60) != 0
    assert 2 <= steps_done(tmp_path / "kept") < 9
    assert start(tmp_path / "out", *kept).wait(240) == 0
    rest = losses(tmp_path / "out")
    assert 0 < len(rest) < 9
    np.testing.assert_array_equal(rest, losses(ran[1] / "double")[-len(rest) :])
