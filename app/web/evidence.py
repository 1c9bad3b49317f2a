"""What a result page shows of a run's metrics: figures as shapes, ready to be drawn.

Runs are kept for good while their metrics grow with the algorithm, so every part may be missing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Of a drawing, in its own units; the page scales it.
WIDTH, HEIGHT, MARGIN = 320.0, 96.0, 8.0
BAR_HEIGHT = 36.0
_TICKS = (2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)
_MOST_BARS = 64
_LEADS = "eigengap"  # the criterion that counts for more the clearer it is


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What one criterion says of every number of clusters, stretched to the height of the drawing."""

    criterion: str
    line: str
    vote: float | None  # the number that it speaks for


@dataclass(frozen=True, kw_only=True)
class Tick:
    clusters: int
    x: float


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The numbers of clusters that were tried, which one was kept and why others were not."""

    clusters: int
    least: int
    most: int
    x: float  # of the number that was kept
    interval: tuple[int, int] | None  # of numbers that are nearly as good
    band: tuple[float, float] | None  # where the interval begins, and its width
    clarity: float | None  # 1: the groups lie apart; 0: no number stands out
    steady: int | None  # most clusters that come out nearly alike of two halves, where that is another number
    curves: list[Curve]  # of the one that leads first
    ticks: list[Tick]
    rejected: list[dict[str, Any]]  # the nearest first


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
    left_out: int  # that are not drawn

    @classmethod
    def of(cls, sizes: Sequence[int], greatest: int) -> "Sizes":
        """Those of clusters, largest first, drawn so that `greatest` fills the height."""
        shown = sizes[:_MOST_BARS]
        step = WIDTH / len(shown)
        bars = [
            Bar(
                x=step * place,
                y=BAR_HEIGHT * (1 - size / greatest),
                width=step * 0.8,
                height=BAR_HEIGHT * size / greatest,
            )
            for place, size in enumerate(shown)
        ]
        return cls(largest=sizes[0], smallest=sizes[-1], bars=bars, left_out=len(sizes) - len(shown))


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
    """How `auto` came to its number of clusters; None where the number was given.

    The evidence is that of `models/auto.py`: of every number tried, what each criterion gives it.
    """
    found = metrics.get("auto")
    if not found:
        return None
    chosen, tried = found["clusters"], found.get("sweep") or []
    least, most = min([chosen, *(t["clusters"] for t in tried)]), max([chosen, *(t["clusters"] for t in tried)])

    def x(clusters: float) -> float:
        """Logarithmic: two or three clusters differ as twenty and thirty do."""
        share = math.log(clusters / least) / math.log(most / least) if most > least else 0.5
        return MARGIN + (WIDTH - 2 * MARGIN) * share

    interval = found.get("interval")
    low, high = (x(min(max(end, least), most)) for end in interval or (chosen, chosen))
    return Sweep(
        clusters=chosen,
        least=least,
        most=most,
        x=x(chosen),
        interval=tuple(interval) if interval and interval[0] < interval[1] else None,
        band=(low, high - low) if interval and high > low else None,
        clarity=found.get("clarity"),
        steady=found.get("steady") if found.get("steady") != chosen else None,
        curves=_curves(tried, found.get("votes") or {}, x),
        ticks=[Tick(clusters=k, x=x(k)) for k in _TICKS if least <= k <= most],
        rejected=sorted(found.get("rejected") or [], key=lambda other: abs(math.log(other["clusters"] / chosen))),
    )


def _curves(tried: Sequence[Mapping[str, Any]], votes: Mapping[str, float], x: Callable[[float], float]) -> list[Curve]:
    names = tried[0].keys() - {"clusters"} if len(tried) > 1 else ()
    criteria = sorted(names, key=lambda name: (name != _LEADS, name))  # the database keeps no order
    curves = []
    for name in criteria:
        values = [step[name] for step in tried]
        least, span = min(values), max(values) - min(values) or 1
        heights = [HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - least) / span for value in values]
        line = " ".join(f"{x(step['clusters']):.1f},{y:.1f}" for step, y in zip(tried, heights, strict=True))
        curves.append(Curve(criterion=name, line=line, vote=votes.get(name)))
    return curves


def comparison(metrics: Mapping[str, Any]) -> Comparison | None:
    """The run beside plain k-means on the same features; None where it is k-means, or says no sizes."""
    baseline = metrics.get("baseline")
    if not baseline or not baseline.get("sizes") or not metrics.get("sizes"):
        return None
    ours, theirs = (sorted(found["sizes"], reverse=True) for found in (metrics, baseline))
    greatest = max(ours[0], theirs[0])
    return Comparison(
        agreement=baseline.get("agreement"),
        ours=Sizes.of(ours, greatest),
        baseline=Sizes.of(theirs, greatest),
    )


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
