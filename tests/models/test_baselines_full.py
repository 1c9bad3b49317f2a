import math

import numpy as np
import pytest
import torch
from PIL import Image

from models import metrics
from models.baselines import cc, kmeans, pica, pixels
from models.baselines.cc import Cc, CcConfig
from models.baselines.pica import Pica, PicaConfig
from models.full import FullConfig
from tests.models.conftest import finish
from tests.models.full_run import pictures, train

SIZES = {"feature_size": 12, "images": 40, "clusters": 3, "epochs": 4}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def probabilities(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_partition_uncertainty_is_that_of_its_formula():
    image, changed = probabilities(6, 4).numpy(), probabilities(6, 4, seed=1).numpy()
    by_hand = 0.0
    for j in range(4):
        index = [cosine(image[:, j], changed[:, k]) for k in range(4)]
        by_hand += (math.log(sum(map(math.exp, index))) - index[j]) / 4
    ours = pica.partition_uncertainty(torch.from_numpy(image), torch.from_numpy(changed))
    assert ours.item() == pytest.approx(by_hand)


@pytest.mark.parametrize("clusters", [2, 10])
def test_a_certain_and_even_partition_has_the_least_uncertainty(clusters):
    certain = torch.eye(clusters).repeat(3, 1)
    least = pica.partition_uncertainty(certain, certain).item()
    assert least == pytest.approx(math.log(math.e + clusters - 1) - 1, rel=1e-5)
    flat = torch.full_like(certain, 1 / clusters)
    assert pica.partition_uncertainty(flat, flat).item() == pytest.approx(math.log(clusters), rel=1e-5)
    for seed in range(5):
        some = probabilities(3 * clusters, clusters, seed=seed)
        assert pica.partition_uncertainty(some, some).item() > least


def test_imbalance_is_log_k_minus_the_entropy():
    p_BK = probabilities(9, 5)
    mean = p_BK.numpy().mean(axis=0)
    assert pica.imbalance(p_BK).item() == pytest.approx(math.log(5) + sum(mean * np.log(mean)))
    assert pica.imbalance(torch.eye(4)).item() == pytest.approx(0, abs=1e-6)
    assert pica.imbalance(torch.eye(4)[:1]).item() == pytest.approx(math.log(4), rel=1e-5)


def test_picas_loss_compares_every_changed_copy_with_its_image():
    torch.manual_seed(0)
    method = Pica(**SIZES)
    h_VBF = torch.randn(4, 8, 12)
    method.begin_epoch(3)
    ours, _ = method.loss(h_VBF, torch.arange(8))
    p_VBK = torch.softmax(h_VBF @ method.head.weight.T + method.head.bias, dim=2)
    uncertainty = pica.partition_uncertainty(torch.cat([p_VBK[0]] * 3), torch.cat(list(p_VBK[1:])))
    assert ours.item() == pytest.approx((uncertainty + 2 * pica.imbalance(p_VBK[0])).item())


@pytest.mark.parametrize(("clusters", "auxiliary"), [(10, 70), (20, 70), (200, 700)])
def test_picas_heads_take_turns_and_the_one_that_answers_has_the_last(clusters, auxiliary):
    for epochs in (1, 2, 5):
        method = Pica(feature_size=4, images=40, clusters=clusters, epochs=epochs)
        turns = []
        for epoch in range(epochs):
            method.begin_epoch(epoch)
            turns.append(method.trained.out_features)
        assert turns == [auxiliary, clusters][epochs % 2 :] + [auxiliary, clusters] * ((epochs - 1) // 2)


def test_cluster_contrast_is_that_of_its_formula():
    # The cosine of every column with every other one, both views; its own other view is what has to be found.
    first, second = probabilities(7, 3).numpy(), probabilities(7, 3, seed=1).numpy()
    columns = [*first.T, *second.T]
    by_hand = 0.0
    for j in range(6):
        terms = {k: math.exp(cosine(columns[j], columns[k]) / 0.7) for k in range(6) if k != j}
        by_hand -= math.log(terms[(j + 3) % 6] / sum(terms.values())) / 6
    ours = cc.cluster_contrast(torch.from_numpy(first), torch.from_numpy(second), temperature=0.7)
    assert ours.item() == pytest.approx(by_hand)


def test_cluster_contrast_of_certain_clusters_has_a_closed_form():
    certain = torch.eye(4).repeat(3, 1)
    loss = cc.cluster_contrast(certain, certain, temperature=1.0)
    assert loss.item() == pytest.approx(math.log(math.e + 6) - 1, rel=1e-5)


def test_ccs_loss_is_the_sum_of_its_parts():
    torch.manual_seed(0)
    method = Cc(**SIZES)
    loss, details = method.loss(torch.randn(2, 8, 12), torch.arange(8))
    assert loss.item() == pytest.approx(sum(map(float, details.values())), rel=1e-6)
    flat = torch.zeros(2, 8, 12)
    torch.nn.init.zeros_(method.boundaries.weight)
    torch.nn.init.zeros_(method.boundaries.bias)
    _, details = method.loss(flat, torch.arange(8))
    # All clusters alike: the other view is one of 2 K - 1 equal columns, and the mean is even.
    assert details["cluster"].item() == pytest.approx(math.log(5), rel=1e-5)
    assert details["imbalance"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("method", [Cc, Pica])
def test_the_answer_is_the_heads_likeliest_cluster(method):
    torch.manual_seed(0)
    made = method(**SIZES)
    features_NF = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)
    fit = finish(made.answer(features_NF, seed=0, restarts=5))[1]
    h_NG = np.concatenate([features_NF, np.ones((40, 1))], axis=1)
    if method is Cc:
        hidden_NF = np.maximum(h_NG @ fit.model["hidden"].T, 0)
        h_NG = np.concatenate([hidden_NF, np.ones((40, 1))], axis=1)
    logits_NK = h_NG @ fit.model["centres"].T
    assert np.array_equal(fit.assignment.labels_N, logits_NK.argmax(axis=1))
    expected_N = np.exp(logits_NK.max(axis=1)) / np.exp(logits_NK).sum(axis=1)
    np.testing.assert_allclose(fit.assignment.confidence_N, expected_N, rtol=1e-5)
    assert (fit.assignment.margin_N >= 0).all()
    np.testing.assert_allclose(np.linalg.norm(fit.x_ND, axis=1), 1, rtol=1e-5)


def run(method, pixels_NSSC, **options):
    settings = {
        "backbone": "resnet10_slim",
        "weights": "random",
        "clusters": 3,
        "epochs": 3,
        "restarts": 1,
        "seed": 0,
        "config": FullConfig(batch=32),
        **options,
    }
    return finish(train(pixels_NSSC, objective=method, **settings))


@pytest.mark.parametrize("method", [Cc, Pica])
def test_far_groups_are_found(blobs, method):
    # A linear layer is the backbone, and noise of its own makes every view of an image.
    features_NF, class_N = blobs
    x_NF = torch.from_numpy(features_NF).float()
    torch.manual_seed(0)
    backbone, made = torch.nn.Linear(64, 64), method(feature_size=64, images=240, clusters=6, epochs=40)
    optimizer = torch.optim.Adam([*backbone.parameters(), *made.parameters()], lr=1e-3)
    for epoch in range(made.epochs):
        made.begin_epoch(epoch)
        for rows_B in torch.randperm(240).split(60):
            views_VBF = torch.stack([x_NF[rows_B] + torch.randn(60, 64) for _ in made.view_strengths])
            loss, _ = made.loss(backbone(views_VBF), rows_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            made.end_step()
    fit = finish(made.answer(backbone(x_NF).detach().numpy(), seed=0, restarts=1))[1]
    assert metrics.quality([str(kind) for kind in class_N], fit.assignment.labels_N)["acc"] > 0.95
    assert fit.assignment.consensus_N.mean() > 0.95


@pytest.mark.parametrize("method", [Cc, Pica])
def test_the_same_seed_gives_the_same_bits(method):
    pixels_NSSC, _ = pictures(24)
    one, two, other = (run(method, pixels_NSSC, epochs=1, seed=seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(one.model["centres"], two.model["centres"])
    assert np.array_equal(one.assignment.confidence_N, two.assignment.confidence_N)
    assert not np.array_equal(one.model["centres"], other.model["centres"])


@pytest.mark.parametrize("method", [Cc, Pica])
@pytest.mark.parametrize("images", [2, 3])
def test_a_few_images_and_copies_are_enough(method, images):
    pixels_NSSC = np.repeat(pictures(2)[0], [1, images - 1], axis=0)
    _, fit = run(method, pixels_NSSC, clusters=2, epochs=2)
    assert fit.assignment.labels_N.shape == (images,)
    assert np.isfinite(fit.assignment.confidence_N).all()


def test_rows_of_pixels_are_pillows_averages():
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    rows_NF = pixels.rows(pixels_NHWC)
    assert (rows_NF.shape, rows_NF.dtype) == ((3, 32 * 32 * 3), np.float16)
    for image_HWC, row_F in zip(pixels_NHWC, rows_NF, strict=True):
        expected = np.asarray(Image.fromarray(image_HWC).resize((32, 32), Image.Resampling.BOX), np.float32) / 255
        np.testing.assert_allclose(row_F.astype(np.float32), expected.reshape(-1), atol=1 / 255)


def test_images_of_32_pixels_stay_as_they_are():
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(np.rint(pixels.rows(pixels_NHWC).astype(np.float32) * 255), pixels_NHWC.reshape(2, -1))


def test_colours_are_grouped_by_k_means_on_pixels(monkeypatch):
    monkeypatch.setattr(pixels, "SIDE", 8)
    colour_K3 = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250]])
    kind_N = np.arange(30) % 3
    noise = np.random.default_rng(0).integers(-9, 9, (30, 40, 40, 3))
    pixels_NHWC = (colour_K3[kind_N][:, None, None] + noise).astype(np.uint8)
    _, fit = finish(kmeans.train(pixels.rows(pixels_NHWC), clusters=3, epochs=10, restarts=2, seed=0))
    assert metrics.quality([str(kind) for kind in kind_N], fit.assignment.labels_N)["acc"] == 1


def test_nonsense_settings_are_refused():
    with pytest.raises(ValueError, match="cluster_temperature is 0"):
        CcConfig(cluster_temperature=0)
    with pytest.raises(ValueError, match="balance_weight is -1"):
        PicaConfig(balance_weight=-1)
    with pytest.raises(ValueError, match="over_clusters is 1"):
        PicaConfig(over_clusters=1)
