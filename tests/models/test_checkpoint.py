import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from models import checkpoint, full
from models.baselines.cc import Cc
from models.baselines.pica import Pica
from models.baselines.simclr import Simclr
from models.checkpoint import Checkpoint, Damaged, OtherRun
from models.full import FullConfig
from models.progress import finish
from models.scl import Scl
from tests.checkpoints import steps_done
from tests.models.full_run import SETTINGS, Remembering, pictures

RUN = {"seed": 1, "engine": {"batch": 16}, "weights": None}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state(done):
    torch.manual_seed(done)
    tensors = {
        "network.weight": torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last),
        "optimizer.0.step": torch.tensor(float(done)),
        "random.torch": torch.get_rng_state(),
        "half": torch.randn(7).bfloat16(),
        "count": torch.tensor([done]),
        "nothing": torch.zeros(0, 3),
    }
    return Checkpoint(run=RUN, position={"done": done}, tensors=tensors)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    checkpoint.save(tmp_path / "new", state(3))
    found = checkpoint.load(tmp_path / "new", run=RUN)
    assert found.position == {"done": 3}
    for name, tensor in state(3).tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name


def test_there_is_none_at_first(tmp_path):
    assert checkpoint.load(tmp_path / "no folder", run=RUN) is None


def test_the_newest_and_the_one_before_are_kept(tmp_path):
    for done in (1, 2, 3):
        checkpoint.save(tmp_path, state(done))
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.PREVIOUS, checkpoint.NEWEST]
    assert checkpoint.load(tmp_path, run=RUN).position == {"done": 3}


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "header", "gone"])
def test_a_damaged_one_is_passed_over_for_the_one_before(tmp_path, damage):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    newest = tmp_path / checkpoint.NEWEST
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        newest.write_bytes(content[:-100])
    elif damage == "flipped":
        content[-100] ^= 1
        newest.write_bytes(content)
        with pytest.raises(Damaged, match="not what was written"):
            checkpoint.read(newest)
    elif damage == "emptied":
        newest.write_bytes(b"")
    elif damage == "header":
        newest.write_bytes(b"\xff" * 200)
    else:
        newest.unlink()
    assert checkpoint.load(tmp_path, run=RUN).position == {"done": 1}
    # The damaged one must not push the good one out.
    checkpoint.save(tmp_path, state(3))
    assert checkpoint.read(tmp_path / checkpoint.PREVIOUS).position == {"done": 1} or damage == "gone"
    assert checkpoint.load(tmp_path, run=RUN).position == {"done": 3}


def test_what_cannot_be_read_now_is_kept(tmp_path):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            checkpoint.load(tmp_path, run=RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert checkpoint.load(tmp_path, run=RUN).position == {"done": 2}


def test_processes_that_find_the_same_damage_go_on_alike(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    (tmp_path / checkpoint.NEWEST).write_bytes(b"")
    both, plain = Barrier(2), checkpoint.read

    def read(path):
        try:
            return plain(path)
        except Damaged:
            both.wait(10)  # neither clears it away before the other has seen it
            raise

    monkeypatch.setattr(checkpoint, "read", read)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: checkpoint.load(tmp_path, run=RUN), range(2)))
    assert [each.position for each in found] == 2 * [{"done": 1}]


def test_all_damaged_is_a_fresh_start(tmp_path):
    for done in (1, 2):
        checkpoint.save(tmp_path, state(done))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert checkpoint.load(tmp_path, run=RUN) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 2}, "seed is 1 there, 2 here"),
        ({"engine": {"batch": 32}}, r"engine is \{'batch': 16\} there, \{'batch': 32\} here"),
        ({"images": "abc"}, "images is None there, 'abc' here"),
    ],
)
def test_another_runs_checkpoint_is_refused_and_kept(tmp_path, other, message):
    checkpoint.save(tmp_path, state(1))
    with pytest.raises(OtherRun, match=message):
        checkpoint.load(tmp_path, run={**RUN, **other})
    assert checkpoint.load(tmp_path, run=RUN).position == {"done": 1}


class Killed(BaseException):
    pass


def end_of(training):
    """All that a training leaves: weights, memory, optimiser, labels."""
    for _ in training.run():
        pass
    fit = finish(training.objective.answer(finish(training.features()), seed=5, restarts=1))
    tensors = {**training.network.state_dict(), **training.objective.state_dict()}
    for number, moments in training.optimizer.state_dict()["state"].items():
        tensors |= {f"{number}.{name}": value for name, value in moments.items()}
    tensors["views"], tensors["random"] = training.generator.get_state(), training.random["cpu"]
    tensors["labels"] = torch.from_numpy(fit.assignment.labels_N)
    return tensors


def make(tmp_path, *, optimizer="adamw", **options):
    config = FullConfig(batch=16, optimizer=optimizer)
    settings = {**SETTINGS, "config": config, "checkpoint_dir": tmp_path, "checkpoint_every_s": 0.0, **options}
    return full.Training(pictures()[0], **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "optimizer"),
    [
        (Remembering, "adamw"),
        (Remembering, "sgd"),
        (Scl, "adamw"),
        (Scl, "sgd"),
        (Simclr, "adamw"),
        (Cc, "adamw"),
        (Pica, "adamw"),
    ],
)
def test_a_training_killed_again_and_again_ends_with_the_same_bits(tmp_path, objective, optimizer):
    undisturbed = end_of(make(None, objective=objective, optimizer=optimizer))
    done = 0
    for steps in (1, 2, 1, 3, 1):  # that one gets to see, of 9 in epochs of 3; the last of them is lost
        asked = iter(range(1, steps + 1))

        def kill(asked=asked, steps=steps):
            if next(asked) == steps:
                raise Killed
            return False

        training = make(tmp_path, objective=objective, optimizer=optimizer, stop=kill)
        torch.manual_seed(99)  # a new process knows nothing of the old one's generator
        running = training.run()
        assert next(running).done == done
        with pytest.raises(Killed):
            for _ in running:
                pass
        done += steps - 1
    resumed = make(tmp_path, objective=objective, optimizer=optimizer)
    torch.manual_seed(99)
    ended = end_of(resumed)
    assert undisturbed.keys() == ended.keys()
    for name, value in undisturbed.items():
        assert torch.equal(value, ended[name]), name


def test_after_the_last_step_only_the_answer_is_left(tmp_path):
    first = end_of(make(tmp_path))
    again = make(tmp_path)
    assert [step.done for step in again.run()] == [9]
    fit = finish(again.objective.answer(finish(again.features()), seed=5, restarts=1))
    assert np.array_equal(first["labels"], fit.assignment.labels_N)


@pytest.mark.slow
def test_a_stop_saves_and_says_so(tmp_path):
    undisturbed = end_of(make(None))
    stopping = make(tmp_path, checkpoint_every_s=1e9, stop=lambda: True)
    with pytest.raises(full.Stopped, match="after 1 of 9 steps"):
        for _ in stopping.run():
            pass
    resumed = make(tmp_path)
    assert next(resumed.run()).done == 1
    for name, value in end_of(make(tmp_path)).items():
        assert torch.equal(value, undisturbed[name]), name


def test_settings_images_and_objective_identify_a_run(tmp_path):
    end_of(make(tmp_path, epochs=1))
    for other, message in (
        ({"epochs": 2}, "epochs is 1 there, 2 here"),
        ({"seed": 6}, "seed is 5 there, 6 here"),
        ({"clusters": 4}, "clusters is 3 there, 4 here"),
        ({"config": FullConfig(batch=24)}, "engine is"),
        ({"images_digest": "another"}, "images is"),
    ):
        with pytest.raises(OtherRun, match=message):
            next(make(tmp_path, **{"epochs": 1, **other}).run())


def start(tmp_path, *more):
    command = [sys.executable, "-m", "tests.models.full_run", "--out", str(tmp_path), *more]
    return subprocess.Popen(command, start_new_session=True)


@pytest.mark.slow
def test_a_killed_process_goes_on_and_a_told_one_leaves(tmp_path):
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    assert start(tmp_path / "undisturbed").wait() == 0
    kept = ("--checkpoint", str(tmp_path / "kept"), "--slow")
    for sent, status, least in ((signal.SIGKILL, -signal.SIGKILL, 2), (signal.SIGTERM, 75, 4)):
        process = start(tmp_path / "disturbed", *kept)
        while steps_done(tmp_path / "kept") < least:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, sent)
        assert process.wait(30) == status
        assert 0 < steps_done(tmp_path / "kept") < 9
    assert start(tmp_path / "disturbed", *kept).wait() == 0
    losses = [json.loads((tmp_path / name / "losses-0.json").read_text()) for name in ("undisturbed", "disturbed")]
    assert 0 < len(losses[1]) < len(losses[0]) == 9
    assert losses[1] == losses[0][-len(losses[1]) :]
    ends = [np.load(tmp_path / name / "end.npz") for name in ("undisturbed", "disturbed")]
    assert ends[0].files == ends[1].files
    for name in ends[0].files:
        assert np.array_equal(ends[0][name], ends[1][name]), name
