"""Large blocks are reused during a training, and given back after it."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from models import allocator
from models.full import FullConfig, Training
from models.scl import Scl
from tests.models.full_run import pictures

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is what is asked")
MIB = 2**20
PAGES_OF_A_BLOCK = 64 * MIB // resource.getpagesize()


def faults_of_blocks() -> int:
    """Pages that the system had to hand out for sixteen blocks of 64 MiB, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(16):
        torch.empty(64 * MIB, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def held_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_freed_blocks_are_reused_inside_and_given_back_afterwards():
    before = held_bytes()
    with allocator.freed_memory_kept():
        faults_of_blocks()  # what the process holds free already may be too small for a block
        assert faults_of_blocks() < PAGES_OF_A_BLOCK / 10
        assert held_bytes() > before + 32 * MIB
    assert held_bytes() < before + 32 * MIB


def test_a_training_keeps_what_it_frees_until_it_ends():
    training = Training(
        pictures(40)[0],
        objective=Scl,
        backbone="resnet10_slim",
        weights="random",
        clusters=3,
        epochs=2,
        seed=0,
        config=FullConfig(batch=20),
    )
    steps = training.run()
    next(steps)
    faults_of_blocks()
    assert faults_of_blocks() < PAGES_OF_A_BLOCK / 10
    held = held_bytes()
    steps.close()
    assert held_bytes() < held - 32 * MIB
