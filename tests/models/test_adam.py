import subprocess
import sys

import pytest
import torch

from models.adam import Adam


def test_its_steps_are_those_of_torch():
    torch.manual_seed(0)
    ours = [torch.randn(5, 3, 2), torch.randn(5, 4)]
    theirs = [parameter.clone().requires_grad_() for parameter in ours]
    adam, twin = Adam(ours), torch.optim.Adam(theirs, lr=0.1)
    for rate in (0.1, 0.05, 0.01):
        gradients = [torch.randn_like(parameter) for parameter in ours]
        adam.step(ours, gradients, learning_rate=rate)
        twin.param_groups[0]["lr"] = rate
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        twin.step()
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_what_is_left_behind_changes_nothing_for_the_rest():
    torch.manual_seed(0)
    alone, among = torch.randn(2, 3), torch.randn(5, 3)
    among[[4, 1]] = alone
    few, many = Adam([alone]), Adam([among])
    gradient = torch.randn(5, 3)
    few.step([alone], [gradient[[4, 1]]], learning_rate=0.1)
    many.step([among], [gradient], learning_rate=0.1)
    many.keep([4, 1])
    among = among[[4, 1]]
    gradient = torch.randn(2, 3)
    few.step([alone], [gradient], learning_rate=0.1)
    many.step([among], [gradient], learning_rate=0.1)
    assert torch.equal(alone, among)


TRAINING = """
import sys
import numpy as np
import worker.trainer
from models import heads
from models.progress import finish
features_NF = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float16)
finish(heads.train(features_NF, clusters=2, epochs=2, restarts=5, seed=0))
print([name for name in ("torch._dynamo", "torchvision", "timm") if name in sys.modules])
"""


@pytest.mark.slow
def test_a_head_trains_without_the_compiler_and_networks_that_it_does_not_use():
    found = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
