"""Attention with dropout, forward and backward, one head of one text at a time in a core's cache.

A block of query rows against all keys: its weights never leave the cache, and the backward pass computes
them again from each row's largest product and sum (as FlashAttention does, Dao et al. 2022, algorithms 1 and
4), dropout's mask included.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from colbert_core.float_tiles import ROWS, STREAMS, add_transposed, draw, exponentials, maximum, multiply
from colbert_core.vector_code import COLUMNS, LINE, fetch

_BLOCK = 28 if ROWS == 14 else 24  # query rows whose weights are held at a time
_MIXING = 12  # rounds after which SFC32 has mixed its seed


@njit(nogil=True, boundscheck=False)
def _seed(state, seed, item, words):  # type: ignore[no-untyped-def]
    """Starts the streams of random bits for one head of one text."""
    for stream in range(STREAMS):
        state[stream] = np.uint32(seed)
        state[STREAMS + stream] = np.uint32(seed >> 32)
        state[2 * STREAMS + stream] = np.uint32(item * STREAMS + stream)
        state[3 * STREAMS + stream] = np.uint32(1)
    draw(state, words[: _MIXING * STREAMS])  # type: ignore[call-arg]


@njit(nogil=True, boundscheck=False)
def _stride(length):  # type: ignore[no-untyped-def]
    """Columns of a matrix of weights: all keys, and room for whole tiles of rows as of columns."""
    return (max(length, ROWS) + ROWS + COLUMNS - 1) // COLUMNS * COLUMNS


@njit(nogil=True, boundscheck=False)
def _words_of_row(length):  # type: ignore[no-untyped-def]
    """Words of random bits for a row of weights, two weights to a word."""
    return (length + 2 * STREAMS - 1) // (2 * STREAMS) * STREAMS


@njit(nogil=True, boundscheck=False)
def _fetch_next(source, text, row, head):  # type: ignore[no-untyped-def]
    """Asks for a row of the next head, which lies behind this one: nothing else would in time."""
    dim = source.shape[3]
    after = ((text * source.shape[1] + row) * source.shape[2] + head + 1) * dim
    fetch(source, after, (dim + LINE - 1) // LINE)  # type: ignore[call-arg]


@njit(nogil=True, boundscheck=False)
def _pack(source, text, head, first, last, target, stride):  # type: ignore[no-untyped-def]
    """Rows ``first`` to ``last`` of a head as rows of a flat matrix."""
    for row in range(first, last):
        _fetch_next(source, text, row, head)
        for column in range(source.shape[3]):
            target[(row - first) * stride + column] = source[text, row, head, column]


@njit(nogil=True, boundscheck=False)
def _pack_transposed(source, text, head, target, stride):  # type: ignore[no-untyped-def]
    """A head's rows as columns of a flat matrix."""
    for row in range(source.shape[1]):
        _fetch_next(source, text, row, head)
        for column in range(source.shape[3]):
            target[column * stride + row] = source[text, row, head, column]


@njit(nogil=True, boundscheck=False, fastmath={"contract"})
def _add_mask(weights, at, stride, length, scale, mask, text, row):  # type: ignore[no-untyped-def]
    """Scales a row of products, adds its mask, and puts minus infinity where there is no key."""
    text, row = min(text, mask.shape[0] - 1), min(row, mask.shape[1] - 1)
    for column in range(length):
        weights[at + column] = weights[at + column] * scale + mask[text, row, column]
    for column in range(length, stride):
        weights[at + column] = -np.inf


@njit(nogil=True, cache=True, boundscheck=False)
def attend(query, key, value, mask, scale, below, seed, first, last, out, rows_of):  # type: ignore[no-untyped-def]
    """Attention of heads ``first`` to ``last`` (exclusive), counted text by text.

    Args:
        query, key, value: float32 ``[n, length, heads, dim]``, C-contiguous; dim is a multiple of COLUMNS.
        mask: float32 ``[n or 1, length or 1, length]``, broadcast to ``[n, length, length]``: what is added.
        scale: float32, of the products.
        below: int64; a weight is dropped where its 16 random bits are below it. 0: none is.
        seed: int64, of dropout.
        first, last: int64.
        out: float32 ``[n, length, heads, dim]``, written.
        rows_of: float32 ``[n, heads, length, 2]``, written for :func:`attend_back`: the largest product of
            a row, and the inverse of its sum of exponentials.
    """
    length, heads, dim = query.shape[1], query.shape[2], query.shape[3]
    stride = _stride(length)
    keys, values = np.zeros(dim * stride, np.float32), np.empty(length * dim, np.float32)
    queries, weights = np.zeros(_BLOCK * dim, np.float32), np.empty(_BLOCK * stride, np.float32)
    found = np.empty(_BLOCK * dim, np.float32)
    drawn = _words_of_row(length)
    words, state = np.empty(max(drawn, _MIXING * STREAMS), np.uint32), np.empty(4 * STREAMS, np.uint32)
    bits = words.view(np.uint16)
    kept = np.float32(65536.0 / (65536.0 - below))
    for item in range(first, last):
        text, head = item // heads, item % heads
        _pack_transposed(key, text, head, keys, stride)
        _pack(value, text, head, 0, length, values, dim)
        _seed(state, seed, item, words)
        for begin in range(0, length, _BLOCK):
            rows = min(_BLOCK, length - begin)
            _pack(query, text, head, begin, begin + rows, queries, dim)
            multiply(queries, dim, rows, keys, stride, stride, dim, weights, stride)
            for row in range(rows):
                at = row * stride
                _add_mask(weights, at, stride, length, scale, mask, text, begin + row)
                largest: float = maximum(weights, at, stride)  # type: ignore[call-arg]
                factor = np.float32(1.0) / exponentials(weights, at, stride, largest)
                rows_of[text, head, begin + row, 0] = largest
                rows_of[text, head, begin + row, 1] = factor
                if below == 0:
                    for column in range(length):
                        weights[at + column] *= factor
                else:
                    draw(state, words[:drawn])
                    factor *= kept
                    for column in range(length):
                        chosen = factor if bits[column] >= below else np.float32(0.0)
                        weights[at + column] *= chosen
            multiply(weights, stride, rows, values, dim, dim, length, found, dim)
            for row in range(rows):
                for column in range(dim):
                    out[text, begin + row, head, column] = found[row * dim + column]


@njit(nogil=True, cache=True, boundscheck=False, fastmath={"contract", "reassoc", "nsz"})
def attend_back(  # type: ignore[no-untyped-def]
    query, key, value, mask, scale, below, seed, first, last, rows_of, gradient, to_query, to_key, to_value
):
    """Gradients of :func:`attend`.

    Args:
        gradient: float32 ``[n, length, heads, dim]``, that of ``out``.
        to_query, to_key, to_value: float32 ``[n, length, heads, dim]``, written.
        others: as :func:`attend` got and wrote them.
    """
    length, heads, dim = query.shape[1], query.shape[2], query.shape[3]
    stride = _stride(length)
    keys, values = np.zeros(dim * stride, np.float32), np.zeros(dim * stride, np.float32)
    key_rows = np.empty(length * dim, np.float32)
    queries, gradients = np.zeros(_BLOCK * dim, np.float32), np.zeros(_BLOCK * dim, np.float32)
    weights, errors = np.empty(_BLOCK * stride, np.float32), np.empty(_BLOCK * stride, np.float32)
    found = np.empty(_BLOCK * dim, np.float32)
    key_sums, value_sums = np.empty(stride * dim, np.float32), np.empty(stride * dim, np.float32)
    drawn = _words_of_row(length)
    words, state = np.empty(max(drawn, _MIXING * STREAMS), np.uint32), np.empty(4 * STREAMS, np.uint32)
    bits = words.view(np.uint16)
    kept = np.float32(65536.0 / (65536.0 - below))
    for item in range(first, last):
        text, head = item // heads, item % heads
        _pack_transposed(key, text, head, keys, stride)
        _pack_transposed(value, text, head, values, stride)
        _pack(key, text, head, 0, length, key_rows, dim)
        key_sums[:] = 0.0
        value_sums[:] = 0.0
        _seed(state, seed, item, words)
        for begin in range(0, length, _BLOCK):
            rows = min(_BLOCK, length - begin)
            _pack(query, text, head, begin, begin + rows, queries, dim)
            _pack(gradient, text, head, begin, begin + rows, gradients, dim)
            multiply(queries, dim, rows, keys, stride, stride, dim, weights, stride)
            multiply(gradients, dim, rows, values, stride, stride, dim, errors, stride)
            for row in range(rows):
                at = row * stride
                _add_mask(weights, at, stride, length, scale, mask, text, begin + row)
                exponentials(weights, at, stride, rows_of[text, head, begin + row, 0])  # type: ignore[call-arg]
                factor = rows_of[text, head, begin + row, 1]
                total = np.float32(0.0)
                if below == 0:
                    for column in range(length):
                        total += weights[at + column] * factor * errors[at + column]
                    for column in range(length):
                        weight = weights[at + column] * factor
                        errors[at + column] = weight * (errors[at + column] - total) * scale
                        weights[at + column] = weight
                else:
                    draw(state, words[:drawn])
                    for column in range(length):
                        chosen = kept if bits[column] >= below else np.float32(0.0)
                        errors[at + column] *= chosen
                        total += weights[at + column] * factor * errors[at + column]
                    for column in range(length):
                        chosen = kept if bits[column] >= below else np.float32(0.0)
                        weight = weights[at + column] * factor
                        errors[at + column] = weight * (errors[at + column] - total) * scale
                        weights[at + column] = weight * chosen
            multiply(errors, stride, rows, key_rows, dim, dim, length, found, dim)
            for row in range(rows):
                for column in range(dim):
                    to_query[text, begin + row, head, column] = found[row * dim + column]
            add_transposed(weights, stride, length, gradients, dim, dim, rows, value_sums, dim)
            add_transposed(errors, stride, length, queries, dim, dim, rows, key_sums, dim)
        for row in range(length):
            for column in range(dim):
                to_key[text, row, head, column] = key_sums[row * dim + column]
                to_value[text, row, head, column] = value_sums[row * dim + column]
