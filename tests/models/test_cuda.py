"""On a GPU: what the other tests show on the CPU has to hold there as well. All are skipped where there is none.

`pytest tests/models/test_cuda.py --noconftest` needs no more than what `models` imports.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from models import backbones, graphs, heads, metrics, space, views
from models.backbones import torch_encoder
from models.baselines import scan, temi
from models.baselines.cc import Cc
from models.baselines.pica import Pica
from models.baselines.simclr import Simclr
from models.features import Source
from models.full import FullConfig, Stopped, Training
from models.progress import finish
from models.scl import Scl
from models.train import Config, group
from tests.checkpoints import steps_done
from tests.models.full_run import SETTINGS, Remembering, pictures
from tests.pictures import two_kinds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
]
OBJECTIVES = pytest.mark.parametrize("objective", [Remembering, Scl, Simclr, Cc, Pica])


@pytest.fixture(autouse=True)
def _all_digits():
    """No 19-bit products, and sums in one order: what is left of a difference is rounding."""
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before


def make(device, *, objective=Remembering, config=None, **options):
    exact = FullConfig(batch=16, precision="float32", optimizer="sgd", learning_rate=0.01)
    settings = {**SETTINGS, "objective": objective, "config": config or exact, **options}
    return Training(pictures()[0], device=device, **settings)


def losses_of(training):
    """The loss of every step that is left."""
    losses, plain = [], training.step

    def step(rows_G, pixels_BSSC):
        details = plain(rows_G, pixels_BSSC)
        losses.append(details["loss"].item())
        return details

    training.step = step
    for _ in training.run():
        pass
    return losses


@pytest.mark.parametrize("size", [32, 96])  # the larger ones are blurred too
def test_views_are_those_of_the_cpu(size):
    pixels_BHWC = torch.from_numpy(pictures(16, size)[0])
    strong = views.augmentation("strong", image_size=size)
    choices = views.draw(strong, 16, torch.Generator().manual_seed(0))
    settings = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    expected = views.view(pixels_BHWC, choices, **settings)
    found = views.view(pixels_BHWC.cuda(), choices.to("cuda"), **settings)
    assert found.device.type == "cuda"
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=0)


@OBJECTIVES
def test_in_float32_a_training_is_that_of_the_cpu(objective):
    expected, found = (losses_of(make(device, objective=objective)) for device in ("cpu", "cuda"))
    assert len(found) == len(expected) == 9
    np.testing.assert_allclose(found[:3], expected[:3], rtol=0.01)
    # Rounding flips some rectifiers, and batches of 16 make much of it.
    np.testing.assert_allclose(found, expected, rtol=0.25)


@OBJECTIVES
def test_by_default_it_trains_in_bfloat16_and_channels_last(objective):
    training = make("cuda", objective=objective, config=FullConfig(batch=16), epochs=12)
    assert training.precision == torch.bfloat16
    losses = losses_of(training)
    assert np.isfinite(losses).all()
    filters = next(p for p in training.network.parameters() if p.dim() == 4)
    assert filters.is_contiguous(memory_format=torch.channels_last)
    assert filters.dtype == torch.float32
    features_NF = finish(training.features())
    assert np.isfinite(features_NF).all()
    fit = finish(training.objective.answer(features_NF, seed=0, restarts=2))
    assert fit.assignment.labels_N.shape == (48,)


@pytest.mark.parametrize("objective", [Scl, Simclr, Cc, Pica])
def test_recorded_steps_are_those_of_kernel_by_kernel(objective):
    config = FullConfig(batch=16, precision="float32")
    # 50 images are batches of 17, 17 and 16: two shapes, and SCL and PICA have two phases.
    recorded, plain = (
        Training(pictures(50)[0], **{**SETTINGS, "objective": objective, "epochs": 12, "config": config}, device="cuda")
        for _ in range(2)
    )
    plain.recorder = None
    expected, found = losses_of(plain), losses_of(recorded)
    assert len(recorded.recorder.recordings) == (4 if objective in (Scl, Pica) else 2)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


class Peeking(Simclr):
    """Asks the GPU for a number in the middle of its loss, which no recording can hold."""

    def loss(self, h_VBF, rows_B):
        assert h_VBF.abs().sum().item() > 0
        return super().loss(h_VBF, rows_B)


def test_after_a_step_that_cannot_be_recorded_the_training_goes_on(caplog):
    settings = {"config": FullConfig(batch=16, precision="float32"), "epochs": 4}
    expected = losses_of(make("cuda", objective=Simclr, **settings))
    training = make("cuda", objective=Peeking, **settings)
    found = losses_of(training)
    assert not training.recorder.recordings
    assert [record.getMessage()[:27] for record in caplog.records] == ["a step cannot be recorded, "]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_where_there_is_no_room_for_a_second_step_none_is_recorded(caplog, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_MEMORY", 0.0)
    training = make("cuda", objective=Simclr, config=FullConfig(batch=16, precision="float32"))
    with caplog.at_level(logging.INFO, "models.graphs"):
        assert len(losses_of(training)) == 9
    assert not training.recorder.recordings
    assert [record.getMessage()[:21] for record in caplog.records] == ["the GPU has no memory"]


def test_scl_tells_three_patterns_apart():
    pixels, kind_N = pictures(96)
    config = FullConfig(batch=32)
    training = Training(pixels, **{**SETTINGS, "objective": Scl, "epochs": 12, "config": config}, device="cuda")
    assert len(losses_of(training)) == 36
    fit = finish(training.objective.answer(finish(training.features()), seed=0, restarts=3))
    assert metrics.quality([str(kind) for kind in kind_N], fit.assignment.labels_N)["acc"] == 1


def test_bfloat16_features_are_those_of_float32():
    exact, half = make("cuda"), make("cuda", config=FullConfig(batch=16))
    expected, found = finish(exact.features()), finish(half.features())
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


@OBJECTIVES
def test_a_stopped_training_goes_on_where_it_was(objective, tmp_path):
    undisturbed = losses_of(make("cuda", objective=objective))
    steps = 0

    def stop():
        nonlocal steps
        steps += 1
        return steps == 5

    first = make("cuda", objective=objective, checkpoint_dir=tmp_path, stop=stop)
    with pytest.raises(Stopped):
        losses_of(first)
    rest = losses_of(make("cuda", objective=objective, checkpoint_dir=tmp_path))
    assert len(rest) == 4
    np.testing.assert_allclose(rest, undisturbed[5:], rtol=1e-3)


def test_a_stopped_training_of_recorded_steps_goes_on_where_it_was(tmp_path):
    settings = {"objective": Scl, "epochs": 12, "config": FullConfig(batch=16, precision="float32")}
    undisturbed = losses_of(make("cuda", **settings))
    steps = 0

    def stop():
        nonlocal steps
        steps += 1
        return steps == 26  # of 36, in the phase with clusters

    first = make("cuda", checkpoint_dir=tmp_path, stop=stop, **settings)
    with pytest.raises(Stopped):
        losses_of(first)
    second = make("cuda", checkpoint_dir=tmp_path, **settings)
    rest = losses_of(second)
    assert len(first.recorder.recordings) == 2
    assert len(second.recorder.recordings) == 1
    np.testing.assert_allclose(rest, undisturbed[26:], rtol=1e-2)


def start(out, *options, processes=1):
    out.mkdir(parents=True, exist_ok=True)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone")
    script = ("-m", "tests.models.full_run", "--device", "cuda", "--out", str(out), *options)
    command = [sys.executable, *(torchrun if processes > 1 else ()), *script]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def losses_in(out, rank=0):
    return json.loads((out / f"losses-{rank}.json").read_text())


def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path):
    assert start(tmp_path / "undisturbed").wait(120) == 0
    kept = ("--checkpoint", str(tmp_path / "kept"))
    process = start(tmp_path / "out", *kept, "--slow")
    while steps_done(tmp_path / "kept") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    before = steps_done(tmp_path / "kept")
    assert start(tmp_path / "out", *kept).wait(120) == 0
    rest = losses_in(tmp_path / "out")
    assert len(rest) == 9 - before
    np.testing.assert_allclose(rest, losses_in(tmp_path / "undisturbed")[before:], rtol=0.01)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--shared",), id="on-one-gpu-by-gloo"),
        pytest.param(
            (),
            id="on-two-gpus-by-nccl",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs on this machine"),
        ),
    ],
)
def test_two_processes_compute_what_one_does(options, tmp_path):
    assert start(tmp_path / "1", "--double").wait(120) == 0
    assert start(tmp_path / "2", "--double", *options, processes=2).wait(120) == 0
    assert losses_in(tmp_path / "2", 0) == losses_in(tmp_path / "2", 1)
    np.testing.assert_allclose(losses_in(tmp_path / "2"), losses_in(tmp_path / "1"), rtol=1e-4)


@pytest.fixture(scope="module")
def groups():
    """1,200 feature vectors of six groups that overlap."""
    rng = np.random.default_rng(0)
    class_N = rng.permutation(np.repeat(np.arange(6), 200))
    features_NF = rng.normal(size=(6, 64))[class_N] + rng.normal(size=(1200, 64))
    return features_NF.astype(np.float16), class_N


@pytest.mark.parametrize("train", [heads.train, temi.train, scan.train], ids=["scl", "temi", "scan"])
def test_heads_group_as_on_the_cpu(train, groups):
    features_NF, class_N = groups
    found = [
        finish(train(features_NF, clusters=6, epochs=8, restarts=6, seed=0, device=device)).assignment
        for device in ("cpu", "cuda")
    ]
    assert adjusted_rand_score(found[0].labels_N, found[1].labels_N) > 0.95
    assert abs(found[0].confidence_N.mean() - found[1].confidence_N.mean()) < 0.02
    assert adjusted_rand_score(class_N, found[1].labels_N) > 0.8


def test_neighbours_are_those_of_the_cpu(groups):
    x_ND = space.unit(groups[0])
    expected, found = (space.nearest(x_ND, 15, device=device) for device in ("cpu", "cuda"))
    assert found.shape == (1200, 15)
    same = [len(set(one) & set(other)) for one, other in zip(expected.tolist(), found.tolist(), strict=True)]
    assert np.mean(same) > 14.9  # but for those that are as near as each other
    assert not (found == np.arange(1200)[:, None]).any()


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_features_of_a_backbone_are_those_of_the_cpu(name):
    weights = None if name == "efficientnet_lite0" else "random"
    pixels_BHWC = pictures(32, 64)[0]
    if weights is None:
        expected = backbones.encoder(name, weights=None, image_size=64, threads=2, device="cpu")(pixels_BHWC)
        found = backbones.encoder(name, weights=None, image_size=64, threads=2, device="cuda")(pixels_BHWC)
    else:
        torch.manual_seed(0)
        network = backbones.networks.network(name, weights=weights, image_size=64)
        expected = torch_encoder(network, device="cpu")(pixels_BHWC)
        found = torch_encoder(network, device="cuda")(pixels_BHWC)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((found * expected).sum(axis=1) / lengths).min() > 0.995


@pytest.mark.parametrize("train", ["head", "finetune", "full"])
def test_a_collection_is_grouped_from_its_files(train, tmp_path):
    files = two_kinds(40)
    sources, truth = [], []
    for name, content in files.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        sources.append(Source(key=name, path=path))
        truth.append(path.parent.name)
    full = {"backbone": "resnet18", "weights": "random", "epochs": 4} if train == "full" else {}
    config = Config(clusters=2, train=train, image_size=32, **full)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grouping = finish(group(config, sources, cache_dir=tmp_path / "cache", truth=truth))  # the GPU, unasked
    assert torch.cuda.max_memory_allocated() > before
    assert grouping.metrics["quality"]["acc"] == 1
    assert np.isfinite(grouping.confidence_N).all()
