"""The steps of a search over open shards, on the CPU: compiled kernels and integer products.

An engine computes; :mod:`colbert_core.index.search` decides what is computed. The other implementation of
the same steps is :mod:`colbert_core.index.torch_engine`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from colbert_core.index.codec import Codec
from colbert_core.index.integer_product import integer_product
from colbert_core.index.integer_tiles import ROWS, steps_per_carry
from colbert_core.index.kernels import (
    best_similarities,
    decode_residuals,
    gather,
    gather_keys,
    interaction_keys,
    sum_similarities,
)
from colbert_core.index.query import Query, QueryBuffers, QueryTables, Run
from colbert_core.index.shard import Shard
from colbert_core.index.tile_kernels import score_documents

TOKENS = 2048  # tokens scored at a time: levels and products stay in the cache
_LAST_STAMP = (1 << 31) - 1


class Engine(Protocol):
    """The steps of a search; see the CPU's for what they compute."""

    def tables(self, query: Query, probes: int, run: Run) -> Any: ...

    def release(self, tables: Any) -> None: ...

    def gather(
        self, shard: int, tables: Any, eligible: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...

    def interact(self, shard: int, tables: Any, documents: NDArray[np.int32]) -> NDArray[np.int64]: ...

    def score(self, shard: int, tables: Any, documents: NDArray[np.int32]) -> NDArray[np.float32]: ...


class CpuEngine:
    """Numba kernels and int8 products; safe to call from several threads."""

    def __init__(self, codec: Codec, shards: Sequence[Shard]) -> None:
        self._codec = codec
        self._shards = list(shards)
        self._centroid_factors = codec.length_factors * codec.centroid_scale[0]
        self._lock = threading.Lock()
        self._idle_buffers: list[QueryBuffers] = []
        self._owners: dict[int, QueryBuffers] = {}
        self._idle_boards: list[list[_Board]] = [[] for _ in self._shards]
        self._local = threading.local()

    def tables(self, query: Query, probes: int, run: Run) -> QueryTables:
        """Scores the query with all centroids; the caller gives the tables back with :meth:`release`."""
        with self._lock:
            buffers = self._idle_buffers.pop() if self._idle_buffers else QueryBuffers(self._codec)
        tables = buffers.tables(query, probes, run)
        with self._lock:
            self._owners[id(tables)] = buffers
        return tables

    def release(self, tables: QueryTables) -> None:
        """Lets another query use the memory of these tables."""
        with self._lock:
            self._idle_buffers.append(self._owners.pop(id(tables)))

    def gather(
        self, shard: int, tables: QueryTables, eligible: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Eligible documents with a token in a probed centroid.

        Returns:
            int32 ``[n]`` documents and int64 ``[n]`` keys: the summed gains, then the tie-break.
        """
        opened = self._shards[shard]
        with self._lock:
            boards = self._idle_boards[shard]
            board = boards.pop() if boards else _Board(len(opened))
        length = len(tables.probes)
        if board.stamp > _LAST_STAMP - length:
            board.state[:] = 0
            board.stamp = 1
        count = gather(
            opened.posting_offsets,
            opened.postings,
            tables.probes,
            tables.gains,
            board.state,
            board.stamp,
            board.touched,
        )
        board.stamp += length
        documents = np.empty(count, dtype=np.int32)
        keys = np.empty(count, dtype=np.int64)
        kept = gather_keys(board.touched, count, board.state, eligible, opened.tie_breaks, documents, keys)
        with self._lock:
            boards.append(board)
        return documents[:kept], keys[:kept]

    def interact(self, shard: int, tables: QueryTables, documents: NDArray[np.int32]) -> NDArray[np.int64]:
        """Keys int64 ``[n]`` of documents by their centroids alone: the sum, then the tie-break."""
        opened = self._shards[shard]
        keys = np.empty(len(documents), dtype=np.int64)
        interaction_keys(documents, opened.offsets, opened.codes, tables.table, opened.tie_breaks, keys)
        return keys

    def score(self, shard: int, tables: QueryTables, documents: NDArray[np.int32]) -> NDArray[np.float32]:
        """Scores float32 ``[n]`` of documents from their residuals."""
        by = self._score_by_products if tables.right is None else self._score_by_tiles
        return by(self._shards[shard], tables, documents)

    def _score_by_tiles(
        self, opened: Shard, tables: QueryTables, documents: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Products stay in registers until the best of a document are known."""
        codec, query = self._codec, tables.query
        levels = (1 << codec.bits) - 1
        scores = np.empty(len(documents), dtype=np.float32)
        score_documents(
            documents,
            opened.offsets,
            opened.codes,
            opened.residuals,
            opened.scales,
            codec.bits,
            np.empty((ROWS, codec.width), dtype=np.int16 if codec.bits == 8 else np.uint8),
            tables.right,
            steps_per_carry(codec.bits) if codec.bits < 8 else 0,
            levels * query.quantized.sum(axis=1, dtype=np.int32),
            tables.scores,
            self._centroid_factors,
            codec.length_factors,
            codec.residual_factors,
            query.scales[: query.length],
            scores,
        )
        return scores

    def _score_by_products(
        self, opened: Shard, tables: QueryTables, documents: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Decodes and multiplies some tokens at a time."""
        codec = self._codec
        lanes = len(tables.query.quantized)
        if getattr(self._local, "lanes", 0) < lanes:
            self._local.lanes = lanes
            self._local.levels = np.empty((TOKENS, codec.width), dtype=np.int8)
            self._local.products = np.empty(TOKENS * lanes, dtype=np.int32)
        levels = self._local.levels
        products = self._local.products[: TOKENS * lanes].reshape(TOKENS, lanes)
        best = np.full((len(documents), lanes), np.finfo(np.float32).min, dtype=np.float32)
        lengths = opened.offsets[documents + 1] - opened.offsets[documents]
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        for start in range(0, total, TOKENS):
            number = int(np.searchsorted(ends, start, side="right"))
            first = (number, start - int(ends[number] - lengths[number]))
            rows = min(TOKENS, total - start)
            decode_residuals(documents, opened.offsets, opened.residuals, codec.bits, first, rows, levels)
            integer_product(levels[:rows], tables.query.quantized, products[:rows])
            best_similarities(
                documents,
                opened.offsets,
                opened.codes,
                opened.scales,
                first,
                rows,
                products,
                tables.scores,
                self._centroid_factors,
                codec.length_factors,
                codec.residual_factors,
                best,
            )
        scores = np.empty(len(documents), dtype=np.float32)
        sum_similarities(best, tables.query.scales[: tables.query.length], scores)
        return scores


class _Board:
    """Sums of one search over one shard; stamps spare clearing it between searches."""

    def __init__(self, documents: int) -> None:
        self.state = np.zeros((documents, 2), dtype=np.int32)
        self.touched = np.empty(documents, dtype=np.int32)
        self.stamp = 1


def run_here(functions: Sequence[Callable[[], None]]) -> None:
    """Calls the functions one after another."""
    for function in functions:
        function()
