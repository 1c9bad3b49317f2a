"""Which images a benchmark takes, and what its tables are made of."""

import json
import zipfile

import numpy as np
import pytest

from benchmarks import ablation, full, quality
from benchmarks.archives import Selection, unpack
from tests.pictures import two_kinds


@pytest.mark.parametrize(
    ("text", "images", "skewed"), [("a.zip", None, False), ("a.zip:50", 50, False), ("a.zip:50:skewed", 50, True)]
)
def test_a_selection_is_an_archive_and_how_much_of_it(text, images, skewed):
    found = Selection.parse(text)
    assert (found.archive.name, found.images, found.skewed) == ("a.zip", images, skewed)


@pytest.mark.parametrize("text", ["a.zip:many", "a.zip:5:sorted", "a.zip::skewed"])
def test_nonsense_is_no_selection(text):
    with pytest.raises(ValueError, match="is not ZIP, ZIP:N or ZIP:N:skewed"):
        Selection.parse(text)


def test_a_skewed_selection_falls_ten_to_one():
    class_N = np.repeat(np.arange(10), 600)
    rows = Selection.parse("a.zip:2000:skewed").rows(class_N)
    sizes = np.sort(np.bincount(class_N[rows]))[::-1]
    assert len(set(rows.tolist())) == len(rows)
    assert sizes[0] / sizes[-1] == pytest.approx(10, rel=0.02)
    np.testing.assert_allclose(sizes[1:] / sizes[:-1], 10 ** (-1 / 9), rtol=0.02)
    assert abs(len(rows) - 2000) < 10
    assert np.array_equal(rows, Selection.parse("a.zip:2000:skewed").rows(class_N))


def test_an_archive_is_unpacked_with_its_folders_as_classes(tmp_path):
    archive = small_archive(tmp_path, 10)
    sources, truth = unpack(Selection(archive=archive), tmp_path / "images")
    assert truth == ["noise"] * 5 + ["stripes"] * 5
    assert len({source.key for source in sources}) == 10
    assert len(unpack(Selection(archive=archive, images=4), tmp_path / "fewer")[0]) == 4


def small_archive(folder, images):
    path = folder / "kinds.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in two_kinds(images).items():
            archive.writestr(name, content)
    return path


def test_an_image_that_cannot_be_read_is_named_in_one_line(tmp_path):
    archive = small_archive(tmp_path, 4)
    with zipfile.ZipFile(archive, "a") as members:
        members.writestr("stripes/pointer.jpg", b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(SystemExit, match=r"^error: kinds: image \d-pointer\.jpg cannot be read: .*$"):
        quality.main(["--data", str(archive)])


@pytest.mark.slow
def test_quality_prints_a_row_for_every_method(tmp_path, capsys):
    archive = small_archive(tmp_path, 24)
    quality.main(["--data", str(archive), "--methods", "scl", "kmeans", "finetune", "--seeds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "kinds: 24 images, 2 classes, seeds 0 to 1"
    assert [line.split()[0] for line in lines[2:]] == ["method", "scl", "kmeans", "finetune"]
    assert lines[3].split()[1:4] == ["1.000", "±", "0.000"]  # stripes and noise are easy


@pytest.mark.slow
def test_ablation_tells_training_from_what_stands_before_it(tmp_path, capsys):
    archive = small_archive(tmp_path, 24)
    rows = ["full", "not trained", "k-means", "TEMI, same directions"]
    ablation.main(["--data", str(archive), "--only", *rows, "--seeds", "1"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["variant", *rows]
    assert lines[1][1:] == ["1.000 ± 0.000, 1.000, 1.000", "1.000 (+0.000)"]
    assert lines[3][1:] == ["1.000 ± 0.000, 1.000, 1.000", "1.000 (+0.000)"]


@pytest.mark.slow
def test_full_compares_methods_at_an_equal_budget(tmp_path, capsys):
    archive = small_archive(tmp_path, 24)
    record, figure = tmp_path / "record.jsonl", tmp_path / "curve.png"
    options = ["--epochs", "4", "--seeds", "1", "--methods", "scl", "simclr", "--record", str(record)]
    full.main(["--data", str(archive), *options, "--figure", str(figure)])
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    methods = ["scl", "simclr, heads on features", "simclr, k-means on features", "simclr, k-means on projection"]
    assert sorted({row["method"] for row in rows}) == methods
    assert sorted({row["epoch"] for row in rows}) == [1, 2, 3, 4]
    assert all(0 <= row["acc"] <= 1 for row in rows)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "simclr, k-means on features" in capsys.readouterr().out
