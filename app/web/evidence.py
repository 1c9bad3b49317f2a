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
    """The collection read as another number of groups.

    With fewer of them, clusters merge: `merged` has those that do, and `alone` counts those that do not. With more,
    clusters split: `parts` has the sizes of the parts of those that do.
    """

    groups: int
    merged: list[list[int]]
    parts: dict[int, list[int]]
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
    """The levels of the merge tree but for the clusters themselves, the finest first.

    The tree is that of `models/hierarchy.py`: leaves are parts of clusters, and merge m makes node `leaves + m`.
    """
    tree = metrics.get("tree")
    if not tree:
        return []
    cluster_of = tree["leaf_clusters"]
    wanted = {level for level in tree["levels"] if level != tree["clusters"]}
    nodes = {leaf: {cluster} for leaf, cluster in enumerate(cluster_of)}
    found = [_split(tree)] if len(cluster_of) in wanted else []
    for number, (a, b, *_) in enumerate(tree["merges"], start=len(cluster_of)):
        nodes[number] = nodes.pop(a) | nodes.pop(b)
        if len(nodes) in wanted and len(nodes) < tree["clusters"]:
            found.append(_merged(list(nodes.values())))
    return found


def _split(tree: Mapping[str, Any]) -> Level:
    parts: dict[int, list[int]] = {}
    for cluster, size in zip(tree["leaf_clusters"], tree["leaf_sizes"], strict=True):
        parts.setdefault(cluster, []).append(size)
    several = {cluster: sizes for cluster, sizes in parts.items() if len(sizes) > 1}
    return Level(groups=len(tree["leaf_clusters"]), merged=[], parts=several, alone=len(parts) - len(several))


def _merged(groups: list[set[int]]) -> Level:
    merged = sorted(sorted(group) for group in groups if len(group) > 1)
    return Level(groups=len(groups), merged=merged, parts={}, alone=len(groups) - len(merged))
