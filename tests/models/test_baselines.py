import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import adjusted_rand_score
from sklearn.preprocessing import StandardScaler

from models.baselines import pairs, scan, temi
from models.baselines.scan import ScanConfig
from models.baselines.temi import TemiConfig
from tests.models.conftest import finish


@pytest.fixture(autouse=True)
def one_thread():
    """As a run trains: more threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


HEADS = {"temi": (temi.train, {"epochs": 8, "restarts": 3}), "scan": (scan.train, {"epochs": 8, "restarts": 3})}


def train(method, features_NF, **settings):
    function, quick = HEADS[method]
    return finish(function(features_NF, **{"clusters": 6, "seed": 0, **quick, **settings}))


@pytest.mark.parametrize("method", HEADS)
def test_far_groups_are_found(blobs, method):
    features_NF, class_N = blobs
    steps, fit = train(method, features_NF)
    assert adjusted_rand_score(class_N, fit.assignment.labels_N) == 1
    assert fit.assignment.consensus_N.all()
    assert [step.done for step in steps] == list(range(1, steps[-1].total + 1))
    assert all(math.isfinite(value) for step in steps for value in step.details.values())
    assert len(fit.model["centres"]) == 6
    assert len(fit.scores) == 3


@pytest.mark.parametrize("method", HEADS)
def test_the_same_seed_gives_the_same_bits(blobs, method):
    features_NF, _ = blobs
    noise_NF = features_NF[np.random.default_rng(3).permutation(240)] + features_NF  # no clear groups
    quick = {"epochs": 3}
    (_, one), (_, two), (_, other) = (train(method, noise_NF, seed=seed, **quick) for seed in (0, 0, 1))
    assert np.array_equal(one.assignment.confidence_N, two.assignment.confidence_N)
    assert all(np.array_equal(one.model[name], two.model[name]) for name in one.model)
    assert not np.array_equal(one.model["centres"], other.model["centres"])


@pytest.mark.parametrize("method", HEADS)
@pytest.mark.parametrize("copies", [1, 2, 150])
def test_two_pictures_and_their_copies_are_told_apart(method, copies):
    pair_NF = np.repeat(np.array([[1, 0, 2], [0, 1, 2]], np.float16), copies, axis=0)
    _, fit = train(method, pair_NF, clusters=2, restarts=2)
    assert fit.assignment.labels_N.shape == (2 * copies,)
    assert np.isfinite(fit.assignment.confidence_N).all()
    assert all(np.isfinite(array).all() for array in fit.model.values())
    assert adjusted_rand_score(np.repeat([0, 1], copies), fit.assignment.labels_N) == 1


@pytest.mark.parametrize("method", HEADS)
def test_more_clusters_than_a_batch_has_images_do_not_disturb(method):
    features_NF = np.random.default_rng(0).normal(size=(30, 16)).astype(np.float16)
    _, fit = train(method, features_NF, clusters=29, epochs=3)
    assert np.isfinite(fit.assignment.margin_N).all()
    assert fit.assignment.labels_N.max() < 29


def probabilities(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_temis_loss_is_that_of_its_formula():
    # Equations of the paper in loops: every pair in both directions, weighted by the teachers of all heads.
    said, taught, mean = probabilities(3, 8, 5), probabilities(3, 8, 5, seed=1), probabilities(3, 1, 5, seed=2)
    by_hand = np.zeros((3, 4))
    for h in range(3):
        for i in range(4):
            weight = np.mean([sum(taught[g, i, k] * taught[g, i + 4, k] for k in range(5)) for g in range(3)])
            for mine, other in ((i, i + 4), (i + 4, i)):
                pmi = math.log(sum((said[h, mine, k] * taught[h, other, k]) ** 0.6 / mean[h, 0, k] for k in range(5)))
                by_hand[h, i] -= weight * pmi / 2
    ours = temi.temi_loss(said, taught, mean, beta=0.6)
    np.testing.assert_allclose(ours.numpy(), by_hand.mean(axis=1))


def test_certain_balanced_pairs_are_worth_log_k():
    # One-hot and balanced: each pair shares log K nats, whatever beta.
    certain = torch.eye(4, dtype=torch.float64).repeat(2, 1)[None]
    loss = temi.temi_loss(certain, certain, torch.full((1, 1, 4), 0.25, dtype=torch.float64), beta=0.6)
    assert loss.item() == pytest.approx(-math.log(4))


def test_temis_loss_has_a_slope_where_no_probability_is_left():
    logits = torch.tensor([[[60.0, 0.0], [0.0, 60.0]]], requires_grad=True)
    said = torch.softmax(logits, dim=2)
    temi.temi_loss(said, said.detach().flip(2), torch.full((1, 1, 2), 0.5), beta=0.6).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_temis_heads_are_independent_networks():
    # Head by head with torch's own layers.
    heads = temi.Heads.new(sizes=(6, 5, 4, 3), heads=2, generator=torch.Generator().manual_seed(0), device="cpu")
    heads.parts["hidden_bias"] += 0.1
    z_BD = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    for head in range(2):
        hidden, bottleneck = torch.nn.Linear(6, 5), torch.nn.Linear(5, 4)
        last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3, bias=False))
        own = {name: part[head] for name, part in heads.parts.items()}
        with torch.no_grad():
            hidden.weight.copy_(own["hidden"].T)
            hidden.bias.copy_(own["hidden_bias"][0])
            bottleneck.weight.copy_(own["bottleneck"].T)
            bottleneck.bias.copy_(own["bottleneck_bias"][0])
            last.parametrizations.weight.original1.copy_(own["directions"].T)
            last.parametrizations.weight.original0.copy_(own["lengths"].T)
            reached = torch.nn.functional.normalize(bottleneck(torch.nn.functional.gelu(hidden(z_BD))), dim=1)
            expected = last(reached)
        torch.testing.assert_close(heads.logits(z_BD)[head], expected)
        torch.testing.assert_close(torch.from_numpy(heads.arrays(head)["centres"]), last.weight.detach())


def test_the_rate_rises_and_falls():
    assert [temi.schedule(through, 0.2) for through in (0, 0.1, 0.2)] == pytest.approx([0, 0.5, 1])
    assert temi.schedule(0.6, 0.2) == pytest.approx(0.5)
    assert temi.schedule(1, 0.2) == pytest.approx(0)


def test_scans_loss_is_that_of_its_formula():
    said, pair = probabilities(2, 4, 3), probabilities(2, 4, 3, seed=1)
    for h in range(2):
        agree = np.mean([math.log(sum(said[h, i, k] * pair[h, i, k] for k in range(3))) for i in range(4)])
        mean = said[h].numpy().mean(axis=0)
        by_hand = -agree + 5 * sum(mean * np.log(mean))
        assert scan.scan_loss(said, pair, entropy_weight=5.0)[h].item() == pytest.approx(by_hand)


def test_certain_balanced_neighbours_cost_minus_the_weighted_entropy():
    certain = torch.eye(4).repeat(2, 1)[None]
    assert scan.scan_loss(certain, certain, entropy_weight=5.0).item() == pytest.approx(-5 * math.log(4), rel=1e-6)


def test_heads_are_compared_over_all_neighbours_of_every_image():
    rng = np.random.default_rng(0)
    features_NF = rng.normal(size=(20, 4)).astype(np.float16)
    neighbours_NM = torch.from_numpy(rng.integers(20, size=(20, 3)))
    options = {"clusters": 3, "heads": 2, "generator": torch.Generator().manual_seed(0), "config": ScanConfig()}
    table = scan.Standardised(features_NF, device="cpu")
    step = scan.ClusteringStep(table, neighbours_NM, **options)
    weights, biases = step.heads.weight_FC.detach().numpy(), step.heads.bias_C.detach().numpy()
    for head, loss in enumerate(step.compare().tolist()):
        own = slice(3 * head, 3 * head + 3)
        p = softmax(table[:].numpy() @ weights[:, own] + biases[own], axis=1)
        agree = np.mean([np.log(p[i] @ p[j]) for i in range(20) for j in neighbours_NM[i]])
        mean = p.mean(axis=0)
        assert loss == pytest.approx(-agree + sum(mean * np.log(mean)), abs=1e-6)


def test_self_labels_count_by_cluster():
    # Three images of cluster 0 and one of cluster 2; each cluster's mean counts half.
    logits_BK = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cost = -torch.log_softmax(logits_BK, dim=1)
    by_hand = (cost[:3, 0].mean() + cost[3, 2]) / 2
    ours = scan.self_label_loss(logits_BK.float(), torch.tensor([0, 0, 0, 2]))
    assert ours.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_standardised_features_are_those_of_scikit_learn():
    features_NF = np.random.default_rng(0).normal(3, 2, size=(50, 4)).astype(np.float16)
    features_NF[:, 2] = 1.5  # one that never varies
    expected = StandardScaler().fit_transform(features_NF.astype(np.float64))
    np.testing.assert_allclose(scan.Standardised(features_NF, device="cpu")[:].numpy(), expected, atol=1e-5)


def test_a_collection_without_confident_images_keeps_the_clustering(blobs):
    features_NF, _ = blobs
    options = {"clusters": 6, "epochs": 2, "restarts": 1, "seed": 0}
    doubtful = ScanConfig(threshold=1 - 1e-9, learning_rate=1e-6)
    steps, fit = finish(scan.train(features_NF, **options, config=doubtful))
    assert steps[-1].details == {"loss": 0, "confident": 0}
    assert fit.scores[0] == -steps[1].details["best"]


@pytest.mark.parametrize(("images", "size", "least", "count"), [(10, 3, 1, 3), (10, 3, 7, 7), (2, 128, 5, 5)])
def test_an_epoch_passes_as_often_as_it_must(images, size, least, count):
    drawn = list(pairs.batches(images, size, least=least, generator=torch.Generator().manual_seed(0)))
    assert [len(rows) for rows in drawn] == [min(images, size)] * count
    rows = torch.cat(drawn)
    for start in range(0, len(rows) - images + 1, images):
        assert sorted(rows[start : start + images].tolist()) == list(range(images))


def test_partners_are_neighbours():
    neighbours_NM = torch.arange(20).view(5, 4)
    rows_B = torch.tensor([3, 0, 3] * 50)
    drawn = pairs.partners(neighbours_NM, rows_B, generator=torch.Generator().manual_seed(0))
    assert set(drawn[1::3].tolist()) == {0, 1, 2, 3}
    assert set(drawn[::3].tolist()) == {12, 13, 14, 15}


def test_nonsense_settings_are_refused():
    with pytest.raises(ValueError, match=r"beta is 0\.5"):
        TemiConfig(beta=0.5)
    with pytest.raises(ValueError, match="temperature is 0"):
        TemiConfig(temperature=0)
    with pytest.raises(ValueError, match="teacher_momentum is 1"):
        TemiConfig(teacher_momentum=1)
    with pytest.raises(ValueError, match="threshold is 1"):
        ScanConfig(threshold=1)
    with pytest.raises(ValueError, match="entropy_weight is -1"):
        ScanConfig(entropy_weight=-1)
    with pytest.raises(ValueError, match="batch is 0"):
        ScanConfig(batch=0)


@pytest.mark.parametrize(("clusters", "size"), [(3, 128), (12, 128), (40, 400)])
def test_scans_batches_have_room_for_every_cluster(clusters, size, monkeypatch):
    asked, plain = [], scan.batches

    def batches(images, wanted, **settings):
        asked.append(wanted)
        return plain(images, wanted, **settings)

    monkeypatch.setattr(scan, "batches", batches)
    features_NF = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float16)
    finish(scan.train(features_NF, clusters=clusters, epochs=1, restarts=1, seed=0))
    assert asked[0] == size
