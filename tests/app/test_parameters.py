"""What a run can be asked, beside what the algorithm takes."""

from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from sqlalchemy import text

from app import storage
from app.config import Settings, settings
from app.db.session import open_session
from app.errors import Invalid
from app.services import parameters, runs
from app.services.parameters import Parameters
from models import config
from tests.app.test_api import archive, assert_problem, rows
from tests.app.test_web import finished_run


def weights_folder(path: Path, *names: str) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"tensors")


def test_the_lists_are_those_of_the_algorithm():
    assert {method: set(ways) for method, ways in parameters.TRAIN_OF_METHOD.items()} == {
        method: set(ways) for method, ways in config.METHODS.items()
    }
    assert set(get_args(parameters.Method)) == set(parameters.TRAIN_OF_METHOD)
    assert parameters.BACKBONES == config.BACKBONES
    assert parameters.PRETRAINED == config.PRETRAINED


def test_what_goes_together_is_what_the_algorithm_takes(tmp_path: Path):
    file = tmp_path / "net.safetensors"
    file.write_bytes(b"tensors")
    backbones = (*config.BACKBONES, "timm/vit_small_patch14_dinov2.lvd142m", "timm/../x", "resnet9000")
    asked = product((2, 4096, 1, 4097, "auto", "many"), config.METHODS, ("head", "finetune", "full"), backbones)
    for clusters, method, train, backbone in asked:
        for weights in (None, "random", file.name):
            values = {"clusters": clusters, "method": method, "train": train, "backbone": backbone}
            path = str(file) if weights == file.name else weights
            try:
                config.Config(**values, weights=path)
                # The one rule that the algorithm checks when it starts.
                taken = not (clusters == "auto" and weights == "random")
            except config.InputError:
                taken = False
            try:
                Parameters(**values, weights=weights)
                accepted = True
            except ValidationError:
                accepted = False
            assert accepted == taken, (values, weights)


@pytest.mark.parametrize("method", list(config.METHODS))
def test_a_method_trains_in_its_usual_way_unless_told(method: str):
    resolved = Parameters(clusters="auto", method=method)
    assert resolved.train == next(iter(config.METHODS[method]))


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"clusters": "some"}, "clusters", "a whole number from 2 to 4096, or auto"),
        ({"clusters": "2.5"}, "clusters", "a whole number from 2 to 4096, or auto"),
        ({"method": "simclr", "train": "head"}, "train", "simclr trains full only"),
        ({"method": "temi", "train": "full"}, "train", "temi trains head only"),
        ({"backbone": "timm/"}, "backbone", "resnet34, or timm/NAME"),
        ({"backbone": "resnet18"}, "weights", "resnet18 comes without weights"),
        ({"weights": "random"}, "weights", "to train head takes a pretrained backbone"),
        ({"weights": "random", "train": "finetune"}, "weights", "to train finetune takes a pretrained backbone"),
        ({"weights": "random", "train": "full", "clusters": "auto"}, "weights", "is found on pretrained features"),
        ({"weights": "../secret"}, "weights", "without any folder"),
        ({"weights": "/etc/passwd"}, "weights", "without any folder"),
        ({"weights": "a\\b"}, "weights", "without any folder"),
        ({"weights": ".."}, "weights", "without any folder"),
        ({"weights": "a\x00b"}, "weights", "without any folder"),
    ],
)
def test_a_wrong_combination_names_its_field(api: TestClient, fields: dict, field: str, words: str):
    answer = api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "2", **fields})
    (error,) = assert_problem(answer, 422, "invalid-input")["errors"]
    assert error["field"] == field
    assert words in error["message"]
    assert rows("collections") == 0


def test_a_weights_file_must_be_there_when_it_is_named(api: TestClient, tmp_path: Path):
    request = {"files": {"file": archive()}, "data": {"clusters": "2", "backbone": "resnet18", "weights": "net.pth"}}
    body = assert_problem(api.post("/v1/cluster", **request), 422, "weights-not-found")
    assert body["errors"] == [{"field": "weights", "message": "the service's weights folder holds no files"}]
    folder = settings().data_dir / "weights"
    weights_folder(folder, "other.safetensors", ".hidden", "folder/inner.pth")
    body = assert_problem(api.post("/v1/cluster", **request), 422, "weights-not-found")
    assert body["errors"] == [{"field": "weights", "message": "one of: other.safetensors"}]
    assert rows("runs") == 0
    weights_folder(folder, "net.pth")
    run = api.post("/v1/cluster", **request).json()
    assert run["parameters"]["weights"] == "net.pth"
    assert storage.weights("net.pth") == folder.resolve() / "net.pth"


def test_a_folder_that_is_set_to_nothing_is_not_set(database: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Compose files pass on variables that nobody has set as empty ones; empty is also how one writes "here"."""
    (tmp_path / "here.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KINDRED_WEIGHTS_DIR", "")
    settings.cache_clear()
    assert settings().weights_dir is None
    assert storage.weights_files() == []


def test_a_lease_outlives_a_missed_heartbeat(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINDRED_LEASE_S", "6")
    monkeypatch.setenv("KINDRED_HEARTBEAT_S", "3")
    assert Settings().heartbeat_s == 3
    for heartbeat_s in ("3.1", None):  # 10 as it comes
        if heartbeat_s is None:
            monkeypatch.delenv("KINDRED_HEARTBEAT_S")
        else:
            monkeypatch.setenv("KINDRED_HEARTBEAT_S", heartbeat_s)
        with pytest.raises(ValidationError, match="more than half of KINDRED_LEASE_S, 6"):
            Settings()


def test_the_weights_folder_is_a_setting(database: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KINDRED_WEIGHTS_DIR", str(tmp_path / "nets"))
    settings.cache_clear()
    assert storage.weights_files() == []
    weights_folder(tmp_path / "nets", "b.pth", "a.safetensors")
    assert storage.weights_files() == ["a.safetensors", "b.pth"]


def test_a_run_that_finds_its_clusters_tells_how_many_once_it_knows(api: TestClient):
    run = api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "auto"}).json()
    assert (run["clusters"], run["parameters"]["clusters"]) == (None, "auto")
    done = finished_run(metrics={"sizes": [4, 1], "auto": {"clusters": 2}})
    with open_session() as session:
        session.execute(text("""UPDATE runs SET parameters = parameters || '{"clusters": "auto"}'"""))
        session.commit()
    found = api.get(f"/v1/runs/{done.id}").json()
    assert (found["clusters"], found["parameters"]["clusters"]) == (2, "auto")
    asked = api.post("/v1/cluster", files={"file": archive()}, data={"clusters": "2"}).json()
    assert asked["clusters"] == 2


@pytest.mark.parametrize(
    ("clusters", "images", "words"),
    [("auto", 1, "at least 2 images.* has 1"), (3, 2, "at least 3 images.* has 2"), ("auto", 2, None), (3, 3, None)],
)
def test_how_many_images_are_enough(clusters, images: int, words: str | None):
    with pytest.raises(Invalid, match=words) if words else nullcontext():
        runs.check_enough(clusters, images)
