"""`kindred cluster` against the running service, and its answers to bad input."""

import csv
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.pictures import picture, tar_of, two_kinds, zip_of

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("service")]

KINDRED = Path(sys.executable).with_name("kindred")


def kindred(service: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KINDRED, *arguments],
        cwd=cwd,
        env={**os.environ, "KINDRED_SERVER": service, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_folder_is_grouped_and_its_labels_written(service: str, tmp_path: Path):
    files = two_kinds(24)
    for name, content in files.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    done = kindred(
        service,
        "cluster",
        "photos",
        "--clusters",
        "2",
        "--truth",
        "folder",
        "-o",
        "out/labels.csv",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "labels.csv").read_text().splitlines()))
    assert {row["filename"] for row in rows} == set(files)
    assert "scl: ACC 1.000" in done.stdout
    assert "k-means, same features: ACC" in done.stdout
    assert str(tmp_path / "out" / "labels.csv") in done.stdout
    assert "Not sent: 1 .txt. Images are told by their names: .bmp" in done.stderr


def test_labels_that_could_not_be_written_are_said_before_anything_is_sent(service: str, tmp_path: Path):
    (tmp_path / "photos.zip").write_bytes(zip_of(two_kinds(8)))
    (tmp_path / "file").write_text("")
    for output, why in ((".", "it is a folder; name a file in it"), ("file/labels.csv", "file is no folder")):
        done = kindred(service, "cluster", "photos.zip", "-k", "2", "-o", output, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: cannot write ")
        assert why in done.stderr
        assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos.zip"]


def test_the_same_seed_gives_the_same_labels_twice(service: str, tmp_path: Path):
    (tmp_path / "photos.zip").write_bytes(zip_of(two_kinds(40)))
    for name in ("one.csv", "two.csv"):
        done = kindred(service, "cluster", "photos.zip", "-k", "3", "--seed", "5", "-o", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    # Image ids are new in a new collection; everything else is the same to the last digit.
    first, second = (
        [row[1:] for row in csv.reader((tmp_path / name).read_text().splitlines())] for name in ("one.csv", "two.csv")
    )
    assert first == second


def test_the_number_of_groups_is_found_where_it_is_left_open(service: str, tmp_path: Path):
    (tmp_path / "photos.zip").write_bytes(zip_of(two_kinds(40)))
    done = kindred(service, "cluster", "photos.zip", "-k", "auto", "--image-size", "64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "labels.csv").read_text().splitlines()))
    assert f"clusters found: {len({row['cluster'] for row in rows})}; why: {service}/v1/runs/" in done.stdout


def test_the_last_layers_learn_what_a_head_found_where_that_is_asked(service: str, tmp_path: Path):
    (tmp_path / "photos.zip").write_bytes(zip_of(two_kinds(40)))
    done = kindred(
        service,
        *("cluster", "photos.zip", "-k", "2", "--train", "finetune", "--image-size", "64", "--truth", "folder"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    at = lines.index("scl: ACC 1.000  NMI 1.000  ARI 1.000")
    assert lines[at + 1].startswith("before the network learned: ACC ")
    assert lines[at + 2].startswith("k-means, same features: ACC ")


@pytest.mark.parametrize(
    ("name", "content", "clusters", "words"),
    [
        ("empty.zip", zip_of({}), "2", "empty.zip"),
        ("texts.zip", zip_of({"a.txt": b"hello", "b.jpg": b"text named jpg"}), "2", "texts.zip"),
        ("few.tar.gz", tar_of({"a.png": picture(1), "b.png": picture(2)}), "3", "at least 3 images"),
        ("broken.tar.gz", tar_of(two_kinds(30))[:-2000], "2", "broken.tar.gz"),
        ("notes.txt", b"hello", "2", "notes.txt is not an archive"),
    ],
)
def test_bad_input_is_one_clear_line(
    service: str, tmp_path: Path, name: str, content: bytes, clusters: str, words: str
):
    (tmp_path / name).write_bytes(content)
    done = kindred(service, "cluster", name, "--clusters", clusters, cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "labels.csv").exists()


def test_a_path_that_is_not_there_and_one_cluster(service: str, tmp_path: Path):
    done = kindred(service, "cluster", "nowhere.zip", "--clusters", "2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "error: nowhere.zip is neither a folder nor a file\n")
    done = kindred(service, "cluster", "nowhere.zip", "--clusters", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Invalid value for '--clusters' / '-k'")
    assert "1 is neither a whole number from 2 to 4096 nor auto" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "simclr", "--train", "head"], "error: --train: method simclr trains full only\n"),
        (["--backbone", "resnet18"], "error: --weights: backbone resnet18 comes without weights"),
        (["--weights", "../net.pth"], "error: --weights: must be random, or the name of a file"),
    ],
)
def test_parameters_that_do_not_go_together_are_refused_before_anything_is_sent(
    tmp_path: Path, arguments: list[str], words: str
):
    (tmp_path / "photos.zip").write_bytes(zip_of(two_kinds(4)))
    done = kindred("http://127.0.0.1:1", "cluster", "photos.zip", "-k", "auto", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == 1


def test_a_setting_that_is_none_is_named(tmp_path: Path):
    done = subprocess.run(
        [KINDRED, "up"],
        cwd=tmp_path,
        env={**os.environ, "KINDRED_PORT": "http", "KINDRED_DATABASE_URL": "mysql://me:secret@db/x"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: KINDRED_")
    assert "KINDRED_PORT: Input should be a valid integer" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


@pytest.mark.parametrize("key", [None, ""])
def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None):
    if key is not None:
        monkeypatch.setenv("KINDRED_API_KEY", key)
    (tmp_path / "photos.zip").write_bytes(zip_of(two_kinds(4)))
    done = kindred("http://127.0.0.1:1", "cluster", "photos.zip", "--clusters", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "http://127.0.0.1:1 cannot be reached" in done.stderr
    assert "refused" in done.stderr


@pytest.mark.parametrize(("server", "asked"), [("http://127.0.0.1:1", False), ("http://kindred.invalid:1", True)])
def test_a_proxy_is_asked_for_other_machines_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, *, asked: bool
):
    """It would see the pictures and the key."""
    heard = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.path)
            self.send_error(502)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "photos.zip").write_bytes(zip_of(two_kinds(4)))
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        done = kindred(server, "cluster", "photos.zip", "--clusters", "2", cwd=tmp_path)
        proxy.shutdown()
    assert done.returncode == 1
    assert bool(heard) == asked, heard
