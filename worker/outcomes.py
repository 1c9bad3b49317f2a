"""What a trainer leaves in its folder, as rows for the database and a file of levels.

Images are tuples of id, SHA-256 and filename, in the order in which the trainer was given them.
"""

import csv
import io
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app import storage
from app.services import tabular
from app.services.results import AssignmentRow, ClusterRow

Image = tuple[uuid.UUID, str, str]

JSON, ARRAYS = "result.json", "result.npz"
LEVEL = "groups_"  # how the names of the arrays begin that hold a level each


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a run, before it is stored."""

    metrics: dict[str, Any]
    clusters: list[ClusterRow]
    images: Sequence[Image]
    columns: dict[str, list[Any]]  # of the assignment rows, a value an image
    levels: dict[str, list[int]]  # a group an image

    def assignments(self) -> Iterator[AssignmentRow]:
        for position, (image_id, _, _) in enumerate(self.images):
            values = {name: column[position] for name, column in self.columns.items()}
            yield AssignmentRow(position=position, image_id=image_id, **values)

    def write_levels(self, path: Path) -> None:
        """Read as a whole or not at all, so a file and no table; none where there are no levels."""
        if not self.levels:
            return
        with storage.atomic_write(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(["image_id", "filename", *self.levels])
            for (image_id, _, filename), *groups in zip(self.images, *self.levels.values(), strict=True):
                writer.writerow([image_id, tabular.safe(filename), *groups])
            text.detach()


def read(folder: Path, images: Sequence[Image]) -> Outcome:
    """Read the files of a trainer that has succeeded.

    Args:
        folder: where the trainer wrote.
        images: those that it was given.

    """
    report = json.loads((folder / JSON).read_text())
    with np.load(folder / ARRAYS) as arrays:
        columns = {name: arrays[name].tolist() for name in arrays.files}
    levels = {name: columns.pop(name) for name in list(columns) if name.startswith(LEVEL)}
    clusters = [
        ClusterRow(
            cluster=number,
            name=f"Group {number + 1}",
            size=row["size"],
            confidence=row["confidence"],
            cohesion=row["cohesion"],
            representatives=[images[position][0] for position in row["representatives"]],
        )
        for number, row in enumerate(report["clusters"])
    ]
    return Outcome(metrics=report["metrics"], clusters=clusters, images=images, columns=columns, levels=levels)
