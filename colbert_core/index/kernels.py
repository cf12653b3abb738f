"""Compiled kernels of search: candidate generation, interaction of centroids, scoring.

All of them release the GIL, and none adds floating-point numbers in an order that depends on anything
but the document and the query: equal inputs give equal bits, whatever else is in the batch. Ids read
from disk are checked against their bounds before they are used as indices.
"""

from __future__ import annotations

import numba
import numpy as np

from colbert_core.index.vector_ops import BYTES, sum_of_best_bytes
from colbert_core.vector_code import fetch

LANES = BYTES  # query tokens are padded to a multiple of this, so that inner loops have a fixed length
BLOCK = 32  # centroids per block of the block maxima
_AHEAD, _FETCHED = 4, 8  # the interaction fetches lines of codes for the document that comes after so many

jit = numba.njit(nogil=True, cache=True, boundscheck=False)


@jit
def quantize_rows(rows, quantized, scales):  # type: ignore[no-untyped-def]
    """Rounds each row to int8 with a scale of its own.

    Args:
        rows: float32 ``[n, width]``.
        quantized: int8 ``[n, width]``, written: ``rint(row / scale)``, within ±127.
        scales: float32 ``[n]``, written: largest magnitude / 127; 0 for a row of zeros.
    """
    # The bits of positive floats order as integers do, and a maximum of integers vectorises.
    bits = rows.view(np.int32)
    magnitude = np.zeros(1, np.int32)
    for i in range(rows.shape[0]):
        largest = np.int32(0)
        for k in range(rows.shape[1]):
            largest = max(largest, bits[i, k] & np.int32(0x7FFFFFFF))
        magnitude[0] = largest
        scale = np.float32(magnitude.view(np.float32)[0] / np.float32(127))
        scales[i] = scale
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        for k in range(rows.shape[1]):
            value = np.rint(rows[i, k] * inverse)
            quantized[i, k] = np.int8(np.int32(min(max(value, np.float32(-127)), np.float32(127))))


@jit
def rotate_rows(rows, rotation, rotated):  # type: ignore[no-untyped-def]
    """``rows @ rotation``, each sum in the order of the input dimensions.

    A BLAS product rounds differently for different numbers of rows; this one does not.

    Args:
        rows: float32 ``[n, dim]``.
        rotation: float32 ``[dim, width]``.
        rotated: float32 ``[n, width]``, written.
    """
    width = rotation.shape[1]
    for i in range(rows.shape[0]):
        for j in range(width):
            rotated[i, j] = np.float32(0)
        for k in range(rotation.shape[0]):
            value = rows[i, k]
            for j in range(width):
                rotated[i, j] += value * rotation[k, j]


@jit
def take_scores(product, first, scores, block_max, column_sums):  # type: ignore[no-untyped-def]
    """Stores a block of centroid scores, with their statistics.

    Args:
        product: int32 ``[rows, lanes]``: some centroids × the query's tokens.
        first: number of the first of these centroids; a multiple of ``BLOCK``.
        scores: float32 ``[centroids, lanes]``, written (exact: the integers are below 2^24).
        block_max: int32 ``[ceil(centroids / BLOCK), lanes]``, written.
        column_sums: int64 ``[lanes]``, added to.
    """
    rows, lanes = product.shape
    for start in range(0, rows, BLOCK):
        block = (first + start) // BLOCK
        for i in range(lanes):
            block_max[block, i] = product[start, i]
        for row in range(start, min(start + BLOCK, rows)):
            for i in range(lanes):
                scores[first + row, i] = np.float32(product[row, i])
            for i in range(lanes):
                block_max[block, i] = max(block_max[block, i], product[row, i])
            for i in range(lanes):
                column_sums[i] += product[row, i]


@jit
def top_centroids(scores, block_max, probes, best, found):  # type: ignore[no-untyped-def]
    """The best centroids of every query token, by score, ties by number.

    Args:
        scores: float32 ``[centroids, lanes]``.
        block_max: int32 ``[blocks, lanes]``.
        probes: P, at most the number of centroids.
        best: float32 ``[length, P]``, written, descending.
        found: int32 ``[length, P]``, written: the centroids.
    """
    centroids = scores.shape[0]
    blocks = block_max.shape[0]
    tops = np.empty(probes, np.int32)
    for i in range(best.shape[0]):
        # The P-th largest block maximum is a lower bound of the P-th largest score.
        count = 0
        for block in range(blocks):
            top = block_max[block, i]
            if count < probes:
                count += 1
            elif top <= tops[probes - 1]:
                continue
            j = count - 1
            while j > 0 and tops[j - 1] < top:
                tops[j] = tops[j - 1]
                j -= 1
            tops[j] = top
        floor = tops[probes - 1] if count == probes else np.int32(-2147483648)
        count = 0
        for block in range(blocks):
            if block_max[block, i] < floor:
                continue
            for row in range(block * BLOCK, min(block * BLOCK + BLOCK, centroids)):
                value = scores[row, i]
                if value < floor:
                    continue
                if count < probes:
                    count += 1
                elif value <= best[i, probes - 1]:
                    continue
                j = count - 1
                while j > 0 and best[i, j - 1] < value:
                    best[i, j] = best[i, j - 1]
                    found[i, j] = found[i, j - 1]
                    j -= 1
                best[i, j] = value
                found[i, j] = row


@jit
def interaction_table(scores, bases, factors, table):  # type: ignore[no-untyped-def]
    """Centroid scores as bytes, for the interaction of centroids.

    Args:
        scores: float32 ``[rows, lanes]``.
        bases: float32 ``[lanes]``: the score that becomes 0.
        factors: float32 ``[lanes]``: units per score; 0 for padding.
        table: uint8 ``[rows, lanes]``, written.
    """
    for row in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            value = np.rint((scores[row, i] - bases[i]) * factors[i])
            table[row, i] = np.uint8(np.int32(min(max(value, np.float32(0)), np.float32(255))))


@jit
def gather(posting_offsets, postings, probes, gains, state, stamp, touched):  # type: ignore[no-untyped-def]
    """Sums, for every document met, the best gain of each query token.

    Args:
        posting_offsets: int64 ``[centroids + 1]``, known to be within bounds.
        postings: int32 document numbers, ascending for each centroid.
        probes: int32 ``[length, P]``: centroids of each token, best first.
        gains: int32 ``[length, P]``: what a document in that centroid's postings gains.
        state: int32 ``[documents, 2]``: stamp of the last token that met the document, and its sum.
        stamp: a number above all stamps in ``state``; this call uses ``stamp`` to
            ``stamp + length - 1``.
        touched: int32 ``[documents]``, written: the documents met, in the order of meeting.

    Returns:
        How many documents were met.
    """
    documents = state.shape[0]
    count = 0
    for i in range(probes.shape[0]):
        now = stamp + i
        for p in range(probes.shape[1]):
            centroid = probes[i, p]
            gain = gains[i, p]
            for position in range(posting_offsets[centroid], posting_offsets[centroid + 1]):
                document = postings[position]
                if document < 0 or document >= documents:
                    continue
                seen = state[document, 0]
                if seen == now:
                    continue
                state[document, 0] = now
                if seen < stamp:
                    touched[count] = document
                    count += 1
                    state[document, 1] = gain
                else:
                    state[document, 1] += gain
    return count


@jit
def gather_keys(touched, count, state, eligible, tie_breaks, documents, keys):  # type: ignore[no-untyped-def]
    """Sort keys of the eligible documents among those met: the sum, then the tie-break.

    Args:
        touched, count, state: as :func:`gather` left them.
        eligible: bool ``[documents]``.
        tie_breaks: uint32 ``[documents]``.
        documents: int32, written: the eligible ones.
        keys: int64, written: ``sum << 32 | tie-break``.

    Returns:
        How many are eligible.
    """
    kept = 0
    for j in range(count):
        document = touched[j]
        if eligible[document]:
            documents[kept] = document
            keys[kept] = (np.int64(state[document, 1]) << 32) | np.int64(tie_breaks[document])
            kept += 1
    return kept


@jit
def interaction_keys(documents, offsets, codes, table, tie_breaks, keys):  # type: ignore[no-untyped-def]
    """Late interaction of centroids alone: per query token the best byte over a document's tokens, summed.

    Args:
        documents: int32 ``[n]``.
        offsets: int64 ``[documents of the shard + 1]``, known to be within bounds.
        codes: centroid of every token.
        table: uint8 ``[centroids, lanes]``.
        tie_breaks: uint32 ``[documents of the shard]``.
        keys: int64 ``[n]``, written: ``sum << 32 | tie-break``.
    """
    for n in range(documents.shape[0]):
        if n + _AHEAD < documents.shape[0]:
            fetch(codes, offsets[documents[n + _AHEAD]], _FETCHED)  # type: ignore[call-arg]
        document = documents[n]
        begin, end = offsets[document], offsets[document + 1]
        total = np.int64(0)
        for first in range(0, table.shape[1], LANES):
            total += sum_of_best_bytes(codes, begin, end, table, first)  # type: ignore[call-arg]
        keys[n] = (total << 32) | np.int64(tie_breaks[document])


@jit
def decode_residuals(documents, offsets, residuals, bits, first, rows, levels):  # type: ignore[no-untyped-def]
    """Unpacks residual levels of a run of tokens of the listed documents.

    Args:
        documents: int32 ``[n]``; their tokens count as one sequence.
        offsets: int64 ``[documents of the shard + 1]``.
        residuals: uint8 ``[tokens, width * bits / 8]``.
        bits: 2, 4 or 8.
        first: ``(number in the list, token in the document)`` where to begin.
        rows: how many tokens to unpack; so many are left.
        levels: int8 ``[>= rows, width]``, written: ``2 code - (2^bits - 1)`` for 2 and 4 bits,
            ``code - 128`` for 8.
    """
    width = levels.shape[1]
    n, token = first
    done = 0
    while done < rows:
        begin = offsets[documents[n]] + token
        here = min(rows - done, offsets[documents[n] + 1] - begin)
        for j in range(here):
            if bits == 4:
                half = width // 2
                for b in range(half):
                    code = residuals[begin + j, b]
                    levels[done + j, b] = np.int8(np.int16((code & np.uint8(15)) << 1) - 15)
                    levels[done + j, half + b] = np.int8(np.int16((code >> np.uint8(4)) << 1) - 15)
            elif bits == 2:
                quarter = width // 4
                for part in range(4):
                    for b in range(quarter):
                        code = residuals[begin + j, b] >> np.uint8(2 * part)
                        levels[done + j, part * quarter + b] = np.int8(
                            np.int16((code & np.uint8(3)) << 1) - 3
                        )
            else:
                for b in range(width):
                    levels[done + j, b] = np.int8(np.int16(residuals[begin + j, b]) - 128)
        done += here
        n += 1
        token = 0


@jit
def best_similarities(  # type: ignore[no-untyped-def]
    documents,
    offsets,
    codes,
    scales,
    first,
    rows,
    products,
    scores,
    centroid_factors,
    length_factors,
    residual_factors,
    best,
):
    """Raises ``best`` by the similarities of a run of tokens.

    The similarity of a token is ``centroid factor · centroid score + length factor · residual factor ·
    product``, the factors looked up by the token's two scale bytes. The query token's own scale is left
    out: it is positive, so it does not change which token is best.

    Args:
        documents, offsets, first, rows: as for :func:`decode_residuals`.
        codes: centroid of every token.
        scales: uint8 ``[tokens, 2]``.
        products: int32 ``[>= rows, lanes]``: residual levels × query tokens.
        scores: float32 ``[centroids, lanes]``.
        centroid_factors, length_factors, residual_factors: float32 ``[256]``.
        best: float32 ``[n, lanes]``, updated.
    """
    last = scores.shape[0] - 1
    blocks = scores.shape[1] // LANES
    n, token = first
    done = 0
    while done < rows:
        begin = offsets[documents[n]] + token
        here = min(rows - done, offsets[documents[n] + 1] - begin)
        for j in range(here):
            row = min(np.int64(codes[begin + j]), last)
            a = centroid_factors[scales[begin + j, 0]]
            b = length_factors[scales[begin + j, 0]] * residual_factors[scales[begin + j, 1]]
            for block in range(blocks):
                for lane in range(LANES):
                    i = block * LANES + lane
                    value = a * scores[row, i] + b * np.float32(products[done + j, i])
                    best[n, i] = max(best[n, i], value)
        done += here
        n += 1
        token = 0


@jit
def sum_similarities(best, query_scales, totals):  # type: ignore[no-untyped-def]
    """Adds up the best similarities of each document, in the order of the query tokens.

    Args:
        best: float32 ``[n, lanes]``.
        query_scales: float32 ``[length]``.
        totals: float32 ``[n]``, written.
    """
    for n in range(best.shape[0]):
        total = np.float32(0)
        for i in range(query_scales.shape[0]):
            total += best[n, i] * query_scales[i]
        totals[n] = total
