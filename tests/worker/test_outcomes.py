import csv
import uuid
from pathlib import Path

from worker.outcomes import Outcome


def test_a_table_of_levels_holds_no_formula(tmp_path: Path):
    images = [(uuid.uuid4(), "a" * 64, name) for name in ("=1+1.png", "a.png")]
    outcome = Outcome(metrics={}, clusters=[], images=images, columns={}, levels={"groups_2": [0, 1]})
    outcome.write_levels(tmp_path / "levels.csv")
    with (tmp_path / "levels.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.reader(file))
    assert found == [
        ["image_id", "filename", "groups_2"],
        [str(images[0][0]), "'=1+1.png", "0"],
        [str(images[1][0]), "a.png", "1"],
    ]
