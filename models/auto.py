"""How many clusters a collection has: an estimate with its evidence, for `clusters = auto`.

Three witnesses look at samples of the pictures, each by a criterion of its own:

- `eigengap`: the widest gap in the spectrum of the graph of nearest neighbours; beyond it the parts of the graph are no
  longer set apart (von Luxburg, "A tutorial on spectral clustering", 2007);
- `height`: how many merges of Ward's tree are high beside those of structureless data with the same covariance, in
  the manner of parallel analysis (Horn 1965) and of the gap statistic (Tibshirani, Walther and Hastie 2001);
- `reproduced`: the most groups that two halves of the sample, grouped apart, have in common, in the manner of
  prediction strength (Tibshirani and Walther 2005) with the Jaccard coefficient (Hennig 2007).

Where the eigengap stands out among those after it, the groups lie apart and it decides alone; else the answer is the
geometric mean of the three. `docs/auto.md` has the figures, and what was tried besides.

Letters in shapes: N images, S of them in a sample, F features, D dimensions, M neighbours, G numbers of clusters,
from 2 upwards.
"""

from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.linalg import eigvalsh
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import eigsh
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from models import space
from models.config import InputError
from models.fit import seed_of
from models.progress import Step

SAMPLE = 2000  # images in a sample at most: Ward's tree is quadratic in them
SAMPLES = 5
SHARE = 0.8  # of a small collection that is in each sample, so that the samples differ
FEWEST = 16  # images; fewer say nothing about their number of groups
MOST_CLUSTERS = 100
IMAGES_PER_CLUSTER = 4  # at least, on average

# Chosen on subsets of CIFAR-10: see docs/auto.md.
DIMENSIONS = 48
NEIGHBOURS = 20  # in the graph of the spectrum
GAP_POWER = 0.35  # gaps narrow as the number of clusters grows: this power of it evens them out
GAPS_AFTER = 8
WEAK_GAP, CLEAR_GAP = 5.0, 7.0  # times the mean of the gaps after it
HEIGHT = 0.45  # of the highest merge without structure
REPRODUCED = 0.75  # Jaccard coefficient from which groups count as the same
STEADY = 0.9  # and as nearly the same
STEADY_LEAST = 3  # groups; two come out alike of nearly everything
MAIN_DIMENSIONS = 16  # in which the halves are grouped
CLOSE_NEIGHBOURS = 10  # and smoothed
SMOOTHINGS = 4
VOTERS = 5


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was measured with one number of clusters; means over the samples."""

    clusters: int
    eigengap: float
    height: float  # of the merge that ends this number of clusters, over the highest without structure
    reproduced: float  # mean Jaccard coefficient of the groups of one half and their best match in the other


@dataclass(frozen=True, kw_only=True)
class Rejected:
    clusters: int
    why: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The number of clusters and what speaks for it."""

    clusters: int
    interval: tuple[int, int]  # numbers nearly as good: as far as the witnesses differ, less the clearer the eigengap
    votes: dict[str, float]  # of every witness, geometric mean over the samples
    ballots: dict[str, list[int]]  # of every witness, what it named in each sample
    clarity: float  # 0: all witnesses count alike; 1: the eigengap decides alone
    steady: int | None  # most groups that come out nearly alike of two halves: often the coarser reading; None: none do
    rejected: list[Rejected]
    sweep: list[Trial]
    sample_images: int  # in each sample
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON; figures to four places."""
        rows = [{name: rounded(value) for name, value in asdict(trial).items()} for trial in self.sweep]
        votes = {name: rounded(value) for name, value in self.votes.items()}
        clarity = rounded(self.clarity)
        return {**asdict(self), "interval": list(self.interval), "votes": votes, "clarity": clarity, "sweep": rows}


def estimate(features_NF: np.ndarray, *, seed: int) -> Generator[Step, None, Estimate]:
    """Ask the witnesses about several samples; the same seed gives the same answer.

    Costs what a few thousand images cost, however many there are.

    Raises:
        InputError: no two images differ.

    """
    distinct = count_distinct(features_NF, limit=MOST_CLUSTERS)
    images = len(features_NF)
    if images < FEWEST:
        yield Step(done=1, total=1)
        return too_few(images)
    size = min(SAMPLE, max(round(SHARE * images), min(images, 50)))
    draw = np.random.default_rng(seed)
    rows = [np.sort(draw.permutation(images)[:size]) for _ in range(SAMPLES)]
    with threadpool_limits(1):  # sums in one order: the same bits each time
        axes = space.fit(features_NF[np.unique(np.concatenate(rows))], dimensions=DIMENSIONS)
        heard = []
        for sample, rows_S in enumerate(rows):
            x_SD = axes.project(features_NF[rows_S]).numpy()
            heard.append(hear(x_SD, seed=seed_of(seed, sample)))
            yield Step(done=sample + 1, total=SAMPLES, details=dict(heard[-1].votes))
    return judge(heard, most=distinct, sample_images=size)


def count_distinct(features_NF: np.ndarray, *, limit: int) -> int:
    """How many different rows there are; stops counting at the limit."""
    seen: set[bytes] = set()
    for row in features_NF:
        seen.add(row.tobytes())
        if len(seen) == limit:
            break
    if len(seen) < 2:
        raise InputError(f"clusters is 'auto', but of {len(features_NF)} images no two differ for the backbone")
    return len(seen)


def too_few(images: int) -> Estimate:
    return Estimate(
        clusters=2,
        interval=(2, max(2, images // 2)),
        votes={},
        ballots={},
        clarity=0.0,
        steady=None,
        rejected=[Rejected(clusters=3, why=f"{images} images are too few to tell; below {FEWEST} the answer is 2")],
        sweep=[],
        sample_images=images,
        samples=0,
    )


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one sample says about every number of clusters."""

    gap_G: np.ndarray
    height_G: np.ndarray
    reproduced_G: np.ndarray

    @property
    def votes(self) -> dict[str, int]:
        number_G = np.arange(2, 2 + len(self.gap_G))
        reproduced = np.flatnonzero(self.reproduced_G > REPRODUCED)
        return {
            "eigengap": 2 + int(np.argmax(self.gap_G * number_G**GAP_POWER)),
            "height": 2 + int((self.height_G > HEIGHT).sum()),
            "reproduced": 2 + int(reproduced[-1]) if len(reproduced) else 2,
        }

    @property
    def clarity(self) -> float:
        at = self.votes["eigengap"] - 2
        after_G = self.gap_G[at + 1 : at + 1 + GAPS_AFTER]
        ratio = self.gap_G[at] / (after_G.mean() + 0.002) if len(after_G) else 0.0
        return float(np.clip((ratio - WEAK_GAP) / (CLEAR_GAP - WEAK_GAP), 0, 1))


def hear(x_SD: np.ndarray, *, seed: int) -> Evidence:
    """Hear all witnesses about one sample of unit vectors."""
    most = max(2, min(MOST_CLUSTERS, len(x_SD) // IMAGES_PER_CLUSTER))
    return Evidence(
        gap_G=eigengaps(x_SD, most),
        height_G=heights(x_SD, most, seed=seed),
        reproduced_G=reproduced(unit(x_SD[:, :MAIN_DIMENSIONS]), most, seed=seed),
    )


def judge(heard: list[Evidence], *, most: int, sample_images: int) -> Estimate:
    """Weigh the votes: from all alike to the eigengap's alone, by how clear it is."""
    ballots = {name: [one.votes[name] for one in heard] for name in heard[0].votes}
    votes = {name: float(np.exp(np.log(ballot).mean())) for name, ballot in ballots.items()}
    clarity = float(np.mean([one.clarity for one in heard]))
    lead, log_votes = np.log(votes["eigengap"]), np.log(list(votes.values()))

    def weigh(rest: float) -> int:
        return max(2, min(most, round(float(np.exp(clarity * lead + (1 - clarity) * rest)))))

    chosen = weigh(log_votes.mean())
    columns = [np.mean([getattr(one, name) for one in heard], axis=0) for name in ("gap_G", "height_G", "reproduced_G")]
    sweep = [
        Trial(clusters=2 + g, eigengap=float(a), height=float(b), reproduced=float(c))
        for g, (a, b, c) in enumerate(zip(*columns, strict=True))
    ]
    return Estimate(
        clusters=chosen,
        interval=(weigh(log_votes.min()), weigh(log_votes.max())),
        votes=votes,
        ballots=ballots,
        clarity=clarity,
        steady=max((t.clusters for t in sweep if t.reproduced > STEADY and t.clusters >= STEADY_LEAST), default=None),
        rejected=reject(chosen, ballots, clarity, most=len(sweep) + 1),
        sweep=sweep,
        sample_images=sample_images,
        samples=len(heard),
    )


def reject(chosen: int, ballots: dict[str, list[int]], clarity: float, *, most: int) -> list[Rejected]:
    """The numbers beside the chosen one, those named most often, and why they were not taken."""
    samples = len(ballots["eigengap"])
    favourites = {max(set(ballot), key=lambda number: (ballot.count(number), -number)) for ballot in ballots.values()}
    rejected = []
    for clusters in sorted(({chosen - 1, chosen + 1} | favourites) - {chosen}):
        if not 2 <= clusters <= most:
            continue
        named = [f"{name} in {ballot.count(clusters)}" for name, ballot in ballots.items() if clusters in ballot]
        why = f"named by {' and '.join(named)} of {samples} samples" if named else "named by no witness"
        if named:
            why += f"; the eigengap after {chosen} stands out" if clarity == 1 else f"; the mean of all is {chosen}"
        rejected.append(Rejected(clusters=clusters, why=why))
    return rejected


def eigengaps(x_SD: np.ndarray, most: int) -> np.ndarray:
    """Gaps in the spectrum of the symmetrically normalised graph of neighbours, after 2, 3 ... `most` eigenvalues."""
    nearest_SM = space.nearest(x_SD, within(NEIGHBOURS, len(x_SD)))
    images, count = nearest_SM.shape
    ends = (np.repeat(np.arange(images), count), nearest_SM.ravel())
    one_way = csr_array((np.ones(nearest_SM.size), ends), shape=(images, images))
    graph = one_way + one_way.T
    scale = diags_array(graph.sum(axis=1) ** -0.5)
    matrix = scale @ graph @ scale
    wanted = min(most + 1, images)
    if images < 5 * wanted:
        value = eigvalsh(matrix.toarray())[-wanted:]
    else:
        start = np.random.default_rng(0).normal(size=images)
        value = np.sort(eigsh(matrix, k=wanted, which="LA", v0=start, return_eigenvectors=False))
    gap_G: np.ndarray = np.diff(value.clip(0, 1))[::-1][1:]
    return gap_G


def within(wanted: int, images: int) -> int:
    """As many neighbours as wanted, fewer in a small sample."""
    return max(1, min(wanted, images // 8))


def smooth(x_SD: np.ndarray) -> np.ndarray:
    """Every image moved towards its nearest neighbours, some rounds: groups draw together."""
    for _ in range(SMOOTHINGS):
        nearest_SM = space.nearest(x_SD, within(CLOSE_NEIGHBOURS, len(x_SD)))
        x_SD = unit(x_SD + x_SD[nearest_SM].sum(axis=1))
    return x_SD


def unit(x_SD: np.ndarray) -> np.ndarray:
    x_SD = x_SD / np.linalg.norm(x_SD, axis=1, keepdims=True).clip(min=1e-12)
    return x_SD.astype(np.float32)


def cut(merges: np.ndarray, clusters: int) -> np.ndarray:
    """The group of every image; fewer groups where merges are equally high."""
    groups_S: np.ndarray = fcluster(merges, clusters, "maxclust") - 1
    return groups_S


def heights(x_SD: np.ndarray, most: int, *, seed: int) -> np.ndarray:
    """Heights of the merges that end 2, 3 ... `most` groups, over the highest one of structureless data."""
    noise_SD = np.random.default_rng(seed).normal(size=x_SD.shape) * x_SD.std(axis=0)
    highest = linkage(unit(noise_SD), "ward")[-1, 2]
    merged: np.ndarray = linkage(x_SD, "ward")[::-1, 2][1:most]
    height_G: np.ndarray = merged / max(highest, 1e-12)
    return height_G


def reproduced(x_SD: np.ndarray, most: int, *, seed: int) -> np.ndarray:
    """How well 2, 3 ... `most` groups of one half of the sample are found again in the other half's."""
    order = np.random.default_rng(seed).permutation(len(x_SD))
    halves = [smooth(x_SD[order[part::2]]) for part in (0, 1)]
    trees = [linkage(half, "ward") for half in halves]
    found = np.zeros((2, most - 1))
    for own, other in ((0, 1), (1, 0)):
        near = NearestNeighbors(n_neighbors=min(VOTERS, len(halves[other]))).fit(halves[other])
        near_SM = near.kneighbors(halves[own], return_distance=False)
        for clusters in range(2, most + 1):
            own_S, other_S = cut(trees[own], clusters), cut(trees[other], clusters)
            if min(own_S.max(), other_S.max()) < clusters - 1:
                break  # copies: there are no more groups than these
            voted_S = one_hot(other_S, clusters).toarray()[near_SM].sum(axis=1).argmax(axis=1)
            found[own, clusters - 2] = matched(own_S, voted_S, clusters)
    mean_G: np.ndarray = found.mean(axis=0)
    return mean_G


def matched(own_S: np.ndarray, theirs_S: np.ndarray, clusters: int) -> float:
    """Jaccard coefficient of every group with its best match in the other grouping; mean over the images."""
    both = (one_hot(own_S, clusters).T @ one_hot(theirs_S, clusters)).toarray()
    own_size, their_size = both.sum(axis=1), both.sum(axis=0)
    jaccard = both / (own_size[:, None] + their_size[None, :] - both).clip(min=1)
    return float(np.average(jaccard.max(axis=1), weights=own_size))


def one_hot(group_S: np.ndarray, groups: int) -> csr_array:
    """(S, groups), 1 where the image is in the group."""
    return csr_array((np.ones(len(group_S)), (np.arange(len(group_S)), group_S)), shape=(len(group_S), groups))


def rounded(value: float) -> float:
    return value if isinstance(value, int) else round(value, 4)
