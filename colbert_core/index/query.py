"""What a search needs of a query: its integers, its scores with all centroids, and its probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from colbert_core.errors import DimensionError, NonFiniteError, SearchError
from colbert_core.index.codec import Codec
from colbert_core.index.integer_product import integer_product, right_operand, tiles_are_faster
from colbert_core.index.integer_tiles import interleaved
from colbert_core.index.kernels import (
    BLOCK,
    LANES,
    interaction_table,
    quantize_rows,
    take_scores,
    top_centroids,
)
from colbert_core.index.tile_kernels import score_centroids

ROWS = 2048  # centroids of one product: its int32 result stays in the cache
_SORTED_PROBES = 256  # from here on, sorting all centroids is cheaper than keeping the best
_GATHER_RANGE = np.float32(1 << 20)  # the largest possible sum of gains, about
Run = Callable[[Sequence[Callable[[], None]]], None]


@dataclass(frozen=True)
class Query:
    """A query in the codec's space.

    Attributes:
        quantized: int8 ``[lanes, width]``: rotated tokens, zeros below them; lanes is the length rounded
            up to a multiple of ``LANES``.
        scales: float32 ``[lanes]``: what each row is a multiple of; 0 for padding.
        length: number of tokens.
    """

    quantized: NDArray[np.int8]
    scales: NDArray[np.float32]
    length: int


def prepare_query(codec: Codec, vectors: ArrayLike, position: int = 0) -> Query:
    """Checks, rotates and rounds the token vectors ``[length, dim]`` of one query.

    Args:
        codec: the index's codec.
        vectors: floating ``[length, dim]``.
        position: the query's number in its batch, for messages.

    Raises:
        DimensionError: it is no matrix of numbers, or has another dimension than the index.
        SearchError: it has no tokens.
        NonFiniteError: it holds a NaN or an infinity.
    """
    try:
        array = np.ascontiguousarray(vectors, dtype=np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise DimensionError(f"query {position} is no matrix of numbers: {error}") from None
    if array.ndim == 2 and len(array) == 0:
        raise SearchError(f"query {position} has no token vectors")
    if array.ndim != 2 or array.shape[1] != codec.dim:
        raise DimensionError(f"query {position} is {list(array.shape)}; the index has [length, {codec.dim}]")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"query {position} holds a NaN or an infinity")
    length = len(array)
    lanes = -(-length // LANES) * LANES
    quantized = np.zeros((lanes, codec.width), dtype=np.int8)
    scales = np.zeros(lanes, dtype=np.float32)
    quantize_rows(codec.rotate(array), quantized[:length], scales[:length])
    return Query(quantized, scales, length)


@dataclass
class QueryTables:
    """A query's scores with all centroids; buffers are used again for the next query.

    Attributes:
        query: the query.
        scores: float32 ``[centroids, lanes]``: integer products of centroids and query tokens.
        table: uint8 ``[centroids, lanes]``: the same for the interaction of centroids.
        probes: int32 ``[length, P]``: best centroids of each token.
        gains: int32 ``[length, P]``: what a document gains that has a token in that centroid, over one
            that has none in any probed centroid.
        right: the query as the right operand of its products with residuals, where tiles compute them.
    """

    query: Query
    scores: NDArray[np.float32]
    table: NDArray[np.uint8]
    probes: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 0), np.int32))
    gains: NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 0), np.int32))
    right: NDArray[np.int8] | NDArray[np.int16] | None = None


class QueryBuffers:
    """Memory of :class:`QueryTables`, kept between queries; serves one query at a time."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._arrays: dict[str, NDArray[Any]] = {}

    def tables(self, query: Query, probes: int, run: Run) -> QueryTables:
        """Scores a query with all centroids.

        Args:
            query: the query.
            probes: centroids probed per token; 0 if only ``scores`` is needed.
            run: calls the given functions, possibly at once on several threads.
        """
        centroids, lanes = len(self._codec.centroids), len(query.quantized)
        scores = self._array("scores", (centroids, lanes), np.float32)
        block_max = self._array("block_max", (-(-centroids // BLOCK), lanes), np.int32)
        table = self._array("table", (centroids, lanes), np.uint8)
        starts, right = range(0, centroids, ROWS), right_operand(query.quantized)
        sums = np.zeros((len(starts), lanes), dtype=np.int64)

        def score(number: int, first: int) -> None:
            if right.words is not None:
                last = min(first + ROWS, centroids)
                score_centroids(
                    self._codec.centroids,
                    first,
                    last,
                    right.words,
                    query.length,
                    scores,
                    block_max,
                    sums[number],
                )
                return
            block = self._codec.centroids[first : first + ROWS]
            product = np.empty((len(block), lanes), dtype=np.int32)
            integer_product(block, right, product)
            take_scores(product, first, scores, block_max, sums[number])

        run([lambda n=n, f=f: score(n, f) for n, f in enumerate(starts)])  # type: ignore[misc]
        tables = QueryTables(query, scores, table, right=right.words)
        if tiles_are_faster(self._codec.width) and self._codec.bits < 8:
            tables.right = interleaved(query.quantized, np.int8)
        if probes:
            best, tables.probes = _probes(scores, block_max, query.length, min(probes, centroids))
            scales = query.scales[: query.length]
            tables.gains = gather_gains(best, scales)
            bases, factors = interaction_units(best[:, 0], sums.sum(axis=0), centroids, query)

            def fill(first: int) -> None:
                rows = slice(first, first + ROWS)
                interaction_table(scores[rows], bases, factors, table[rows])

            run([lambda f=f: fill(f) for f in starts])  # type: ignore[misc]
        return tables

    def _array(self, name: str, shape: tuple[int, int], dtype: Any) -> NDArray[Any]:
        array = self._arrays.get(name)
        if array is None or array.shape != shape:
            array = self._arrays[name] = np.empty(shape, dtype)
        return array


def gather_gains(best: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int32]:
    """Gains of the probed centroids, as integers that can be summed in any order.

    A document without a token in the probed centroids scores at most what the last of them does, so a
    gain is the difference to that one. A single probe differs from no other: its gain is its score, or 0
    where that is negative.

    Args:
        best: float32 ``[length, P]``, descending.
        scales: float32 ``[length]``.

    Returns:
        int32 ``[length, P]``, at least 0.
    """
    differences = best - best[:, -1:] if best.shape[1] > 1 else np.maximum(best, 0)
    above = differences * scales[:, None]
    largest = above.max()
    unit = _GATHER_RANGE / (np.float32(len(best)) * largest) if largest > 0 else np.float32(0)
    return np.rint(above * unit).astype(np.int32)


def interaction_units(
    best: NDArray[np.float32], sums: NDArray[np.int64], centroids: int, query: Query
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Zero point and units of the interaction bytes.

    A query token's mean score over all centroids becomes 0, since hardly any document does worse; the
    query's best score becomes 255.

    Args:
        best: float32 ``[length]``: each token's best score.
        sums: int64 ``[lanes]``: its scores, summed over the centroids.
        centroids: how many there are.
        query: the query.

    Returns:
        float32 ``[lanes]`` each: bases, factors (0 for padding).
    """
    bases = (sums // centroids).astype(np.float32)
    above = (best - bases[: query.length]) * query.scales[: query.length]
    largest = above.max()
    unit = np.float32(255) / largest if largest > 0 else np.float32(0)
    return bases, query.scales * unit


def _probes(
    scores: NDArray[np.float32], block_max: NDArray[np.int32], length: int, probes: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Scores and numbers ``[length, probes]`` of each token's best centroids, ties by number."""
    if probes >= _SORTED_PROBES:
        columns = np.ascontiguousarray(scores[:, :length].T)
        found = np.argsort(-columns, axis=1, kind="stable")[:, :probes].astype(np.int32)
        return np.take_along_axis(columns, found, axis=1), found
    best = np.empty((length, probes), dtype=np.float32)
    found = np.empty((length, probes), dtype=np.int32)
    top_centroids(scores, block_max, probes, best, found)
    return best, found
