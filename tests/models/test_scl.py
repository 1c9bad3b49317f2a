import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.metrics import adjusted_rand_score

from models import scl
from models.scl import SclConfig
from tests.models.conftest import finish


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


def test_contrast_without_labels_is_infonce():
    rng = np.random.default_rng(0)
    x_BD, view_BD = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    by_hand = -np.diag(log_softmax(x_BD @ view_BD.T / 0.2, axis=1)).mean()
    ours = scl.contrast(torch.from_numpy(x_BD), torch.from_numpy(view_BD), None, temperature=0.2)
    assert ours.item() == pytest.approx(by_hand)


def test_contrast_pushes_only_other_clusters_away():
    rng = np.random.default_rng(1)
    x_BD, view_BD = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    labels = np.array([0, 0, 1, 2])
    by_hand = []
    for i in range(4):
        others = [i] + [j for j in range(4) if labels[j] != labels[i]]
        by_hand.append(-np.log(softmax(x_BD[i] @ view_BD[others].T / 0.5)[0]))
    view = torch.from_numpy(view_BD).requires_grad_()
    loss = scl.contrast(torch.from_numpy(x_BD), view, torch.from_numpy(labels), temperature=0.5)
    assert loss.item() == pytest.approx(np.mean(by_hand))


def test_a_batch_of_one_cluster_has_nothing_to_contrast():
    x_BD = torch.eye(3).requires_grad_()
    loss = scl.contrast(x_BD, torch.eye(3), torch.zeros(3, dtype=torch.int64), temperature=0.2)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x_BD.grad, torch.zeros(3, 3))


def train(features_NF, **settings):
    options = {"clusters": 6, "epochs": 5, "restarts": 2, "seed": 0, **settings}
    return finish(scl.train(features_NF, **options))


def test_far_groups_are_found(blobs):
    features_NF, class_N = blobs
    steps, fit = train(features_NF)
    assert adjusted_rand_score(class_N, fit.assignment.labels_N) == 1
    assert fit.assignment.consensus_N.all()
    assert [step.done for step in steps] == list(range(1, 11))
    assert all(math.isfinite(value) for step in steps for value in step.details.values())


def test_the_same_seed_gives_the_same_bits(blobs):
    features_NF, _ = blobs
    noise_NF = features_NF[np.random.default_rng(3).permutation(240)] + features_NF  # no clear groups
    (_, one), (_, two), (_, other) = train(noise_NF), train(noise_NF), train(noise_NF, seed=1)
    assert np.array_equal(one.assignment.confidence_N, two.assignment.confidence_N)
    assert all(np.array_equal(one.model[name], two.model[name]) for name in one.model)
    assert not np.array_equal(one.model["centres"], other.model["centres"])


@pytest.mark.parametrize(
    "config",
    [
        SclConfig(consistency=False),
        SclConfig(contrast="none"),
        SclConfig(contrast="instance"),
        SclConfig(trust=False),
        SclConfig(balance=0.0),
        SclConfig(rule="similarity"),
        SclConfig(rule="boundary"),
    ],
)
def test_every_switch_trains(blobs, config):
    features_NF, class_N = blobs
    _, fit = train(features_NF, config=config)
    assert adjusted_rand_score(class_N, fit.assignment.labels_N) > 0.9


def test_a_large_collection_is_sampled_in_every_epoch(blobs):
    # 240 images, 100 drawn an epoch: the memory of the others must follow the head.
    features_NF, class_N = blobs
    _, fit = train(features_NF, config=SclConfig(epoch_images=100, batch=50))
    assert adjusted_rand_score(class_N, fit.assignment.labels_N) == 1


def test_nonsense_settings_are_refused():
    with pytest.raises(ValueError, match="momentum is 1"):
        SclConfig(momentum=1.0)
    with pytest.raises(ValueError, match="contrast_temperature is 0"):
        SclConfig(contrast_temperature=0)
