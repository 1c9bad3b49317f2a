"""docs/quickstart.md, executed as it is written."""

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.pictures import two_kinds, zip_of

QUICKSTART = Path(__file__).resolve().parents[2] / "docs" / "quickstart.md"

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("service")]


def test_the_quickstart_works_as_written(service: str, tmp_path: Path):
    commands = re.findall(r"```sh\n(.*?)```", QUICKSTART.read_text(), re.DOTALL)
    assert len(commands) >= 10
    (tmp_path / "photos.zip").write_bytes(zip_of(two_kinds(24)))
    script = "set -euo pipefail\n" + "\n".join(commands)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "KINDRED_SERVER": service},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"state":"succeeded"' in done.stdout
    rows = list(csv.DictReader((tmp_path / "labels.csv").read_text().splitlines()))
    assert len(rows) == 24
    assert list(rows[0]) == [
        "image_id", "filename", "cluster", "cluster_name", "confidence", "runner_up", "margin", "consensus",
    ]  # fmt: skip
    assert {row["filename"] for row in rows} == set(two_kinds(24))
    items = json.loads((tmp_path / "labels.json").read_text())["items"]
    assert [(item["image_id"], item["cluster"]) for item in items] == [
        (row["image_id"], int(row["cluster"])) for row in rows
    ]
    levels = list(csv.DictReader((tmp_path / "levels.csv").read_text().splitlines()))
    assert [row["groups_2"] for row in levels] == [row["cluster"] for row in rows]
    # Two kinds of pictures that nobody could confuse.
    kinds = {(Path(row["filename"]).parent.name, row["cluster"]) for row in rows}
    assert len(kinds) == 2
    assert (tmp_path / "representative.jpg").read_bytes().startswith(b"\xff\xd8\xff")
    assert len((tmp_path / "kmeans.csv").read_text().splitlines()) == 25
