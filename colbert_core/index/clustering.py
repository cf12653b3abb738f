"""Centroids: two-level FAISS k-means, then a flat round.

Flat k-means on n vectors costs n × K products an iteration. Clustering first into about √K cells and
then inside each cell costs a small share of that and loses a little quality; a flat round with int8
products wins it back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import faiss
import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from colbert_core.index.integer_product import MAX_MAGNITUDE, integer_product, tiles_are_faster
from colbert_core.index.integer_tiles import PANEL, interleaved
from colbert_core.index.kernels import quantize_rows
from colbert_core.index.tile_kernels import nearest_centroids

FLAT_CENTROIDS = 256  # up to here one level is cheap enough
POINTS_PER_CENTROID = 128  # vectors that k-means looks at, for each centroid it trains
REFINED = 1 << 16  # vectors of a step of the flat round
ROWS = 1024  # vectors × centroids of one integer product: its int32 result stays in the cache
COLUMNS = 512

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
        cells = 1 << math.ceil(math.log2(math.sqrt(count)))
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


class Assigner:
    """Finds the centroid nearest to each vector, by integer products.

    The distance is that of the vectors rounded to int8, so the answer for a vector does not depend on
    what it is batched with. Rounding picks another centroid only among nearly equal ones, and the
    residual is taken from the one picked.
    """

    def __init__(self, quantized: NDArray[np.int8], scale: np.float32) -> None:
        self.quantized, self.scale = quantized, scale
        lengths = np.square(quantized.astype(np.float64)).sum(axis=1) * float(scale) ** 2
        self.half_squares = (lengths / 2).astype(np.float32)
        # No dot product of a vector and a centroid exceeds this times the vector's scale.
        self._reach = np.float32(MAX_MAGNITUDE * math.sqrt(quantized.shape[1] * lengths.max()))
        missing = -len(quantized) % PANEL  # the last one again: ties go to the lowest
        again = np.pad(quantized, ((0, missing), (0, 0)), "edge")
        self._right = interleaved(again, np.int16) if tiles_are_faster(again.shape[1]) else None
        self._padded = np.pad(self.half_squares, (0, missing), "edge")

    def nearest(self, vectors: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Numbers ``[n]`` of the nearest centroids of float32 ``[n, width]``; ties to the lowest."""
        n, width = vectors.shape
        rounded = np.empty((n, width), dtype=np.int8)
        scales = np.empty(n, dtype=np.float32)
        quantize_rows(vectors, rounded, scales)
        units = np.float32(1 << 30) / np.maximum(
            scales * self._reach + self.half_squares.max(), np.float32(1e-12)
        )
        scales *= self.scale * units
        nearest = np.zeros(n, dtype=np.uint32)
        if self._right is not None:
            arguments = self._right, scales, units, self._padded, nearest

            def assign(start: int) -> None:
                nearest_centroids(rounded, start, min(start + ROWS, n), *arguments)

            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(assign, range(0, n, ROWS)))
            return nearest
        best = np.full(n, np.iinfo(np.int32).min, dtype=np.int32)
        buffer = np.empty(ROWS * COLUMNS, dtype=np.int32)
        for start in range(0, n, ROWS):
            stop = min(start + ROWS, n)
            for first in range(0, len(self.quantized), COLUMNS):
                block = self.quantized[first : first + COLUMNS]
                product = buffer[: (stop - start) * len(block)].reshape(stop - start, len(block))
                integer_product(rounded[start:stop], block, product)
                _keep_nearest(
                    product,
                    scales[start:stop],
                    units[start:stop],
                    self.half_squares[first : first + COLUMNS],
                    first,
                    best[start:stop],
                    nearest[start:stop],
                )
        return nearest


def quantize_grid(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], np.float32]:
    """Rounds a matrix to int8 on one grid; returns it and the grid's step."""
    largest = float(np.abs(values).max(initial=0.0))
    scale = np.float32(largest / MAX_MAGNITUDE) if largest > 0 else np.float32(1)
    return np.rint(values / scale).astype(np.int8), scale


def cluster_means(
    vectors: NDArray[np.float32], nearest: NDArray[np.uint32], previous: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Means of the clusters; an empty one keeps its previous centroid."""
    sums = np.zeros(previous.shape, dtype=np.float64)
    counts = np.zeros(len(previous), dtype=np.int64)
    _add_members(vectors, nearest, sums, counts)
    filled = counts > 0
    means = previous.copy()
    means[filled] = (sums[filled] / counts[filled, None]).astype(np.float32)
    return means


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


@njit(nogil=True, cache=True)
def _keep_nearest(product, scales, units, half_squares, first, best, nearest):  # type: ignore[no-untyped-def]
    """Raises ``best`` (dot product − half the centroid's squared length) by a block of products.

    Values are compared as integers, in units that keep them below 2^30: a maximum of integers
    vectorises, one of floats does not.
    """
    columns = product.shape[1]
    values = np.empty(columns, np.int32)
    for i in range(product.shape[0]):
        scale = scales[i]
        unit = units[i]
        top = np.int32(-2147483648)
        for j in range(columns):
            values[j] = np.int32(scale * np.float32(product[i, j]) - unit * half_squares[j])
            top = max(top, values[j])
        if top > best[i]:
            best[i] = top
            for j in range(columns):
                if values[j] == top:
                    nearest[i] = first + j
                    break


@njit(nogil=True, cache=True)
def _add_members(vectors, nearest, sums, counts):  # type: ignore[no-untyped-def]
    for i in range(vectors.shape[0]):
        centroid = nearest[i]
        counts[centroid] += 1
        for k in range(vectors.shape[1]):
            sums[centroid, k] += vectors[i, k]
