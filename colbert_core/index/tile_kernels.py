"""Kernels over tiles of integer products: the products alone, and the scores of documents from residuals.

Their results are those of :mod:`colbert_core.index.integer_product` and of the kernels that read its
products, bit for bit; they are for processors on which ``has_tiles()``.
"""

from __future__ import annotations

import numpy as np

from colbert_core.index.integer_tiles import LANES, ROWS, VECTORS, product_tile, similarity_tile
from colbert_core.index.kernels import jit
from colbert_core.index.vector_ops import fetch

_PAIR = VECTORS * LANES
_LINE_FLOATS = 16

_products = product_tile(ROWS, VECTORS)
_products_last = product_tile(ROWS, 1)
_products_of_row = product_tile(1, VECTORS)
_products_of_row_last = product_tile(1, 1)
_raise = similarity_tile(ROWS, VECTORS)
_raise_last = similarity_tile(ROWS, 1)
_raise_by_row = similarity_tile(1, VECTORS)
_raise_by_row_last = similarity_tile(1, 1)


@jit
def tile_products(left, right, out):  # type: ignore[no-untyped-def]
    """``left`` times a right operand.

    Args:
        left: int8 ``[m, width]``.
        right: int16 ``[width / 2, n, 2]``, as ``interleaved`` makes it.
        out: int32 ``[m, n]``, C-contiguous, written.
    """
    rows, width = left.shape
    columns = right.shape[1]
    paired = columns // _PAIR * _PAIR
    words = np.empty((ROWS, width), np.int16)
    row = 0
    while row < rows:
        whole = rows >= ROWS
        # The last tile takes some rows again.
        row = min(row, rows - ROWS) if whole else row
        here = ROWS if whole else 1
        for r in range(here):
            for k in range(width):
                words[r, k] = left[row + r, k]
        if whole:
            for column in range(0, paired, _PAIR):
                _products(words, right, column, out, row)
            if paired < columns:
                _products_last(words, right, paired, out, row)
        else:
            for column in range(0, paired, _PAIR):
                _products_of_row(words, right, column, out, row)
            if paired < columns:
                _products_of_row_last(words, right, paired, out, row)
        row += here


@jit
def unpack(residuals, bits, position, left, row):  # type: ignore[no-untyped-def]
    """One token's residual as a left row.

    Args:
        residuals: uint8 ``[tokens, width * bits / 8]``.
        bits: 2, 4 or 8.
        position: the token.
        left: ``[rows, width]``, written: codes, uint8, of 2 or 4 bits; levels, int16, of 8 bits.
        row: which one to write.
    """
    width = left.shape[1]
    if bits == 4:
        half = width // 2
        for b in range(half):
            left[row, b] = residuals[position, b] & np.uint8(15)
        for b in range(half):
            left[row, half + b] = residuals[position, b] >> np.uint8(4)
    elif bits == 2:
        quarter = width // 4
        for part in range(4):
            for b in range(quarter):
                left[row, part * quarter + b] = (residuals[position, b] >> np.uint8(2 * part)) & np.uint8(3)
    else:
        for b in range(width):
            left[row, b] = np.int16(residuals[position, b]) - np.int16(128)


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
    paired = columns // _PAIR * _PAIR
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
                unpack(residuals, bits, token, left, r)
                places[r] = min(np.int64(codes[token]), last) * lanes
                length_factor = length_factors[scales[token, 0]]
                factors[r, 0] = centroid_factors[scales[token, 0]]
                factors[r, 1] = length_factor * residual_factors[scales[token, 1]]
            for token in range(position + here, min(position + 2 * here, end)):
                fetch(scores, min(np.int64(codes[token]), last) * lanes, lines)  # type: ignore[call-arg]
            if whole:
                for column in range(0, paired, _PAIR):
                    _raise(left, right, column, carry, constants, scores, places, factors, best)
                if paired < columns:
                    _raise_last(left, right, paired, carry, constants, scores, places, factors, best)
            else:
                for column in range(0, paired, _PAIR):
                    _raise_by_row(left, right, column, carry, constants, scores, places, factors, best)
                if paired < columns:
                    _raise_by_row_last(left, right, paired, carry, constants, scores, places, factors, best)
            position += here
        total = np.float32(0)
        for i in range(length):
            total += best[i] * query_scales[i]
        totals[n] = total
