import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import finetuning
from benchmarks.archives import Selection, unpack
from benchmarks.finetuning import VARIANTS, Variant
from models import heads
from models.baselines import kmeans
from models.config import METHODS, Config
from models.progress import finish
from models.train import group
from tests.pictures import two_kinds, zip_of


@pytest.fixture
def made():
    """Makes a variant's objective for a grouping of some features on which a third of the images differ."""
    features_NF = np.random.default_rng(0).normal(size=(60, 64)).astype(np.float32)
    found = finish(heads.train(features_NF, clusters=3, epochs=2, restarts=2, seed=0))
    found = replace(found, assignment=replace(found.assignment, consensus_N=np.arange(60) % 3 > 0))

    def make(variant: Variant):
        factory = variant.objective(found, features_NF)
        return factory(feature_size=64, images=60, clusters=3, epochs=1)

    return make


def traits(objective):
    return {
        "views": objective.view_strengths,
        "share": objective.trained_share,
        "own": objective.own_statistics,
        "trusted": torch.count_nonzero(objective.trust_N).item(),
    }


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("weak views", {"views": ("weak",)}),
        ("the images as they are", {"views": ("plain",)}),
        ("every image trusted alike", {"trusted": 60}),
        ("the last third of the layers", {"share": 1 / 3}),
        ("batches normalised by their own statistics", {"own": True}),
    ],
)
def test_a_variant_differs_from_the_whole_in_one_thing(made, name, changed):
    whole = traits(made(VARIANTS["finetune"]))
    assert whole == {"views": ("strong",), "share": 1.0, "own": False, "trusted": 40}
    assert traits(made(VARIANTS[name])) == whole | changed


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "kinds.zip"
    path.write_bytes(zip_of(two_kinds(24)))
    return path


@pytest.mark.slow
def test_the_whole_is_what_the_service_trains(archive, tmp_path):
    ours = finetuning.run(finetuning.decoded(Selection(archive=archive), tmp_path / "ours"), 1, ["finetune"])
    sources, truth = unpack(Selection(archive=archive), tmp_path / "theirs")
    config = Config(clusters=2, train="finetune", seed=1)
    service = finish(group(config, sources, truth=truth)).metrics
    assert ours == {"head": service["frozen"]["quality"], "finetune": service["quality"]}


@pytest.mark.slow
def test_other_methods_labels_are_taught_where_the_variant_says_so(archive, tmp_path, monkeypatch):
    taught = []
    plain = Variant.objective
    monkeypatch.setattr(Variant, "objective", lambda *given: taught.append(given[1]) or plain(*given))
    folder = finetuning.decoded(Selection(archive=archive), tmp_path / "files")
    finetuning.run(folder, 0, ["finetune", "k-means' labels"])
    usual = METHODS["kmeans"]["head"]
    features_NF = np.load(folder / "features.npy")
    steps = kmeans.train(features_NF, clusters=2, epochs=usual.epochs, restarts=usual.restarts, seed=0)
    expected = finish(steps).assignment
    own, others = (fit.assignment for fit in taught)
    assert np.array_equal(others.confidence_N, expected.confidence_N)
    assert not np.array_equal(own.confidence_N, expected.confidence_N)
    assert np.array_equal(taught[0].model["axes"], taught[1].model["axes"])


@pytest.mark.slow
def test_every_row_is_compared_with_the_whole(archive, capsys):
    finetuning.main(["--data", str(archive), "--only", "finetune", "weak views", "--seeds", "1"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert json.loads(first)["found"]["finetune"]["acc"] == 1.0
    cells = [line.split(" | ") for line in lines]
    assert [line[0] for line in cells] == ["variant", "head", "finetune", "weak views"]
    assert cells[2][1:] == ["1.000 ± 0.000, 1.000, 1.000", "1.000 (+0.000)"]
