"""Labelled archives of our own choosing, one folder a class, as sources with their true labels."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from joblib import cpu_count

from models.features import Source, extract
from models.progress import finish


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A part of an archive: `ZIP`, `ZIP:N` for N images, `ZIP:N:skewed` for class sizes that fall 10 to 1."""

    archive: Path
    images: int | None = None
    skewed: bool = False

    @classmethod
    def parse(cls, text: str) -> "Selection":
        archive, _, rest = text.partition(":")
        count, _, kind = rest.partition(":")
        if kind not in ("", "skewed") or (count and not count.isdigit()) or (kind and not count):
            raise ValueError(f"{text!r} is not ZIP, ZIP:N or ZIP:N:skewed")
        return cls(archive=Path(archive), images=int(count) if count else None, skewed=kind == "skewed")

    @property
    def name(self) -> str:
        part = "" if self.images is None else f", {self.images} of it"
        return f"{self.archive.stem}{part}{', skewed 10:1' if self.skewed else ''}"

    def rows(self, class_N: np.ndarray) -> np.ndarray:
        """Which files are taken, the same on every call: a draw that knows nothing of the seeds of the methods."""
        if self.images is None:
            return np.arange(len(class_N))
        generator = np.random.default_rng(2022)
        shuffled = generator.permutation(len(class_N))
        if not self.skewed:
            return np.sort(shuffled[: self.images])
        classes = generator.permutation(int(class_N.max()) + 1)
        share_K = np.geomspace(10, 1, len(classes))
        wanted_K = np.rint(self.images * share_K / share_K.sum()).astype(int)
        taken = [shuffled[class_N[shuffled] == k][:wanted] for k, wanted in zip(classes, wanted_K, strict=True)]
        return np.sort(np.concatenate(taken))


def spare(selection: Selection, class_N: np.ndarray, *, seed: int) -> np.ndarray:
    """The files outside of `ZIP:10000` and of all smaller draws, shuffled: settings are chosen on these alone.

    Of `cifar10-2000.zip`, a draw of its own that is reported too, 1,668 images are among them.
    """
    reported = Selection(archive=selection.archive, images=10_000).rows(class_N)
    return np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(len(class_N)), reported))


def unpack(selection: Selection, folder: Path) -> tuple[list[Source], list[str]]:
    """The files (their names are ours to trust), and the folder that each lies in."""
    sources, truth = [], []
    folder.mkdir(parents=True)
    with zipfile.ZipFile(selection.archive) as members:
        names = sorted(info.filename for info in members.infolist() if not info.is_dir())
        classes = [name.split("/", maxsplit=1)[0] for name in names]
        class_N = np.unique(classes, return_inverse=True)[1]
        for number in selection.rows(class_N):
            content = members.read(names[number])
            path = folder / f"{number}-{Path(names[number]).name}"
            path.write_bytes(content)
            sources.append(Source(key=hashlib.sha256(content).hexdigest(), path=path))
            truth.append(classes[number])
    return sources, truth


def frozen_features(sources: list[Source], *, cache: Path | None = None) -> np.ndarray:
    """What the default backbone makes of the pictures, float16 of shape (N, F)."""
    return finish(
        extract(
            sources, backbone="efficientnet_lite0", image_size=224, cache_dir=cache, threads=cpu_count(), device="cpu"
        )
    )
