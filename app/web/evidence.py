"""What a result page shows of a run's metrics: figures as shapes, ready to be drawn.

Runs are kept for good while their metrics grow with the algorithm, so every part may be missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Of a drawing, in its own units; the page scales it.
WIDTH, HEIGHT, MARGIN = 320.0, 96.0, 8.0
BAR_HEIGHT = 36.0
_MOST_BARS = 64


@dataclass(frozen=True, kw_only=True)
class Point:
    """One number of clusters that was tried."""

    clusters: int
    score: float
    x: float
    y: float
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The numbers of clusters that were tried, why one was kept and which of its neighbours were not."""

    clusters: int
    points: list[Point]
    rejected: list[dict[str, Any]]

    @property
    def line(self) -> str:
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)

    @property
    def chosen(self) -> Point | None:
        return next((point for point in self.points if point.chosen), None)


@dataclass(frozen=True, kw_only=True)
class Bar:
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the clusters are, largest first."""

    largest: int
    smallest: int
    bars: list[Bar]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The grouping beside that of the baseline, drawn to the same scale; `agreement` is an adjusted Rand index."""

    agreement: float | None
    ours: Sizes
    baseline: Sizes


@dataclass(frozen=True, kw_only=True)
class Level:
    """The clusters read as fewer groups: those that merge, and how many stay as they are."""

    groups: int
    merged: list[list[int]]
    alone: int


def sweep(metrics: Mapping[str, Any]) -> Sweep | None:
    """How `auto` came to its number of clusters; None where the number was given."""
    found = metrics.get("auto")
    if not found:
        return None
    tried = [step for step in found.get("sweep", []) if step.get("score") is not None]
    heights = _between([step["score"] for step in tried], HEIGHT - MARGIN, MARGIN)
    places = _between(list(range(len(tried))), MARGIN, WIDTH - MARGIN)
    points = [
        Point(clusters=step["clusters"], score=step["score"], x=x, y=y, chosen=step["clusters"] == found["clusters"])
        for step, x, y in zip(tried, places, heights, strict=True)
    ]
    return Sweep(clusters=found["clusters"], points=points, rejected=list(found.get("rejected", [])))


def _between(values: Sequence[float], low: float, high: float) -> list[float]:
    """The values stretched so that the least is at `low` and the greatest at `high`."""
    if not values:
        return []
    least, span = min(values), max(values) - min(values)
    return [low + (high - low) * ((value - least) / span if span else 0.5) for value in values]


def comparison(metrics: Mapping[str, Any]) -> Comparison | None:
    """The run beside plain k-means on the same features; None where it is k-means, or says no sizes."""
    baseline = metrics.get("baseline")
    if not baseline or not baseline.get("sizes") or not metrics.get("sizes"):
        return None
    ours, theirs = (sorted(found["sizes"], reverse=True) for found in (metrics, baseline))
    greatest = max(ours[0], theirs[0])
    return Comparison(
        agreement=baseline.get("agreement"),
        ours=Sizes(largest=ours[0], smallest=ours[-1], bars=_bars(ours, greatest)),
        baseline=Sizes(largest=theirs[0], smallest=theirs[-1], bars=_bars(theirs, greatest)),
    )


def _bars(sizes: Sequence[int], greatest: int) -> list[Bar]:
    step = WIDTH / min(len(sizes), _MOST_BARS)
    return [
        Bar(x=step * place, y=BAR_HEIGHT * (1 - size / greatest), width=step * 0.8, height=BAR_HEIGHT * size / greatest)
        for place, size in enumerate(sizes[:_MOST_BARS])
    ]


def levels(metrics: Mapping[str, Any]) -> list[Level]:
    """The levels of the merge tree, the finest first."""
    found = (metrics.get("tree") or {}).get("levels", [])
    read = [
        Level(
            groups=len(level["groups"]),
            merged=[sorted(group) for group in level["groups"] if len(group) > 1],
            alone=sum(len(group) == 1 for group in level["groups"]),
        )
        for level in found
    ]
    return sorted((level for level in read if level.merged), key=lambda level: -level.groups)
