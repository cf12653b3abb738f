"""Which centroid a token vector belongs to.

Comparing n vectors with K centroids costs n × K products, and K grows with √n: from some million vectors on,
most of the work of building an index. Many centroids are therefore grouped into cells, and a vector is
compared with those of its nearest cells only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from colbert_core.index.integer_product import (
    MAX_MAGNITUDE,
    RightOperand,
    integer_product,
    right_operand,
    tiles_are_faster,
)
from colbert_core.index.integer_tiles import LANES, PANEL, interleaved
from colbert_core.index.kernels import quantize_rows
from colbert_core.index.tile_kernels import nearest_centroids
from colbert_core.threads import on_threads

COMPARED_WITH_ALL = 1 << 13  # more centroids than these are grouped into cells
CELL_SHARE, MOST_CELLS = 8, 32  # one in so many cells is looked into, at most so many
CELL_ROUNDS = 5  # of clustering the centroids
ROWS = 1024  # vectors × centroids of one integer product: its int32 result stays in the cache
COLUMNS = 512
SORTED = 1 << 14  # vectors that are sorted by cell together


class Assigner:
    """Finds the centroid nearest to each vector, by integer products.

    The distance is that of the vectors rounded to int8, so the answer for a vector does not depend on
    what it is batched with, nor on the processor. Rounding picks another centroid only among nearly equal
    ones, and the residual is taken from the one picked.

    With more than ``COMPARED_WITH_ALL`` centroids, those of the :func:`nearest_cells` cells whose means
    are nearest are looked at (as FAISS's IVF does with vectors); a vector near the border of its cells may
    then get the second best. Cells are a function of the centroids.
    """

    def __init__(self, quantized: NDArray[np.int8], scale: np.float32) -> None:
        self._targets = _Targets.of(quantized, scale)
        self._cells = _Cells.of(quantized, scale) if len(quantized) > COMPARED_WITH_ALL else None
        self._right: NDArray[np.int16] | None = None
        if self._cells is None and tiles_are_faster(quantized.shape[1]):
            missing = -len(quantized) % PANEL  # the last one again: ties go to the lowest
            again = np.pad(quantized, ((0, missing), (0, 0)), "edge")
            self._right = interleaved(again, np.int16)
            self._padded = np.pad(self._targets.half_squares, (0, missing), "edge")

    def nearest(self, vectors: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Numbers ``[n]`` of the nearest centroids of float32 ``[n, width]``; ties to the lowest."""
        rounded = np.empty(vectors.shape, dtype=np.int8)
        scales = np.empty(len(vectors), dtype=np.float32)
        quantize_rows(vectors, rounded, scales)
        nearest = np.zeros(len(vectors), dtype=np.uint32)
        threads = torch.get_num_threads()
        if self._right is not None:
            arguments = self._right, *self._targets.units(scales), self._padded, nearest
            starts = range(0, len(rounded), ROWS)
            calls = [(rounded, start, min(start + ROWS, len(rounded)), *arguments) for start in starts]
            on_threads(nearest_centroids, calls, threads)
        elif self._cells is None:
            for start in range(0, len(rounded), ROWS):
                part = slice(start, start + ROWS)
                self._among_all(rounded[part], scales[part], nearest[part])
        else:
            # Tiles compute on the calling thread, so parts are shared out; other products are threaded.
            outer, inner = (threads, 1) if tiles_are_faster(vectors.shape[1]) else (1, threads)
            size = max(1, min(SORTED, -(-len(rounded) // outer)))
            parts = [slice(start, start + size) for start in range(0, len(rounded), size)]
            shares = [(self._cells, rounded[p], scales[p], nearest[p], inner) for p in parts]
            on_threads(self._in_cells, shares, outer)
        return nearest

    def _among_all(
        self, rounded: NDArray[np.int8], scales: NDArray[np.float32], nearest: NDArray[np.uint32]
    ) -> None:
        targets = self._targets
        factors, units = targets.units(scales)
        best = np.full(len(rounded), np.iinfo(np.int32).min, dtype=np.int32)
        buffer = np.empty(len(rounded) * COLUMNS, dtype=np.int32)
        rows = np.arange(len(rounded))
        for first in range(0, len(targets.rows), COLUMNS):
            block = targets.rows[first : first + COLUMNS]
            numbers = np.arange(first, first + len(block))
            product = buffer[: len(rounded) * len(block)].reshape(len(rounded), len(block))
            integer_product(rounded, block, product)
            _keep_nearest(product, rows, numbers, factors, units, targets.half_squares, best, nearest)

    def _in_cells(
        self,
        cells: _Cells,
        rounded: NDArray[np.int8],
        scales: NDArray[np.float32],
        nearest: NDArray[np.uint32],
        threads: int,
    ) -> None:
        targets = self._targets
        factors, units = targets.units(scales)
        chosen = cells.nearest(rounded, scales, threads)
        order = np.argsort(chosen, axis=None, kind="stable")
        rows, bounds = order // chosen.shape[1], np.cumsum(np.bincount(chosen.ravel(), minlength=len(cells)))
        best = np.full(len(rounded), np.iinfo(np.int32).min, dtype=np.int32)
        left = np.empty((ROWS, rounded.shape[1]), dtype=np.int8)
        buffer = np.empty(ROWS * max(map(len, cells.numbers)), dtype=np.int32)
        for operand, numbers, members in zip(
            cells.operands, cells.numbers, np.split(rows, bounds[:-1]), strict=True
        ):
            for start in range(0, len(members), ROWS):
                some = members[start : start + ROWS]
                np.take(rounded, some, axis=0, out=left[: len(some)], mode="clip")
                product = buffer[: len(some) * len(numbers)].reshape(len(some), len(numbers))
                integer_product(left[: len(some)], operand, product)
                _keep_nearest(product, some, numbers, factors, units, targets.half_squares, best, nearest)


@dataclass(frozen=True)
class _Targets:
    """Vectors on one int8 grid, of which the nearest is looked for.

    Attributes:
        rows: int8 ``[n, width]``.
        scale: the grid's step.
        half_squares: float32 ``[n]``, half the squared lengths.
        reach: no dot product of a vector and one of these exceeds this times the vector's scale.
    """

    rows: NDArray[np.int8]
    scale: np.float32
    half_squares: NDArray[np.float32]
    reach: np.float32

    @classmethod
    def of(cls, rows: NDArray[np.int8], scale: np.float32) -> _Targets:
        lengths = np.square(rows.astype(np.float64)).sum(axis=1) * float(scale) ** 2
        reach = np.float32(MAX_MAGNITUDE * math.sqrt(rows.shape[1] * lengths.max()))
        return cls(rows, scale, (lengths / 2).astype(np.float32), reach)

    def units(self, scales: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What products, and half squares, of vectors with these scales are multiplied by.

        Values are compared as integers, in units that keep them below 2^30: a maximum of integers
        vectorises, one of floats does not.
        """
        largest = np.maximum(scales * self.reach + self.half_squares.max(), np.float32(1e-12))
        units = np.float32(1 << 30) / largest
        return scales * (self.scale * units), units


@dataclass(frozen=True)
class _Cells:
    """Groups of centroids.

    Attributes:
        means: of each group's centroids.
        operand: these, as a right operand.
        numbers: each group's centroids, ascending; the last again and again, to a multiple of ``LANES``.
        operands: each group's centroids, as right operands.
    """

    means: _Targets
    operand: RightOperand
    numbers: Sequence[NDArray[np.int64]]
    operands: Sequence[RightOperand]

    @classmethod
    def of(cls, quantized: NDArray[np.int8], scale: np.float32) -> _Cells:
        """By k-means from every so-many-th centroid: neighbours were trained together."""
        count = cells_of(len(quantized))
        centroids = quantized.astype(np.float32)
        means = centroids[np.linspace(0, len(centroids), count, endpoint=False).astype(np.int64)]
        for _ in range(CELL_ROUNDS):
            cell_of = Assigner(*quantize_grid(means)).nearest(centroids)
            means = cluster_means(centroids, cell_of, means)
        cell_of = Assigner(*quantize_grid(means)).nearest(centroids)
        kept = np.unique(cell_of)
        # The last one again, until tiles are full: ties go to the lowest.
        numbers = [
            np.pad(each, (0, -len(each) % LANES), "edge")
            for each in (np.flatnonzero(cell_of == cell) for cell in kept)
        ]
        operands = [right_operand(np.ascontiguousarray(quantized[each])) for each in numbers]
        rows, step = quantize_grid(means[kept])
        return cls(_Targets.of(rows, step * scale), right_operand(rows), numbers, operands)

    def __len__(self) -> int:
        return len(self.numbers)

    def nearest(
        self, rounded: NDArray[np.int8], scales: NDArray[np.float32], threads: int
    ) -> NDArray[np.uint16]:
        """Numbers ``[n, nearest_cells(cells)]`` of the cells nearest to vectors; ties to the lowest."""
        chosen = np.empty((len(rounded), nearest_cells(len(self))), dtype=np.uint16)
        factors, units = self.means.units(scales)
        product = integer_product(rounded, self.operand)
        parts = [slice(start, start + ROWS) for start in range(0, len(rounded), ROWS)]
        calls = [(product[p], factors[p], units[p], self.means.half_squares, chosen[p]) for p in parts]
        on_threads(_best_cells, calls, threads)
        return chosen


def cells_of(centroids: int) -> int:
    """How many cells so many centroids are grouped into: a power of two, about their square root."""
    return 1 << math.ceil(math.log2(math.sqrt(centroids)))


def nearest_cells(cells: int) -> int:
    """How many of so many cells a vector is compared with the centroids of."""
    return min(MOST_CELLS, -(-cells // CELL_SHARE))


def comparisons(centroids: int) -> float:
    """How many cells and centroids a vector is compared with to find the nearest of so many.

    Were all cells equally large; larger ones are chosen more often.
    """
    if centroids <= COMPARED_WITH_ALL:
        return centroids
    cells = cells_of(centroids)
    return cells + nearest_cells(cells) * centroids / cells


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


@njit(nogil=True, cache=True)
def _keep_nearest(product, rows, numbers, factors, units, half_squares, best, nearest):  # type: ignore[no-untyped-def]
    """Raises ``best`` (dot product − half the centroid's squared length) by a block of products.

    Args:
        product: int32 ``[m, c]``.
        rows: int64 ``[m]``: which vectors.
        numbers: int64 ``[c]``, ascending: which centroids.
        factors, units: float32 ``[n]``: see ``_Targets.units``.
        half_squares: float32 ``[K]``.
        best: int32 ``[n]``, raised.
        nearest: uint32 ``[n]``, written; ties to the lowest.
    """
    columns = product.shape[1]
    values = np.empty(columns, np.int32)
    halves = half_squares[numbers]
    for i in range(product.shape[0]):
        row = rows[i]
        factor = factors[row]
        unit = units[row]
        top = np.int32(-2147483648)
        for j in range(columns):
            values[j] = np.int32(factor * np.float32(product[i, j]) - unit * halves[j])
            top = max(top, values[j])
        if top >= best[row]:
            for j in range(columns):
                if values[j] == top:
                    if top > best[row] or numbers[j] < nearest[row]:
                        nearest[row] = numbers[j]
                    break
            best[row] = top


@njit(nogil=True, cache=True)
def _best_cells(product, factors, units, half_squares, chosen):  # type: ignore[no-untyped-def]
    """The best columns of each row, best first, ties to the lowest; arguments as of ``_keep_nearest``."""
    columns = product.shape[1]
    keep = chosen.shape[1]
    values = np.empty(columns, np.int32)
    tops = np.empty(keep, np.int32)
    for i in range(product.shape[0]):
        for j in range(columns):
            values[j] = np.int32(factors[i] * np.float32(product[i, j]) - units[i] * half_squares[j])
        count = 0
        for j in range(columns):
            value = values[j]
            if count < keep:
                count += 1
            elif value <= tops[keep - 1]:
                continue
            place = count - 1
            while place > 0 and tops[place - 1] < value:
                tops[place] = tops[place - 1]
                chosen[i, place] = chosen[i, place - 1]
                place -= 1
            tops[place] = value
            chosen[i, place] = j


@njit(nogil=True, cache=True)
def _add_members(vectors, nearest, sums, counts):  # type: ignore[no-untyped-def]
    for i in range(vectors.shape[0]):
        centroid = nearest[i]
        counts[centroid] += 1
        for k in range(vectors.shape[1]):
            sums[centroid, k] += vectors[i, k]
