"""Centroids: two-level FAISS k-means, then a round over all cells.

Flat k-means on n vectors costs n × K products an iteration. Clustering first into about √K cells and
then inside each cell costs a small share of that and loses a little quality; a round in which every vector
may go to another cell's centroid (:mod:`colbert_core.index.assignment`) wins it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from colbert_core.index.assignment import Assigner, cells_of, cluster_means, quantize_grid

FLAT_CENTROIDS = 256  # up to here one level is cheap enough
POINTS_PER_CENTROID = 128  # vectors that k-means looks at, for each centroid it trains
REFINED = 1 << 16  # vectors of a step of the last round

Progress = Callable[[str, float], None]


def train_centroids(
    sample: NDArray[np.float32],
    count: int,
    *,
    iterations: int,
    seed: int,
    threads: int,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Clusters vectors.

    Args:
        sample: float32 ``[n, width]``, n at least ``count``.
        count: number of centroids.
        iterations: of each k-means.
        seed: the result is a function of this and the arguments above.
        threads: bound on the threads of FAISS and torch.
        progress: called with a stage and the share of it that is done.

    Returns:
        float32 ``[count, width]``: means of their clusters, not normalised.
    """
    with bounded_threads(threads):
        if count <= FLAT_CENTROIDS:
            return _kmeans(sample, count, iterations, seed)
        cells = cells_of(count)
        coarse = _kmeans(sample, cells, iterations, seed)
        cell_of = _nearest_float(sample, coarse)
        sizes = np.bincount(cell_of, minlength=cells)
        shares = _apportion(sizes, count)
        order = np.argsort(cell_of, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        parts = []
        for cell in np.flatnonzero(shares):
            members = sample[np.sort(order[bounds[cell] : bounds[cell + 1]])]
            parts.append(_kmeans(members, int(shares[cell]), iterations, seed + 1 + int(cell)))
            if progress is not None:
                progress("clustering", float(bounds[cell + 1] / bounds[-1]))
        centroids = np.concatenate(parts)
        nearest = np.empty(len(sample), dtype=np.uint32)
        assigner = Assigner(*quantize_grid(centroids))
        for start in range(0, len(sample), REFINED):
            nearest[start : start + REFINED] = assigner.nearest(sample[start : start + REFINED])
            if progress is not None:
                progress("refining", min(1.0, (start + REFINED) / len(sample)))
        # One round: more of them fit the sample better and other vectors worse.
        return cluster_means(sample, nearest, centroids)


@contextmanager
def bounded_threads(threads: int) -> Iterator[None]:
    """Bounds the threads of FAISS and torch inside the block."""
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(threads)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before[0])
        torch.set_num_threads(before[1])


def _kmeans(vectors: NDArray[np.float32], count: int, iterations: int, seed: int) -> NDArray[np.float32]:
    """FAISS k-means; the vectors must not be fewer than ``count``."""
    if count == len(vectors):
        return vectors.copy()
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=iterations,
        seed=seed & 0x7FFFFFFF,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_PER_CENTROID,
    )
    kmeans.train(np.ascontiguousarray(vectors, dtype=np.float32))
    return np.asarray(kmeans.centroids, dtype=np.float32)


def _nearest_float(vectors: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.int64]:
    flat = faiss.IndexFlatL2(centroids.shape[1])
    flat.add(centroids)
    return flat.search(vectors, 1)[1][:, 0]


def _apportion(sizes: NDArray[np.int64], total: int) -> NDArray[np.int64]:
    """Shares of ``total`` in proportion to the sizes (largest remainder), each at most its size."""
    exact = sizes * (total / sizes.sum())
    shares = np.minimum(np.maximum(np.floor(exact).astype(np.int64), sizes > 0), sizes)
    while (missing := total - int(shares.sum())) != 0:
        wish = exact - shares
        if missing > 0:
            open_cells = np.flatnonzero(shares < sizes)
            chosen = open_cells[np.argsort(-wish[open_cells], kind="stable")[:missing]]
            shares[chosen] += 1
        else:
            open_cells = np.flatnonzero(shares > 1)
            chosen = open_cells[np.argsort(wish[open_cells], kind="stable")[:-missing]]
            shares[chosen] -= 1
    return shares
