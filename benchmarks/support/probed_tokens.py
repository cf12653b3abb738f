"""WARP's scoring over our shards: the tokens of the probed centroids alone, without decoding them.

A document's similarity to a query token is the best of its tokens in that token's probed centroids; where it
has none there, an estimate takes its place: the score of the centroid at which the best ones, by descending
score, hold ``t`` tokens. The similarity of a compressed token is its centroid's score plus, for each byte of
its residual, a value looked up in the query token's table (Scheerer et al. 2025, arXiv 2501.17788, sections
4.2 to 4.4; ``t`` and its bounds as in xtr-warp-rs). Here for comparison with the stages of a search.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

from colbert_core.index.codec import Codec
from colbert_core.index.query import QueryTables
from colbert_core.index.shard import Shard

BOUND = 128  # best centroids of a query token among which the estimate is looked for
LEAST_TOKENS, MOST_TOKENS = 5_000, 200_000

_jit = numba.njit(nogil=True, cache=True)


class ProbedTokens:
    """A shard's tokens by centroid, and the sums of one search at a time."""

    def __init__(self, codec: Codec, shard: Shard) -> None:
        self._codec = codec
        order = np.argsort(shard.codes, kind="stable")
        documents = np.repeat(np.arange(len(shard.offsets) - 1, dtype=np.int32), np.diff(shard.offsets))
        self.offsets = np.searchsorted(shard.codes[order], np.arange(len(codec.centroids) + 1))
        self.documents = documents[order]
        self.residuals = shard.residuals[order]
        self.scales = shard.scales[order]
        self._length = float(codec.length_factors[shard.scales[:, 0]].mean())
        self._tokens = min(
            max(math.floor(math.sqrt(8 * len(order)) / 1000) * 1000, LEAST_TOKENS), MOST_TOKENS
        )
        self._stamps = np.zeros(len(shard.offsets) - 1, dtype=np.int64)
        self._best = np.empty(len(self._stamps), dtype=np.float32)
        self._sums = np.empty(len(self._stamps), dtype=np.float32)
        self._met = np.empty(len(self._stamps), dtype=np.int32)
        self._met_by_token = np.empty(len(self._stamps), dtype=np.int32)
        self._stamp = 1

    def search(self, tables: QueryTables, probes: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Documents with a token in a probed centroid, and their scores.

        Args:
            tables: of the query, with at least ``probes`` probes; the estimate takes all of them.
            probes: centroids of each query token whose tokens are scored.
        """
        codec, query = self._codec, tables.query
        factors = codec.length_factors * codec.centroid_scale[0]
        missing = self.missing(tables)
        count = _score(
            self.offsets,
            self.documents,
            self.residuals,
            self.scales,
            codec.bits,
            query.quantized[: query.length],
            query.scales[: query.length],
            tables.scores,
            tables.probes[:, :probes],
            factors,
            codec.length_factors,
            codec.residual_factors,
            missing,
            self._stamps,
            self._stamp,
            self._best,
            self._sums,
            self._met,
            self._met_by_token,
        )
        self._stamp += query.length
        documents = self._met[:count].copy()
        return documents, self._sums[documents] + np.float32((missing * query.scales[: query.length]).sum())

    def missing(self, tables: QueryTables) -> NDArray[np.float32]:
        """The estimate for each query token, float32 ``[length]``, without the token's own scale."""
        held = np.cumsum(np.diff(self.offsets)[tables.probes], axis=1)
        last = np.minimum((held < self._tokens).sum(axis=1), tables.probes.shape[1] - 1)
        rows = np.arange(len(last))
        scores = tables.scores[tables.probes[rows, last], rows]
        return (scores * np.float32(self._length * self._codec.centroid_scale[0])).astype(np.float32)


@_jit
def _score(  # type: ignore[no-untyped-def]
    offsets,
    documents,
    residuals,
    scales,
    bits,
    query,
    query_scales,
    scores,
    probes,
    centroid_factors,
    length_factors,
    residual_factors,
    missing,
    stamps,
    stamp,
    best,
    sums,
    met,
    met_by_token,
):
    """Sums, over the query's tokens, of how much a document's best probed token exceeds the estimate."""
    size = residuals.shape[1]
    per_byte = 8 // bits
    levels = (1 << bits) - 1
    table = np.empty((size, 256), np.int16)
    count = 0
    for i in range(query.shape[0]):
        now = stamp + i
        for b in range(size):
            for byte in range(256):
                total = 0
                for part in range(per_byte):
                    code = (byte >> (bits * part)) & levels
                    total += query[i, part * size + b] * (2 * code - levels)
                table[b, byte] = total
        here = 0
        for p in range(probes.shape[1]):
            centroid = probes[i, p]
            score = scores[centroid, i]
            for position in range(offsets[centroid], offsets[centroid + 1]):
                product = np.int32(0)
                for b in range(size):
                    product += np.int32(table[b, residuals[position, b]])
                first = scales[position, 0]
                value = centroid_factors[first] * score + length_factors[first] * residual_factors[
                    scales[position, 1]
                ] * np.float32(product)
                document = documents[position]
                seen = stamps[document]
                if seen == now:
                    best[document] = max(best[document], value)
                    continue
                stamps[document] = now
                best[document] = value
                met_by_token[here] = document
                here += 1
                if seen < stamp:
                    sums[document] = np.float32(0)
                    met[count] = document
                    count += 1
        for j in range(here):
            document = met_by_token[j]
            sums[document] += (best[document] - missing[i]) * query_scales[i]
    return count
