"""The space in which pictures are compared: features centred, reduced and put on the unit sphere.

Letters in shapes: N images, F features of the backbone, D dimensions kept, M neighbours.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from joblib import cpu_count
from scipy.linalg import eigh
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

BLOCK = 8192
# Images whose neighbours' vectors are gathered at a time: more of them leave the caches of a core.
GATHERED = 1024
# So many images, up to twice as many, are looked up by a thread at a time; with fewer BLAS takes another, slower way.
ASKED = 2048
# Up to here every pair is compared (50,000 images: some seconds); above, an inverted file answers.
EXACT_LIMIT = 50_000
# The same on a GPU, which then multiplies a block of images with all of them at a time.
EXACT_LIMIT_CUDA = 250_000
# About so many images tell a scatter, up to twice as many: enough for some hundred axes.
SCATTERED = 4096
# Up to here k-means looks at every image in every round; above, at batches.
LLOYD_LIMIT = 20_000


@dataclass(frozen=True, kw_only=True)
class Space:
    """Principal axes of a collection's unit features."""

    mean_F: Tensor
    axes_FD: Tensor

    def project(self, features_NF: np.ndarray) -> Tensor:
        """Unit vectors of shape (N, D)."""
        blocks = [(x_BF - self.mean_F) @ self.axes_FD for x_BF in unit_blocks(features_NF)]
        return normalize(torch.cat(blocks), dim=1)


def fit(features_NF: np.ndarray, *, dimensions: int) -> Space:
    """The mean and the `dimensions` main directions of the unit features, fewer where the collection has fewer."""
    n, size = features_NF.shape
    total_F = torch.zeros(size, dtype=torch.float64)
    for x_BF in unit_blocks(features_NF):
        total_F += x_BF.double().sum(dim=0)
    mean_F = (total_F / n).float()
    most = max(1, min(dimensions, n - 1, size))
    variance_D, axes_FD = (axes_of_few if n < size else axes_of_many)(features_NF, mean_F, most)
    kept = max(1, int((variance_D > variance_D[-1] * 1e-6).sum()))
    main_FD = torch.from_numpy(axes_FD[:, most - kept :].copy()).float().flip(1)  # largest variance first
    return Space(mean_F=mean_F, axes_FD=main_FD.contiguous())


def discriminant(
    main: Space, features_NF: np.ndarray, *, dimensions: int, neighbours: int, shrinkage: float, device: str = "cpu"
) -> Space:
    """The directions along which images differ most for how little neighbours do.

    Unsupervised discriminant projection (Yang, Zhang, Yang and Niu, PAMI 2007): neighbours stand in for images of one
    class, so that no label is needed. Scatter is that of unit vectors along the main directions, and every direction is
    as long as makes its scatter between neighbours one.

    Args:
        main: the main directions, which the others are combinations of.
        features_NF: the images; neighbours of some thousand of them are looked up.
        dimensions: that are kept, fewer where there are fewer.
        neighbours: of each image; with none the main directions are returned.
        shrinkage: of the local scatter towards a multiple of the identity (Friedman, JASA 1989); 1 gives the main
            directions.
        device: where neighbours are looked up.

    """
    x_ND = main.project(features_NF).numpy()
    asked_Q = np.arange(0, len(x_ND), max(1, len(x_ND) // SCATTERED))
    near_QM = nearest(x_ND, neighbours, rows=asked_Q, device=device)
    size = x_ND.shape[1]
    kept = min(dimensions, size)
    with threadpool_limits(1, user_api="blas"):  # sums in one order
        local_DD = np.zeros((size, size))
        for near_Q in near_QM.T:
            apart_QD = x_ND[asked_Q] - x_ND[near_Q]
            local_DD += apart_QD.T @ apart_QD / (2 * near_QM.size)
        total_DD = np.cov(x_ND, rowvar=False, dtype=np.float64).reshape(size, size)
        if np.trace(local_DD) <= 1e-9 * np.trace(total_DD):  # copies, or no neighbours
            return Space(mean_F=main.mean_F, axes_FD=main.axes_FD[:, :kept].contiguous())
        towards = max(shrinkage, 1e-6)  # keeps it invertible
        shrunk_DD = (1 - towards) * local_DD + towards * np.trace(local_DD) / size * np.eye(size)
        _, vectors_DK = eigh(total_DD, shrunk_DD, subset_by_index=[size - kept, size - 1])
    axes_FK = main.axes_FD @ torch.from_numpy(vectors_DK[:, ::-1].astype(np.float32))
    return Space(mean_F=main.mean_F, axes_FD=axes_FK.contiguous())


def axes_of_many(features_NF: np.ndarray, mean_F: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Variances (D,), the smallest first, and main directions (F, D) from the products of features."""
    n, size = features_NF.shape
    moment_FF = torch.zeros(size, size)
    for x_BF in unit_blocks(features_NF):
        moment_FF += (x_BF - mean_F).T @ (x_BF - mean_F)
    return largest(moment_FF.double().numpy() / n, count)


def axes_of_few(features_NF: np.ndarray, mean_F: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The same from the products of images, where those are fewer."""
    n = len(features_NF)
    x_NF = torch.cat([x_BF - mean_F for x_BF in unit_blocks(features_NF)]).double().numpy()
    variance_D, image_ND = largest(x_NF @ x_NF.T / n, count)
    return variance_D, x_NF.T @ image_ND / np.sqrt(n * variance_D.clip(min=1e-12))


def largest(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """So many of the largest eigenvalues, the smallest first, and their vectors as columns.

    In double precision, and only those that are kept: torch's eigh gives up on few or equal images. Threads of BLAS
    wait for each other by spinning: on two busy cores two of them took 12 s, one takes 0.2 s.
    """
    size = len(matrix)
    with threadpool_limits(1, user_api="blas"):
        values, vectors = eigh(matrix, subset_by_index=[size - count, size - 1])
    return values, vectors


def blocks(images: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, images, size)]


def unit_blocks(features_NF: np.ndarray) -> Iterator[Tensor]:
    """The features as float32 on the unit sphere, some thousand rows at a time."""
    for start in range(0, len(features_NF), BLOCK):
        yield normalize(torch.from_numpy(features_NF[start : start + BLOCK].astype(np.float32)), dim=1)


def unit(features_NF: np.ndarray) -> np.ndarray:
    """The features as float32 on the unit sphere."""
    return np.concatenate([block.numpy() for block in unit_blocks(features_NF)])


def take(values_S: Tensor, rows_B: Tensor) -> Tensor:
    """`values_S[rows_B]` for rows of any shape; on a CPU in a quarter of the time."""
    return values_S.index_select(0, rows_B.reshape(-1)).view(*rows_B.shape, *values_S.shape[1:])


def neighbour_count(images: int, clusters: int, *, wanted: int) -> int:
    """How many neighbours vote: no more than a cluster of average size has besides the image itself."""
    return max(0, min(wanted, images // clusters - 1))


def nearest(x_ND: np.ndarray, count: int, *, rows: np.ndarray | None = None, device: str = "cpu") -> np.ndarray:
    """The `count` most similar other images of each image, as indices of shape (N, M), most similar first.

    With a count of 0 every image is its own and only neighbour. Exact for up to `EXACT_LIMIT` images, on a GPU
    `EXACT_LIMIT_CUDA`, by an inverted file above; never quadratic in memory. `rows` are the images that are asked
    about, all by default.
    """
    own_N = np.arange(len(x_ND)) if rows is None else rows
    if count == 0:
        return own_N[:, None]
    found_NM = search(x_ND, x_ND[own_N], count + 1, device=device)
    # Copies of an image may come before it: drop the image itself wherever it stands, else the last.
    found_NM = np.where(found_NM < 0, own_N[:, None], found_NM)
    itself_NM = found_NM == own_N[:, None]
    itself_NM[~itself_NM.any(axis=1), -1] = True
    drop_N = itself_NM.argmax(axis=1)
    keep_NM = np.arange(count + 1)[None, :] != drop_N[:, None]
    neighbours_NM: np.ndarray = found_NM[keep_NM].reshape(-1, count)
    return neighbours_NM


def search(among_SD: np.ndarray, x_ND: np.ndarray, count: int, *, device: str = "cpu") -> np.ndarray:
    """For each row of `x_ND` the `count` most similar rows of `among_SD`, int64 (N, count), -1 where none was found."""
    n, dimensions = among_SD.shape
    if device != "cpu" and count <= n <= EXACT_LIMIT_CUDA:
        among_DS, asked_ND = torch.from_numpy(among_SD).to(device).T, torch.from_numpy(x_ND).to(device)
        found = [(asked_ND[some] @ among_DS).topk(count, dim=1).indices for some in blocks(len(x_ND), GATHERED)]
        nearest_NM: np.ndarray = torch.cat(found).cpu().numpy()
        return nearest_NM
    index: Any = faiss.IndexFlatIP(dimensions)
    if n > EXACT_LIMIT:
        cells = int(4 * n**0.5)
        index = faiss.IndexIVFFlat(index, dimensions, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = 1
        index.train(among_SD[:: max(1, n // (64 * cells))])
        index.nprobe = max(8, cells // 64)
    index.add(among_SD)
    # Parts are the same on every machine, whose threads take one after the other, each by itself.
    parts = np.array_split(x_ND, max(1, len(x_ND) // ASKED))
    threads = min(len(parts), cpu_count())
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        found_NM: np.ndarray = np.concatenate(list(pool.map(lambda part_BD: index.search(part_BD, count)[1], parts)))
    return found_NM


def k_means(x_ND: np.ndarray, clusters: int, *, rounds: int, seed: int) -> KMeans | MiniBatchKMeans:
    """k-means from one k-means++ start, the same on every call."""
    if len(x_ND) <= LLOYD_LIMIT:
        method = KMeans(clusters, n_init=1, max_iter=rounds, random_state=seed)
    else:
        batch = max(4096, 4 * clusters)
        method = MiniBatchKMeans(clusters, n_init=1, max_iter=rounds, batch_size=batch, random_state=seed)
    with one_core():
        return method.fit(x_ND)


@contextmanager
def one_core() -> Iterator[None]:
    """Inside, k-means uses one core and warns of nothing; in threads of its own only within another of these.

    The threads of scikit-learn add up in the order they finish: a single one gives the same sums each time. Those of
    BLAS spin while they wait. Limits and warnings are the whole process's: without one around them, a thread that
    leaves would end them for the others.
    """
    with threadpool_limits(1), warnings.catch_warnings():
        # Fewer different points than clusters leave clusters empty: the report says so to the user.
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield
