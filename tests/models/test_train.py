import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from models import train
from models.config import METHODS
from models.folder import main, read_folder, true_labels
from models.full import Stopped
from models.train import Config, InputError, group, save_model
from tests.models.conftest import finish, sources_of

QUICK = {"image_size": 64, "epochs": 3, "restarts": 2}
HEADS = [method for method, ways in METHODS.items() if "head" in ways]


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"clusters": 1}, "clusters is 1; it must be from 2 to 4096"),
        ({"clusters": 5000}, "clusters is 5000"),
        ({"clusters": "ten"}, "clusters is 'ten'; it must be a whole number"),
        ({"clusters": True}, "clusters is True"),
        ({"method": "magic"}, "method is 'magic'; it must be one of: scl, kmeans"),
        ({"clusters": "auto!"}, "clusters is 'auto!'"),
        ({"train": "half"}, "train is 'half'; it must be one of: head, finetune, full"),
        ({"train": "full", "method": "kmeans"}, "method 'kmeans' does not train 'full'; it trains: head"),
        ({"method": "cc"}, "method 'cc' does not train 'head'; it trains: full"),
        ({"backbone": "vgg"}, "backbone is 'vgg'"),
        ({"backbone": "resnet18"}, "backbone 'resnet18' comes without weights; name a weights file, or 'random'"),
        ({"weights": "random"}, "weights is 'random'; 'head' needs a pretrained backbone, so train 'full'"),
        ({"weights": "/nowhere/w.pt"}, "weights is '/nowhere/w.pt'; there is no such file"),
        ({"image_size": 16}, "image_size is 16; it must be from 32 to 1024"),
        ({"epochs": 0}, "epochs is 0"),
        ({"restarts": 101}, "restarts is 101; it must be from 1 to 100"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_bad_setting_is_named(setting, message):
    with pytest.raises(InputError, match=message):
        Config(**{"clusters": 3, **setting})


def test_the_methods_defaults_are_filled_in():
    resolved = Config(clusters=3, method="scl").resolved()
    assert resolved.epochs
    assert resolved.restarts
    assert Config(clusters=3, epochs=7).resolved().epochs == 7
    assert resolved.resolved() == resolved


@pytest.mark.parametrize("method", HEADS)
def test_a_grouping_keeps_its_promises(sources, cache, method):
    truth = [source.path.parent.name for source in sources]
    config = Config(clusters=3, method=method, **QUICK)
    steps, found = finish(group(config, sources, cache_dir=cache, truth=truth))

    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)
    sizes = np.bincount(found.labels_N, minlength=3)
    assert sizes.tolist() == sorted(sizes, reverse=True) == found.metrics["sizes"]
    assert (found.labels_N != found.runner_up_N).all()
    assert ((found.confidence_N > 0) & (found.confidence_N <= 1)).all()
    assert found.labels_N.dtype == found.runner_up_N.dtype == np.int64
    assert found.confidence_N.dtype == found.margin_N.dtype == found.typicality_N.dtype == np.float32
    for cluster, rows in enumerate(found.representatives):
        assert len(rows) == min(12, sizes[cluster])
        assert (found.labels_N[rows] == cluster).all()
        own = found.typicality_N[found.labels_N == cluster]
        assert found.typicality_N[rows[0]] == own.max()
        assert found.cohesion_K[cluster] == pytest.approx(own.mean(), rel=1e-4)
    assert found.metrics["quality"]["acc"] > 0.5
    assert (found.metrics["baseline"] is not None) == (method != "kmeans")
    assert found.metrics["auto"] is None
    assert 0 <= found.metrics["calibration"]["ece"] <= 1
    assert np.array_equal(found.levels["groups_3"], found.labels_N)
    if method != "kmeans":
        assert found.metrics["baseline"]["quality"].keys() == {"acc", "nmi", "ari"}
    json.dumps(found.metrics, allow_nan=False)


@pytest.mark.parametrize("method", ["scl", "kmeans"])
def test_the_same_run_gives_the_same_labels(sources, cache, method):
    config = Config(clusters=4, method=method, seed=5, **QUICK)
    one = finish(group(config, sources, cache_dir=cache))[1]
    two = finish(group(config, sources, cache_dir=None))[1]  # nor does the cache matter
    assert np.array_equal(one.labels_N, two.labels_N)
    assert np.array_equal(one.confidence_N, two.confidence_N)
    assert one.representatives == two.representatives


@pytest.mark.parametrize("method", HEADS)
@pytest.mark.parametrize(("images", "clusters"), [(2, 2), (3, 2), (3, 3), (5, 4), (17, 16)])
def test_very_small_collections(sources, cache, method, images, clusters):
    chosen = sources[:: len(sources) // images][:images]
    config = Config(clusters=clusters, method=method, **QUICK)
    found = finish(group(config, chosen, cache_dir=cache))[1]
    assert np.isfinite(found.confidence_N).all()
    assert np.isfinite(found.typicality_N).all()
    assert sum(found.metrics["sizes"]) == images
    json.dumps(found.metrics, allow_nan=False)
    if images == clusters == 2:
        assert found.labels_N.tolist() == [0, 1]


@pytest.mark.parametrize("method", ["scl", "kmeans"])
def test_many_copies_of_a_few_images(sources, cache, method):
    chosen = [sources[0], sources[25], sources[50]] * 10
    config = Config(clusters=3, method=method, **QUICK)
    labels_N = finish(group(config, chosen, cache_dir=cache))[1].labels_N
    assert len({tuple(labels_N[start::3]) for start in range(3)}) == 3
    assert all(len(set(labels_N[start::3])) == 1 for start in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scl", "simclr", "cc", "pica"])
def test_a_backbone_trains_too(sources, tmp_path, method):
    settings = {"train": "full", "backbone": "resnet10_slim", "weights": "random", "image_size": 32}
    config = Config(clusters=3, method=method, epochs=4, restarts=2, seed=1, **settings)
    truth = [source.path.parent.name for source in sources]
    steps, found = finish(group(config, sources, cache_dir=tmp_path, truth=truth))
    stages = {"pixels", "training", "encoding", "answer", "baseline", "representatives"}
    assert {step.stage for step in steps} == stages
    assert steps[-1].fraction == pytest.approx(1)
    assert sum(found.metrics["sizes"]) == 60
    assert found.metrics["baseline"]["quality"].keys() == {"acc", "nmi", "ari"}
    save_model(found, config, tmp_path / "model")
    arrays = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert {"centres", "backbone.body.layers.0.weight"} <= set(arrays)
    again = finish(group(config, sources, cache_dir=None))[1]
    assert np.array_equal(again.labels_N, found.labels_N)


@pytest.mark.slow
def test_a_full_training_told_to_stop_goes_on_from_there(sources, tmp_path):
    settings = {"train": "full", "backbone": "resnet10_slim", "weights": "random", "image_size": 32}
    config = Config(clusters=3, epochs=4, restarts=2, **settings)
    undisturbed = finish(group(config, sources))[1]
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        finish(group(config, sources, checkpoint=tmp_path, stop=lambda: next(asked)))
    steps, resumed = finish(group(config, sources, checkpoint=tmp_path))
    assert next(step for step in steps if step.stage == "training").done == 3
    assert np.array_equal(resumed.labels_N, undisturbed.labels_N)
    # What another run has left there is no reason to fail, nor any part of the answer.
    other = Config(clusters=4, epochs=4, restarts=2, seed=7, **settings)
    with pytest.raises(Stopped):
        finish(group(other, sources, checkpoint=tmp_path, stop=lambda: True))
    steps, anew = finish(group(config, sources, checkpoint=tmp_path))
    assert next(step for step in steps if step.stage == "training").done == 0
    assert np.array_equal(anew.labels_N, undisturbed.labels_N)


def test_the_number_of_clusters_is_found(sources, cache):
    config = Config(clusters="auto", **QUICK)
    found = finish(group(config, sources, cache_dir=cache))[1]
    chosen = found.metrics["auto"]["clusters"]
    assert len(found.metrics["sizes"]) == chosen
    assert {row["clusters"] for row in found.metrics["auto"]["sweep"]} >= {chosen}
    assert set(found.labels_N) <= set(range(chosen))
    json.dumps(found.metrics, allow_nan=False)


def test_a_number_needs_features_to_be_found_on(sources):
    config = Config(clusters="auto", train="full", backbone="resnet10_slim", weights="random", image_size=32)
    with pytest.raises(InputError, match="clusters is 'auto' and weights is 'random'"):
        finish(group(config, sources))


def test_features_that_are_no_numbers_are_refused(sources, tmp_path):
    config = Config(clusters=3, method="kmeans", image_size=64)
    finish(group(config, sources, cache_dir=tmp_path))
    (part,) = tmp_path.rglob("part-*.npy")
    features_NF = np.load(part)
    features_NF[0] = np.nan
    np.save(part, features_NF)
    with pytest.raises(InputError, match=r"the features of image .+\.png are not numbers"):
        finish(group(config, sources, cache_dir=tmp_path))


def test_a_single_image_cannot_be_grouped(sources):
    with pytest.raises(InputError, match="1 images cannot be grouped; at least 2 are needed"):
        finish(group(Config(clusters="auto"), sources[:1]))


def test_more_clusters_than_images(sources):
    with pytest.raises(InputError, match="10 clusters asked of 7 images"):
        finish(group(Config(clusters=10), sources[:7]))


@pytest.mark.parametrize("method", HEADS)
def test_more_clusters_than_different_images(sources, method):
    with pytest.raises(InputError, match="2 clusters asked of 6 images, of which only 1 differ"):
        finish(group(Config(clusters=2, method=method, image_size=64), [sources[0]] * 6))


def test_a_truth_for_every_image(sources):
    with pytest.raises(InputError, match="1 true labels came with 5 images"):
        finish(group(Config(clusters=2), sources[:5], truth=["a"]))


def test_a_broken_image_is_named(sources, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(sources[0].path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"broken\.png cannot be read"):
        finish(group(Config(clusters=2, image_size=64), [*sources[:3], *sources_of([broken])]))


def test_the_saved_model_draws_the_same_boundaries(sources, cache, tmp_path):
    config = Config(clusters=3, method="kmeans", **QUICK)
    found = finish(group(config, sources, cache_dir=cache))[1]
    save_model(found, config, tmp_path / "model")
    arrays = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert arrays["centres"].shape == (3, 1280)
    parts = sorted(cache.rglob("*-64-*/part-*.keys"))
    rows = {}
    for part in parts:
        rows.update(zip(part.read_text().split(), np.load(part.with_suffix(".npy")), strict=True))
    features_NF = np.stack([rows[source.key] for source in sources]).astype(np.float32)
    features_NF /= np.linalg.norm(features_NF, axis=1, keepdims=True)
    agree = ((features_NF @ arrays["centres"].T).argmax(axis=1) == found.labels_N).mean()
    assert agree > 0.9  # the clusters kept their names; borders move a little as centres are put on the sphere
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    assert description["config"]["restarts"] == 2
    assert len(description["backbone_sha256"]) == 64
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]


def arguments(folder, out, **extra):
    options = {"clusters": 3, "image-size": 64, "epochs": 3, "restarts": 2, "out": out, **extra}
    return [str(folder), *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


@pytest.mark.slow
def test_the_command_groups_a_folder_of_digits(digits, tmp_path):
    folder = tmp_path / "pictures"
    for source in sorted(digits.rglob("*.png")):
        target = folder / source.relative_to(digits)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (folder / "notes.txt").write_text("no picture")
    (folder / "0" / "cut.png").write_bytes((folder / "0" / "00.png").read_bytes()[:80])
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "models.train", *arguments(folder, tmp_path / "out", truth="folder")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "100% representatives" in ended.stderr

    with (tmp_path / "out" / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["filename", "cluster", "confidence", "runner_up", "margin", "consensus"]
    assert len(rows) == 60
    assert rows[0]["filename"] == "0/00.png"
    assert {row["consensus"] for row in rows} <= {"true", "false"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["skipped"] == {"count": 2, "files": ["0/cut.png", "notes.txt"]}
    for found in (report["metrics"], report["metrics"]["baseline"]):
        assert found["quality"].keys() == {"acc", "nmi", "ari"}
    assert sum(cluster["size"] for cluster in report["clusters"]) == 60
    assert (tmp_path / "out" / "model.safetensors").exists()
    with (tmp_path / "out" / "levels.csv").open() as file:
        levels = list(csv.DictReader(file))
    assert [row["groups_3"] for row in levels] == [row["cluster"] for row in rows]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"clusters": 61}, "error: 61 clusters asked of 60 images; ask for fewer clusters"),
        ({"clusters": 1}, "error: clusters is 1; it must be from 2 to 4096"),
        ({"method": "magic"}, f"error: method is 'magic'; it must be one of: {', '.join(METHODS)}"),
        ({"method": "cc"}, "error: method 'cc' does not train 'head'; it trains: full"),
        (
            {"backbone": "resnet18"},
            "error: backbone 'resnet18' comes without weights; name a weights file, or 'random' to train in full",
        ),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(digits, tmp_path, capsys, extra, message):
    assert main(arguments(digits, tmp_path / "out", **extra)) == 2
    assert capsys.readouterr().err == message + "\n"


def test_a_preset_is_a_few_settings_that_single_ones_go_before(digits, tmp_path):
    options = [str(digits), "--clusters", "3", "--preset", "fast", "--epochs", "2", "--out", str(tmp_path)]
    assert main([*options, "--image-size", "64"]) == 0
    config = json.loads((tmp_path / "report.json").read_text())["config"]
    assert (config["restarts"], config["image_size"], config["epochs"]) == (4, 64, 2)


def test_the_command_needs_a_folder_with_pictures(tmp_path, capsys):
    assert main(arguments(tmp_path / "nowhere", tmp_path / "out")) == 2
    assert capsys.readouterr().err.endswith("nowhere is no folder\n")
    assert main(arguments(tmp_path, tmp_path / "out")) == 2
    assert "holds no readable images (0 other files)" in capsys.readouterr().err


def test_a_bad_command_line_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["folder", "--clusters", "many", "--out", "out"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: argument --clusters: invalid number value: 'many'\n"


def test_a_folder_with_names_that_are_no_utf_8(sources, tmp_path):
    for number, source in enumerate(sources[:6]):
        (tmp_path / os.fsdecode(b"caf\xe9-%d.png" % number)).write_bytes(source.path.read_bytes())
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("no picture")
    assert main(arguments(tmp_path, tmp_path / "out", clusters=2)) == 0
    labels = (tmp_path / "out" / "labels.csv").read_bytes()
    assert labels.count(b"caf\xe9-") == 6
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert os.fsdecode(b"\xff.txt") in report["skipped"]["files"]


def test_a_name_may_hold_a_carriage_return(sources, tmp_path):
    for number, source in enumerate(sources[:6]):
        (tmp_path / f"a\r{number}.png").write_bytes(source.path.read_bytes())
    assert main(arguments(tmp_path, tmp_path / "out", clusters=2)) == 0
    for name in ("labels.csv", "levels.csv"):
        with (tmp_path / "out" / name).open(newline="") as file:
            assert [row["filename"] for row in csv.DictReader(file)] == [f"a\r{number}.png" for number in range(6)]


def test_folders_are_read_wherever_they_lie_and_only_once(sources, tmp_path):
    for number, source in enumerate(sources[:6]):
        path = tmp_path / ("elsewhere" if number < 3 else "root/b") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.path.read_bytes())
    root = tmp_path / "root"
    for link, target in (("a", tmp_path / "elsewhere"), ("again", tmp_path / "elsewhere"), ("b/up", root)):
        (root / link).symlink_to(target)
    (root / "out").mkdir()
    (root / "out" / "0.png").write_bytes(sources[0].path.read_bytes())
    found, skipped = read_folder(root, besides=root / "out")
    assert [source.path.relative_to(root).as_posix() for source in found] == [
        "a/0.png", "a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png",
    ]  # fmt: skip
    assert skipped == []
    # An answer beside or above the pictures leaves none out.
    assert len(read_folder(root, besides=tmp_path)[0]) == 7


@pytest.mark.parametrize("out", ["file/out", "/sys"])
def test_an_answer_that_could_not_be_written_is_said_at_once(digits, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(arguments(digits, out)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out} cannot be written to: ")
    assert said.count("\n") == 1


def test_true_labels_are_the_nearest_folders():
    assert true_labels(["train/cat/1.jpg", "dog/2.jpg"]) == ["cat", "dog"]


def test_true_labels_need_folders(tmp_path, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "loose.png")
    assert main(arguments(tmp_path, tmp_path / "out", truth="folder")) == 2
    assert "loose.png lies in no folder" in capsys.readouterr().err


def test_the_train_module_offers_what_the_worker_uses():
    assert {"Config", "Grouping", "InputError", "Progress", "Source", "group", "save_model"} <= set(train.__all__)
