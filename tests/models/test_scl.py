import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from torch.nn.functional import normalize

from models import scl
from models.baselines.simclr import nt_xent
from models.scl import FullConfig, Scl, SclConfig


def random_predictions(batch=5, clusters=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(batch, clusters, generator=generator, dtype=torch.float64), dim=1)


def test_consistency_has_the_gradient_of_minus_log_of_the_joint_probability():
    # The claim of its docstring, by autograd on the closed form.
    p_BK = random_predictions()
    logits_BK = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = logits_BK.clone().requires_grad_(), logits_BK.clone().requires_grad_()
    target_BK = scl.consensus_target(p_BK, torch.softmax(logits_BK, dim=1), torch.full((4,), 0.25), power=0.0)
    scl.consistency(target_BK, ours, torch.ones(5)).backward()
    (-(p_BK * torch.softmax(theirs, dim=1)).sum(dim=1).log().mean()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_two_flat_predictions_cost_log_k():
    flat_BK, logits_BK = torch.full((8, 4), 0.25), torch.zeros(8, 4)
    target_BK = scl.consensus_target(flat_BK, flat_BK, torch.full((4,), 0.25), power=0.5)
    assert scl.consistency(target_BK, logits_BK, torch.ones(8)).item() == pytest.approx(math.log(4))


def test_untrusted_images_do_not_count():
    target_BK, logits_BK = random_predictions(2), random_predictions(2, seed=3)
    alone = scl.consistency(target_BK[:1], logits_BK[:1], torch.ones(1))
    together = scl.consistency(target_BK, logits_BK, torch.tensor([1.0, 0.0]))
    assert together.item() == pytest.approx(alone.item())


def test_the_target_is_a_distribution_that_shuns_the_crowded_cluster():
    p_BK = random_predictions()
    even = scl.consensus_target(p_BK, p_BK, torch.full((4,), 0.25), power=0.8)
    crowded = scl.consensus_target(p_BK, p_BK, torch.tensor([0.7, 0.1, 0.1, 0.1]), power=0.8)
    torch.testing.assert_close(even.sum(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(even, p_BK**2 / (p_BK**2).sum(dim=1, keepdim=True))
    assert (crowded[:, 0] < even[:, 0]).all()


def test_the_similarity_prediction_is_the_weighted_vote_of_the_neighbours():
    rng = np.random.default_rng(0)
    x_BD, memory_BMD, said_BMK = rng.normal(size=(3, 4)), rng.normal(size=(3, 5, 4)), rng.random((3, 5, 2))
    by_hand = np.zeros((3, 2))
    for i in range(3):
        weight_M = softmax(memory_BMD[i] @ x_BD[i] / 0.1)
        by_hand[i] = sum(weight_M[j] * said_BMK[i, j] for j in range(5))
    weights_BM = scl.similarity_weights(torch.from_numpy(x_BD), torch.from_numpy(memory_BMD), temperature=0.1)
    ours = scl.similarity_prediction(weights_BM, torch.from_numpy(said_BMK))
    np.testing.assert_allclose(ours.numpy(), by_hand)


def infonce(x_BD, view_BD, labels, temperature):
    x_BD, view_BD = torch.as_tensor(x_BD), torch.as_tensor(view_BD)
    kin_BB = None if labels is None else torch.as_tensor(labels)[:, None] == torch.as_tensor(labels)[None, :]
    return scl.contrast(x_BD, view_BD, torch.arange(len(x_BD)), kin_BB, temperature=temperature)


def test_contrast_without_labels_is_infonce():
    rng = np.random.default_rng(0)
    x_BD, view_BD = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    by_hand = -np.diag(log_softmax(x_BD @ view_BD.T / 0.2, axis=1)).mean()
    assert infonce(x_BD, view_BD, None, 0.2).item() == pytest.approx(by_hand)


def test_contrast_pushes_only_other_clusters_away():
    rng = np.random.default_rng(1)
    x_BD, view_BD = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    labels = np.array([0, 0, 1, 2])
    by_hand = []
    for i in range(4):
        others = [i] + [j for j in range(4) if labels[j] != labels[i]]
        by_hand.append(-np.log(softmax(x_BD[i] @ view_BD[others].T / 0.5)[0]))
    assert infonce(x_BD, view_BD, labels, 0.5).item() == pytest.approx(np.mean(by_hand))


def test_a_batch_of_one_cluster_has_nothing_to_contrast():
    x_BD = torch.eye(3).requires_grad_()
    loss = infonce(x_BD, torch.eye(3), np.zeros(3), 0.2)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x_BD.grad, torch.zeros(3, 3))


def test_the_terms_of_several_restarts_are_those_of_each():
    rng = np.random.default_rng(2)
    p, q = (torch.softmax(torch.from_numpy(rng.normal(size=(3, 8, 4))), dim=2) for _ in range(2))
    mean = q.mean(dim=1)
    together = scl.consensus_target(p, q, mean, power=0.5)
    for r in range(3):
        torch.testing.assert_close(together[r], scl.consensus_target(p[r], q[r], mean[r], power=0.5))
        torch.testing.assert_close(scl.score(p, q)[r], scl.score(p[r], q[r]))


def test_the_score_of_certain_and_even_predictions_is_log_k():
    certain_NK = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert scl.score(certain_NK, certain_NK).item() == pytest.approx(math.log(4))


def objective(**settings):
    torch.manual_seed(0)
    return Scl(
        feature_size=6, images=12, clusters=3, epochs=4, config=FullConfig(dimensions=4, neighbours=2, **settings)
    )


def test_before_clusters_exist_the_loss_is_that_of_simclr():
    ours = objective()
    ours.begin_epoch(0)
    h_VBF = torch.randn(2, 8, 6)
    loss, _ = ours.loss(h_VBF, torch.arange(8))
    x_VBD = normalize(ours.projection(h_VBF), dim=2)
    torch.testing.assert_close(loss, nt_xent(x_VBD[0], x_VBD[1], temperature=0.5))


def test_once_clusters_exist_the_loss_is_contrast_plus_consistency():
    ours = objective()
    ours.begin_epoch(2)
    rows_B = torch.arange(8)
    h_VBF = torch.randn(2, 8, 6)
    loss, details = ours.loss(h_VBF, rows_B)
    assert loss.item() == pytest.approx((details["contrast"] + details["consistency"]).item())
    x_VBD = normalize(ours.projection(h_VBF), dim=2)
    q_VBK = torch.softmax(x_VBD @ normalize(ours.centres_KD, dim=1).T / 0.2, dim=2)
    target_BK = scl.consensus_target(ours.similarity_prediction(rows_B), q_VBK.mean(dim=0), ours.mean_K, power=0.8)
    x_XD, label_X = x_VBD.flatten(0, 1), target_BK.argmax(dim=1).repeat(2)
    by_hand = []
    for i in range(16):
        own = (i + 8) % 16
        others = [own] + [j for j in range(16) if label_X[j] != label_X[i]]
        by_hand.append(-torch.log_softmax(x_XD[others] @ x_XD[i] / 0.5, dim=0)[0].item())
    assert details["contrast"].item() == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_the_memory_follows_the_mean_of_the_views():
    ours = objective()
    ours.begin_epoch(0)
    before_ND, rows_B, h_VBF = ours.memory_ND.clone(), torch.tensor([3, 5]), torch.randn(2, 2, 6)
    ours.loss(h_VBF, rows_B)
    ours.end_step()
    x_BD = normalize(ours.projection(h_VBF), dim=2).mean(dim=0)
    torch.testing.assert_close(ours.memory_ND[rows_B], normalize(0.5 * before_ND[rows_B] + 0.5 * x_BD, dim=1))
    assert torch.equal(ours.memory_ND[[0, 1, 2, 4]], before_ND[[0, 1, 2, 4]])


def test_nonsense_settings_are_refused():
    with pytest.raises(ValueError, match="momentum is 1"):
        SclConfig(momentum=1.0)
    with pytest.raises(ValueError, match="contrast_temperature is 0"):
        SclConfig(contrast_temperature=0)
    with pytest.raises(ValueError, match="start is 2"):
        FullConfig(start=2.0)


def test_no_clusters_are_looked_for_in_the_noise_before_the_first_epoch():
    alone = Scl(feature_size=6, images=20, clusters=3, epochs=1)
    alone.begin_epoch(0)
    assert not alone.semantic
    asked = Scl(feature_size=6, images=20, clusters=3, epochs=1, config=FullConfig(start=0.0))
    asked.begin_epoch(0)
    assert asked.semantic
