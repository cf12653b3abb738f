"""Kernels over tiles of integer products: the products alone, and the scores of documents from residuals.

Their results are those of :mod:`colbert_core.index.integer_product` and of the kernels that read its
products, bit for bit; they are for processors on which ``has_tiles()``.
"""

from __future__ import annotations

import numpy as np

from colbert_core.index.integer_tiles import (
    LANES,
    PANEL,
    ROWS,
    VECTORS,
    nearest_tile,
    product_tile,
    similarity_tile,
    unpack_row,
)
from colbert_core.index.kernels import BLOCK, jit
from colbert_core.vector_code import fetch

_LINE_FLOATS = 16
_TILES = 8  # of the rows that are assigned to centroids together
_CHUNK = ROWS * BLOCK // 2  # centroids whose products are held: whole tiles, whole blocks, in the first cache

_products = product_tile(ROWS, VECTORS)
_products_last = product_tile(ROWS, 1)
_products_of_row = product_tile(1, VECTORS)
_products_of_row_last = product_tile(1, 1)
_keep_nearest = nearest_tile(ROWS)
_unpack_2, _unpack_4, _unpack_8 = unpack_row(2), unpack_row(4), unpack_row(8)
_raise = similarity_tile(ROWS, VECTORS)
_raise_last = similarity_tile(ROWS, 1)
_raise_by_row = similarity_tile(1, VECTORS)
_raise_by_row_last = similarity_tile(1, 1)


@jit
def tile_products(left, right, out):  # type: ignore[no-untyped-def]
    """``left`` times a right operand.

    Args:
        left: int8 ``[m, width]``.
        right: int16 ``[panels, width / 2, PANEL, 2]``, as ``interleaved`` makes it.
        out: int32 ``[m, n]``, C-contiguous, written; n is a multiple of ``LANES``.
    """
    words = np.empty((ROWS, left.shape[1]), np.int16)
    _multiply(left, 0, left.shape[0], right, out.shape[1], words, out)


@jit
def _multiply(left, first, rows, right, columns, words, out):  # type: ignore[no-untyped-def]
    """As :func:`tile_products`, of ``rows`` left rows from ``first`` on, with so many columns.

    Args:
        left, right: as there.
        first, rows: which left rows.
        columns: a multiple of ``LANES``.
        words: int16 ``[ROWS, width]``, used.
        out: int32 ``[>= rows, >= columns]``, written.
    """
    paired = columns // PANEL * PANEL
    whole = rows >= ROWS
    here = ROWS if whole else 1
    row = 0
    while row < rows:
        # The last tile takes some rows again.
        row = min(row, rows - here)
        for r in range(here):
            for k in range(left.shape[1]):
                words[r, k] = left[first + row + r, k]
        if whole:
            for column in range(0, paired, PANEL):
                _products(words, right, column, out, row)
            if paired < columns:
                _products_last(words, right, paired, out, row)
        else:
            for column in range(0, paired, PANEL):
                _products_of_row(words, right, column, out, row)
            if paired < columns:
                _products_of_row_last(words, right, paired, out, row)
        row += here


@jit
def score_centroids(centroids, first, last, right, length, scores, block_max, column_sums):  # type: ignore[no-untyped-def]
    """Scores of some centroids with their statistics, as products and ``take_scores`` give them.

    Args:
        centroids: int8 ``[centroids, width]``.
        first, last: which ones (last excluded); first is a multiple of ``BLOCK``.
        right: int16 ``[panels, width / 2, PANEL, 2]``: the query, as ``interleaved`` makes it.
        length: tokens of the query; the lanes after them are zeros.
        scores: float32 ``[centroids, lanes]``, written.
        block_max: int32 ``[ceil(centroids / BLOCK), lanes]``, written.
        column_sums: int64 ``[lanes]``, added to.
    """
    lanes = scores.shape[1]
    columns = -(-length // LANES) * LANES
    words = np.empty((ROWS, centroids.shape[1]), np.int16)
    products = np.zeros((_CHUNK, lanes), np.int32)
    sums = np.empty(lanes, np.int32)
    for start in range(first, last, _CHUNK):
        rows = min(_CHUNK, last - start)
        _multiply(centroids, start, rows, right, columns, words, products)
        for begin in range(0, rows, BLOCK):
            top = block_max[(start + begin) // BLOCK]
            for i in range(lanes):
                top[i] = products[begin, i]
                sums[i] = 0  # so many products of rows of 1024 numbers fit 32 bits
            for row in range(begin, min(begin + BLOCK, rows)):
                for i in range(lanes):
                    value = products[row, i]
                    scores[start + row, i] = np.float32(value)
                    top[i] = max(top[i], value)
                    sums[i] += value
            for i in range(lanes):
                column_sums[i] += sums[i]


@jit
def nearest_centroids(rows, first, last, right, scales, units, half_squares, nearest):  # type: ignore[no-untyped-def]
    """The centroid of each row with the largest product less half its squared length, ties to the lowest.

    They are compared as integers, in units of each row, as ``_keep_nearest`` in
    :mod:`colbert_core.index.assignment` does. A panel of centroids is multiplied with some rows while both
    are in the first cache, and the best of each of its columns is kept.

    Args:
        rows: int8 ``[n, width]``.
        first, last: which ones (last excluded).
        right: int16 ``[panels, width / 2, PANEL, 2]``: the centroids, as ``interleaved`` makes it; the last
            one again and again, until the panel is full.
        scales: float32 ``[n]``: what a product is multiplied by.
        units: float32 ``[n]``: what half a squared length is multiplied by; no value exceeds 31 bits.
        half_squares: float32 ``[panels · PANEL]``.
        nearest: uint32 ``[n]``, written.
    """
    together = _TILES * ROWS
    words = np.zeros((together, rows.shape[1]), np.int16)
    best = np.empty((together, PANEL), np.int32)
    found = np.empty((together, PANEL), np.int32)
    row_scales, row_units = np.zeros(together, np.float32), np.zeros(together, np.float32)
    for start in range(first, last, together):
        count = min(together, last - start)
        for r in range(count):
            for k in range(rows.shape[1]):
                words[r, k] = rows[start + r, k]
            row_scales[r], row_units[r] = scales[start + r], units[start + r]
        best[:] = np.int32(-2147483648)
        found[:] = 0
        for column in range(0, half_squares.shape[0], PANEL):
            for r in range(0, count, ROWS):  # what a last tile adds is not looked at
                part = slice(r, r + ROWS)
                _keep_nearest(
                    words[part],
                    right,
                    column,
                    row_scales,
                    row_units,
                    half_squares,
                    best[part],
                    found[part],
                    r,
                )
        for r in range(count):
            top, number = best[r, 0], found[r, 0]
            for i in range(1, PANEL):
                if best[r, i] > top or (best[r, i] == top and found[r, i] < number):
                    top, number = best[r, i], found[r, i]
            nearest[start + r] = number


@jit
def score_documents(  # type: ignore[no-untyped-def]
    documents,
    offsets,
    codes,
    residuals,
    scales,
    bits,
    left,
    right,
    carry,
    constants,
    scores,
    centroid_factors,
    length_factors,
    residual_factors,
    query_scales,
    totals,
):
    """Scores documents from their residuals: per query token the best similarity, summed in order.

    The similarity of a token is that of ``best_similarities`` in :mod:`colbert_core.index.kernels`.

    Args:
        documents: int32 ``[n]``.
        offsets: int64 ``[documents of the shard + 1]``, known to be within bounds.
        codes: centroid of every token.
        residuals: uint8 ``[tokens, width * bits / 8]``.
        scales: uint8 ``[tokens, 2]``.
        bits: 2, 4 or 8.
        left: ``[ROWS, width]``, used for tokens: uint8 for 2 and 4 bits, int16 for 8.
        right: the query, as ``interleaved`` makes it: bytes beside uint8, words beside int16.
        carry: steps after which sums are carried to 32 bits.
        constants: int32 ``[lanes]``: ``(2^bits - 1) · sum of the query token's numbers``.
        scores: float32 ``[centroids, lanes]``.
        centroid_factors, length_factors, residual_factors: float32 ``[256]``.
        query_scales: float32 ``[length]``.
        totals: float32 ``[n]``, written.
    """
    length = query_scales.shape[0]
    lanes, last = scores.shape[1], scores.shape[0] - 1
    columns = -(-length // LANES) * LANES
    paired = columns // PANEL * PANEL
    lines = -(-columns // _LINE_FLOATS)
    best = np.empty(columns, np.float32)
    places = np.empty(ROWS, np.int64)
    factors = np.empty((ROWS, 2), np.float32)
    for n in range(documents.shape[0]):
        position, end = offsets[documents[n]], offsets[documents[n] + 1]
        for i in range(columns):
            best[i] = np.finfo(np.float32).min
        whole = end - position >= ROWS
        while position < end:
            # The last tile takes some tokens again, which leaves a maximum as it is.
            position = min(position, end - ROWS) if whole else position
            here = ROWS if whole else 1
            for r in range(here):
                token = position + r
                if bits == 4:
                    _unpack_4(residuals, token, left, r)
                elif bits == 2:
                    _unpack_2(residuals, token, left, r)
                else:
                    _unpack_8(residuals, token, left, r)
                places[r] = min(np.int64(codes[token]), last) * lanes
                length_factor = length_factors[scales[token, 0]]
                factors[r, 0] = centroid_factors[scales[token, 0]]
                factors[r, 1] = length_factor * residual_factors[scales[token, 1]]
            for token in range(position + here, min(position + 2 * here, end)):
                fetch(scores, min(np.int64(codes[token]), last) * lanes, lines)  # type: ignore[call-arg]
            if whole:
                for column in range(0, paired, PANEL):
                    _raise(left, right, column, carry, constants, scores, places, factors, best)
                if paired < columns:
                    _raise_last(left, right, paired, carry, constants, scores, places, factors, best)
            else:
                for column in range(0, paired, PANEL):
                    _raise_by_row(left, right, column, carry, constants, scores, places, factors, best)
                if paired < columns:
                    _raise_by_row_last(left, right, paired, carry, constants, scores, places, factors, best)
            position += here
        total = np.float32(0)
        for i in range(length):
            total += best[i] * query_scales[i]
        totals[n] = total
