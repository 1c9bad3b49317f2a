from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import safetensors.numpy
import torch
from sklearn.metrics import adjusted_rand_score
from torch.nn.functional import normalize

from models import full, heads
from models.config import Config, InputError
from models.full import FullConfig, Stopped, Training
from models.selflabelling import SelfLabelling, SelfLabellingConfig
from models.train import group, save_model
from tests.models.conftest import finish
from tests.models.full_run import pictures


@pytest.fixture
def found(blobs):
    """What heads make of six groups of features."""
    return finish(heads.train(blobs[0], clusters=6, epochs=2, restarts=2, seed=0))[1]


def made(features_NF, found, **settings):
    return SelfLabelling(
        feature_size=64, images=240, clusters=6, epochs=1, frozen=found, features_NF=features_NF, **settings
    )


def test_boundaries_start_where_the_clusters_are(blobs, found):
    objective = made(blobs[0], found)
    unit_NF = blobs[0].astype(np.float32) / np.linalg.norm(blobs[0].astype(np.float32), axis=1, keepdims=True)
    z_ND = (unit_NF - found.model["mean"]) @ found.model["axes"]
    z_ND /= np.linalg.norm(z_ND, axis=1, keepdims=True)
    for k in range(6):
        mean_D = z_ND[found.assignment.labels_N == k].mean(axis=0)
        np.testing.assert_allclose(objective.centres_KD[k].detach(), mean_D / np.linalg.norm(mean_D), atol=1e-5)
    details = objective.loss(torch.from_numpy(blobs[0].astype(np.float32))[None], torch.arange(240))[1]
    assert details["kept"] == 1


def test_the_loss_is_the_cross_entropy_weighted_by_what_heads_agreed_on(blobs, found):
    sure_N = np.linspace(0.1, 1, 240, dtype=np.float32)
    agreed_N = np.arange(240) % 3 > 0
    found = replace(found, assignment=replace(found.assignment, confidence_N=sure_N, consensus_N=agreed_N))
    objective = made(blobs[0], found, config=SelfLabellingConfig(temperature=0.5))
    rows_B = torch.tensor([7, 0, 200, 31])
    h_VBF = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 4, 64)).astype(np.float32))
    expected = 0.0
    for h_BF in h_VBF.double():
        x_BD = (h_BF / h_BF.norm(dim=1, keepdim=True) - torch.from_numpy(found.model["mean"])).float()
        x_BD = x_BD @ torch.from_numpy(found.model["axes"])
        cosine_BK = (x_BD / x_BD.norm(dim=1, keepdim=True)) @ objective.centres_KD.detach().T
        share_BK = torch.softmax(cosine_BK / 0.5, dim=1)
        for row, share_K in zip(rows_B.tolist(), share_BK, strict=True):
            weight = float(sure_N[row] * agreed_N[row]) / (sure_N * agreed_N).mean()
            expected += weight * -share_K[int(found.assignment.labels_N[row])].log() / 8
    loss = objective.loss(h_VBF, rows_B)[0]
    torch.testing.assert_close(loss.detach(), expected.float(), rtol=1e-4, atol=1e-5)
    loss.backward()
    assert torch.isfinite(objective.centres_KD.grad).all()


def test_a_batch_on_which_heads_agreed_nowhere_teaches_nothing(blobs, found):
    nowhere = replace(found.assignment, consensus_N=np.zeros(240, bool))
    objective = made(blobs[0], replace(found, assignment=nowhere))
    h_VBF = torch.randn(1, 8, 64).requires_grad_()
    objective.loss(h_VBF, torch.arange(8))[0].backward()
    assert not h_VBF.grad.any()


def test_a_cluster_without_images_has_a_direction_too(blobs, found):
    labels_N = np.where(found.assignment.labels_N == 2, 3, found.assignment.labels_N)
    objective = made(blobs[0], replace(found, assignment=replace(found.assignment, labels_N=labels_N)))
    torch.testing.assert_close(objective.centres_KD.detach().norm(dim=1), torch.ones(6))


def test_how_sure_to_be_is_told_by_how_often_predictions_differed_before(blobs, found):
    answers = []
    for agreed_N in (np.ones(240, bool), np.arange(240) % 2 > 0):
        assignment = replace(found.assignment, consensus_N=agreed_N)
        objective = made(blobs[0], replace(found, assignment=assignment))
        answers.append(finish(objective.answer(blobs[0], seed=0, restarts=2))[1].assignment)
    sure, unsure = answers
    assert np.array_equal(sure.labels_N, unsure.labels_N)
    assert unsure.confidence_N.mean() < sure.confidence_N.mean() - 0.01
    steps = heads.train(blobs[0], clusters=6, epochs=heads.EPOCHS, restarts=2, seed=0, differ=0.5)
    assert np.array_equal(finish(steps)[1].assignment.confidence_N, unsure.confidence_N)


def ready(images, *, kind=SelfLabelling, **config):
    """The images, and a training that is about to teach the backbone what heads found in some features."""
    pixels_NSSC, kind_N = pictures(images, 64)
    noise_NF = np.random.default_rng(0).random((images, 1280), np.float32)
    features_NF = noise_NF + 3 * np.eye(3, 1280, dtype=np.float32)[kind_N]
    found = finish(heads.train(features_NF, clusters=3, epochs=2, restarts=2, seed=0))[1]
    return pixels_NSSC, Training(
        pixels_NSSC,
        objective=partial(kind, frozen=found, features_NF=features_NF),
        backbone="efficientnet_lite0",
        weights=None,
        clusters=3,
        epochs=1,
        seed=0,
        config=FullConfig(batch=16, **config),
    )


def test_all_layers_learn_and_statistics_stay():
    _, training = ready(48)
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    for _ in training.run():
        pass
    moved = {name for name, value in training.network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in training.network.named_parameters()}


def test_the_pieces_of_a_batch_teach_what_the_whole_does():
    # In float64: how a processor sums a convolution in float32 depends on the size of the batch.
    pixels_NSSC, training = ready(20, precision="float32")
    training.network.double()
    training.objective.double()
    training.views, views = lambda *given: views(*given).double(), training.views
    given = torch.arange(20), torch.from_numpy(pixels_NSSC), training.choices(20)
    gradients, details = [], []
    for learn in (training.gradients, partial(training.gradients_in_pieces, piece=8)):
        training.optimizer.zero_grad()
        details.append(learn(*given))
        taught = (*training.network.parameters(), training.objective.centres_KD)
        gradients.append([parameter.grad.clone() for parameter in taught])
    for whole, pieces in zip(*gradients, strict=True):
        assert (whole - pieces).norm() <= 1e-6 * whole.norm()
    assert details[0].keys() == details[1].keys() == {"loss", "kept"}
    for name in details[0]:
        torch.testing.assert_close(details[0][name], details[1][name], rtol=1e-5, atol=1e-6)


class OwnStatistics(SelfLabelling):
    own_statistics = True


@pytest.mark.parametrize(("kind", "expected"), [(SelfLabelling, [7, 7, 6]), (OwnStatistics, [20])])
def test_a_batch_is_computed_in_pieces_unless_its_images_have_to_do_with_each_other(monkeypatch, kind, expected):
    sizes = []
    forward = Training.forward
    monkeypatch.setattr(Training, "forward", lambda self, x_XCSS: sizes.append(len(x_XCSS)) or forward(self, x_XCSS))
    monkeypatch.setattr(full, "PIECE_PIXELS", 7 * 64**2)
    for _ in ready(20, kind=kind)[1].run():
        pass
    assert sizes == expected


def test_features_are_those_of_the_trained_network():
    pixels_NSSC, training = ready(40, precision="float32", pretrained_learning_rate=1e-3)
    before_NF = finish(training.features())[1]
    for _ in training.run():
        pass
    x_BCSS = torch.from_numpy(pixels_NSSC).permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.inference_mode():
        expected_NF = training.network.eval()(x_BCSS)
    after_NF = torch.from_numpy(finish(training.features())[1])
    assert (normalize(after_NF) * normalize(expected_NF)).sum(dim=1).min() > 0.9999
    assert (normalize(after_NF) * normalize(torch.from_numpy(before_NF))).sum(dim=1).max() < 0.999


@pytest.mark.slow
def test_a_pretrained_backbone_is_taught_what_heads_found(sources, tmp_path):
    config = Config(clusters=3, train="finetune", image_size=64, epochs=2, restarts=4, seed=1)
    truth = [source.path.parent.name for source in sources]
    steps, undisturbed = finish(group(config, sources, cache_dir=tmp_path / "cache", truth=truth))
    stages = ["features", "heads", "pixels", "training", "encoding", "answer", "baseline", "representatives"]
    assert list(dict.fromkeys(step.stage for step in steps)) == stages
    assert steps[-1].fraction == pytest.approx(1)
    assert [step.fraction for step in steps] == sorted(step.fraction for step in steps)
    found = undisturbed.metrics["frozen"]
    head = finish(group(Config(clusters=3, image_size=64, restarts=4, seed=1), sources, truth=truth))[1]
    assert found["quality"] == head.metrics["quality"]
    assert found["agreement"] == pytest.approx(adjusted_rand_score(head.labels_N, undisturbed.labels_N))
    assert head.metrics["frozen"] is None
    save_model(undisturbed, config, tmp_path / "model")
    arrays = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert {"centres", "axes", "backbone.body.layers._conv_head.weight"} <= set(arrays)
    asked = iter([False, True])
    with pytest.raises(Stopped):
        finish(group(config, sources, checkpoint=tmp_path / "kept", stop=lambda: next(asked, False)))
    steps, resumed = finish(group(config, sources, checkpoint=tmp_path / "kept"))
    assert next(step for step in steps if step.stage == "training").done == 2
    assert np.array_equal(resumed.labels_N, undisturbed.labels_N)
    assert np.array_equal(resumed.confidence_N, undisturbed.confidence_N)


def test_it_takes_a_backbone_that_knows_something():
    with pytest.raises(
        InputError, match=r"weights is 'random'; 'finetune' needs a pretrained backbone, so train 'full'"
    ):
        Config(clusters=3, train="finetune", weights="random")


def test_a_temperature_outside_of_its_limits_is_refused_by_name():
    with pytest.raises(ValueError, match="temperature"):
        SelfLabellingConfig(temperature=0.0)
