import math

import numpy as np
import pytest
import torch
from torch import nn

from models import full, metrics, networks
from models.baselines.simclr import Simclr, SimclrConfig, nt_xent
from models.config import InputError
from models.full import FullConfig, Training
from models.objective import Objective
from tests.models.conftest import finish
from tests.models.full_run import SETTINGS, Remembering, pictures, train


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(pixels=None, *, config=None, **options):
    settings = {**SETTINGS, "epochs": 1, "config": config or FullConfig(batch=16), **options}
    return Training(pictures()[0] if pixels is None else pixels, **settings)


class Pull(Objective):
    """The simplest there is: every feature to one."""

    view_strengths = ("plain",)

    def loss(self, h_VBF, rows_B):
        return (h_VBF - 1).square().mean(), {"rows": rows_B.sum()}

    def answer(self, features_NF, *, seed, restarts):
        raise NotImplementedError


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_training_is_what_a_plain_loop_of_torch_computes(optimizer):
    pixels = pictures(16)[0]
    config = FullConfig(
        batch=16, optimizer=optimizer, precision="float32", warmup=0.5, weight_decay=0.1, learning_rate=0.002
    )
    training = make(pixels, objective=Pull, config=config, epochs=4)
    network = networks.network("resnet10_slim", weights="random", image_size=32)
    network.load_state_dict(training.network.state_dict())
    start = network.body.layers[0].weight.detach().clone()
    losses = [step.details["loss"] for step in training.run() if step.details]

    groups = [
        {"params": [p for p in network.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in network.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=1.0, fused=False, foreach=False)
    if optimizer == "sgd":
        plain = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True, foreach=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x_BCHW = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = []
    # Up over half of the four steps, then down a cosine: (0 + 1/4) / (1/2 + 1/4), (1/4 + 1/4) / (3/4), 1, 1/2.
    for rate in (1 / 3, 2 / 3, 1, 1 / 2):
        for group in plain.param_groups:
            group["lr"] = 0.002 * rate
        loss = (network(x_BCHW) - 1).square().mean()
        expected.append(loss.item())
        plain.zero_grad()
        loss.backward()
        plain.step()
    np.testing.assert_allclose(losses, expected, rtol=2e-3)
    # Adam's first steps follow the signs of gradients, so where one is next to nothing a weight may go astray.
    ours, theirs = (made.body.layers[0].weight for made in (training.network, network))
    assert (ours - theirs).abs().mean() < 0.1 * (theirs - start).abs().mean()


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own():
    training = make(pictures(50)[0], config=FullConfig(batch=16))
    orders = []
    for epoch in (0, 1, 0):
        batches = list(training.batches(epoch, 0))
        assert [len(rows_B) for rows_B, _ in batches] == [17, 17, 16]
        for rows_B, pixels_BSSC in batches:
            assert np.array_equal(pixels_BSSC.numpy(), training.pixels_NSSC[rows_B.numpy()])
        orders.append(torch.cat([rows_B for rows_B, _ in batches]).tolist())
    assert sorted(orders[0]) == list(range(50))
    assert orders[0] == orders[2] != orders[1]
    later = [rows_B.tolist() for rows_B, _ in training.batches(0, 2)]
    assert later == [orders[0][34:]]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    ends = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(ends))  # whatever the caller draws
        training = make(seed=seed)
        for _ in training.run():
            torch.rand(3)
        ends.append(finish(training.features())[1])
    assert np.array_equal(ends[0], ends[1])
    assert not np.array_equal(ends[0], ends[2])


def test_the_callers_random_numbers_stay_as_they_are():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    for _ in make().run():
        pass
    assert torch.equal(torch.rand(3), expected)


def test_features_are_those_of_the_images_themselves():
    training = make(config=FullConfig(batch=16, precision="float32"))
    for _ in training.run():
        pass
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x_BCHW = ((torch.from_numpy(pictures()[0]) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = training.network.eval()(x_BCHW).numpy()
    np.testing.assert_allclose(finish(training.features())[1], expected, atol=1e-4)
    half = make(config=FullConfig(batch=16, precision="bfloat16"))
    half.network.load_state_dict(training.network.state_dict())
    np.testing.assert_allclose(finish(half.features())[1], expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize(("backbone", "done"), [("resnet10_slim", [20, 40, 48]), ("efficientnet_lite0", [32, 48])])
def test_the_last_look_at_the_images_tells_how_far_it_is(backbone, done, monkeypatch):
    monkeypatch.setattr(full, "ENCODE_BATCH", 20)
    yielded, features_NF = finish(make(backbone=backbone).features())
    assert [step.done for step in yielded] == done
    assert {step.total for step in yielded} == {len(features_NF)} == {48}


@pytest.mark.parametrize("backbone", ["resnet10_slim", "efficientnet_lite0"])
def test_told_to_stop_it_looks_at_no_more_images(backbone, monkeypatch):
    monkeypatch.setattr(full, "ENCODE_BATCH", 32)
    asked = []
    training = make(backbone=backbone, stop=lambda: asked.append(1) or len(asked) > 1)
    with pytest.raises(full.Stopped, match="stopped while the images were encoded"):
        finish(training.features())
    assert len(asked) == 2


@pytest.mark.slow
def test_simclr_tells_three_patterns_apart():
    pixels, kind_N = pictures(96)
    steps = train(
        pixels,
        objective=Simclr,
        backbone="resnet10_slim",
        weights="random",
        clusters=3,
        epochs=3,
        restarts=3,
        seed=0,
        config=FullConfig(batch=32),
    )
    yielded, fit = finish(steps)
    assert metrics.quality([str(kind) for kind in kind_N], fit.assignment.labels_N)["acc"] == 1
    assert (yielded[0].done, yielded[-1].done, yielded[-1].total) == (0, 9, 9)
    assert fit.x_ND.shape == (96, 256)
    assert len(fit.scores) == 3


@pytest.mark.parametrize("images", [2, 3])
def test_a_few_images_are_enough(images):
    pixels = pictures(images)[0]
    options = {**SETTINGS, "clusters": 2, "epochs": 2, "restarts": 2}
    fit = finish(train(pixels, **{**options, "objective": Simclr}))[1]
    assert len(fit.assignment.labels_N) == images


def test_images_that_are_all_the_same_come_to_an_end():
    pixels = np.full((8, 32, 32, 3), 77, np.uint8)
    training = make(pixels, objective=Simclr)
    for _ in training.run():
        pass
    assert np.isfinite(finish(training.features())[1]).all()


def test_a_backbone_that_knows_something_learns_more_slowly_than_its_head():
    pixels = np.zeros((4, 64, 64, 3), np.uint8)
    config = FullConfig(learning_rate=0.02, pretrained_learning_rate=0.003)
    for weights, expected in ((None, 0.003), ("random", 0.02)):
        training = make(pixels, backbone="efficientnet_lite0", weights=weights, config=config)
        rate_of = {p: group["peak_rate"] for group in training.optimizer.param_groups for p in group["params"]}
        assert {rate_of[p] for p in training.network.parameters()} == {expected}
        assert {rate_of[p] for p in training.objective.parameters()} == {0.02}


def test_biases_and_normalisations_do_not_decay():
    decay_of = {p: group["weight_decay"] for group in make().optimizer.param_groups for p in group["params"]}
    for module in make().network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.dim() == 1
    assert {decay for p, decay in decay_of.items() if p.dim() == 1} == {0.0}
    assert {decay for p, decay in decay_of.items() if p.dim() > 1} == {1e-4}


def test_a_loss_that_is_no_number_ends_the_training():
    class Diverging(Pull):
        def loss(self, h_VBF, rows_B):
            loss, details = super().loss(h_VBF, rows_B)
            return loss * math.inf, details

    with pytest.raises(InputError, match=r"left the numbers by step 3: the loss is (nan|inf)"):
        finish(make(objective=Diverging).run())


def test_a_read_only_map_of_pixels_serves(tmp_path):
    np.save(tmp_path / "pixels.npy", pictures()[0])
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    ends = []
    for pixels in (pictures()[0], mapped):
        training = make(pixels)
        for _ in training.run():
            pass
        ends.append(finish(training.features())[1])
    assert np.array_equal(*ends)


def test_precision_follows_the_processor():
    bf16 = torch.cpu._is_avx512_bf16_supported()
    dense, grouped = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
    faster = torch.bfloat16 if bf16 else torch.float32
    assert full.precision("auto", "cpu", dense, image_size=32) == faster
    assert full.precision("auto", "cpu", grouped, image_size=64) == torch.float32
    assert full.precision("auto", "cpu", grouped, image_size=224) == faster
    assert full.precision("float32", "cpu", dense, image_size=32) == torch.float32
    assert full.precision("bfloat16", "cpu", grouped, image_size=32) == torch.bfloat16


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch": 1}, "batch is 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"pretrained_learning_rate": math.nan}, "pretrained_learning_rate is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
        ({"warmup": 1.0}, "warmup is 1"),
        ({"optimizer": "adam"}, "optimizer is 'adam'"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
    ],
)
def test_nonsense_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        FullConfig(**setting)


def test_one_image_is_too_few():
    with pytest.raises(InputError, match="1 images are too few"):
        make(pictures(1)[0])


def test_nt_xent_is_the_papers_sum():
    # Equation 1 and algorithm 1 of Chen et al. 2020, image by image.
    z = torch.nn.functional.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    pairs = [(0, 3), (1, 4), (2, 5)]

    def cost(i, j):
        others = sum(math.exp(float(z[i] @ z[k]) / 0.5) for k in range(6) if k != i)
        return -math.log(math.exp(float(z[i] @ z[j]) / 0.5) / others)

    expected = sum(cost(i, j) + cost(j, i) for i, j in pairs) / 6
    assert nt_xent(z[:3], z[3:], temperature=0.5).item() == pytest.approx(expected, rel=1e-5)


def test_nt_xent_of_perfect_pairs_among_orthogonal_ones_has_a_closed_form():
    x_BD = torch.eye(4)
    # One other at similarity 1, six at 0.
    expected = math.log(1 + 6 * math.exp(-1 / 0.5))
    assert nt_xent(x_BD, x_BD.clone(), temperature=0.5).item() == pytest.approx(expected, rel=1e-4)


def test_simclr_shows_both_layers():
    torch.manual_seed(0)
    simclr = Simclr(feature_size=8, images=10, clusters=2, epochs=1, config=SimclrConfig(dimensions=3))
    features_NF = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    layers = simclr.layers(features_NF)
    first, _, second = simclr.projection
    hidden = np.maximum(features_NF @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
    projected = hidden @ second.weight.detach().numpy().T
    for found, expected in ((layers["features"], features_NF), (layers["projection"], projected)):
        np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_the_memory_objective_of_these_tests_uses_all_that_it_may():
    training = make(objective=Remembering, epochs=2)
    before = training.objective.memory_ND.clone()
    for _ in training.run():
        pass
    assert not torch.equal(before, training.objective.memory_ND)
    assert training.objective.level_K.abs().sum() > 0
    assert training.objective.weight == 0.5
