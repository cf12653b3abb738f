"""Tiles of integer products against the plain definitions, over odd shapes and extreme values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from colbert_core.index.integer_tiles import LANES, PANEL, ROWS, has_tiles, interleaved, steps_per_carry
from colbert_core.index.kernels import BLOCK, interaction_keys
from colbert_core.index.quantizer import pack_levels
from colbert_core.index.tile_kernels import (
    nearest_centroids,
    score_centroids,
    score_documents,
    tile_products,
)

tiles = pytest.mark.skipif(not has_tiles(), reason="no AVX2 on this processor")
Fill = Callable[[np.random.Generator, int, int], NDArray[np.int8]]


def anything(rng: np.random.Generator, rows: int, width: int) -> NDArray[np.int8]:
    return rng.integers(-127, 128, (rows, width)).astype(np.int8)


def extremes(rng: np.random.Generator, rows: int, width: int) -> NDArray[np.int8]:
    """Rows of one sign, and rows of both."""
    signs = rng.choice(np.array([-127, 127], dtype=np.int8), (rows, width))
    signs[::3], signs[1::3] = 127, -127
    return signs


fills = pytest.mark.parametrize("fill", [anything, extremes])


@tiles
@fills
@pytest.mark.parametrize("width", [16, 48, 128, 1024])
@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, ROWS + 1, 50])
@pytest.mark.parametrize("columns", [1, 8, 16, 24, 40])
def test_products_of_tiles(fill: Fill, rows: int, columns: int, width: int) -> None:
    rng = np.random.default_rng(rows + columns + width)
    left, right = fill(rng, rows, width), fill(rng, columns, width)
    operand = interleaved(right, np.int16)
    out = np.full((rows, -(-columns // LANES) * LANES), 12345, dtype=np.int32)
    tile_products(left, operand, out)
    np.testing.assert_array_equal(out[:, :columns], left.astype(np.int64) @ right.astype(np.int64).T)
    assert not out[:, columns:].any()


@tiles
@fills
@pytest.mark.parametrize("width", [16, 128, 1024])
@pytest.mark.parametrize("length", [1, 8, 25, 40])
@pytest.mark.parametrize("centroids", [1, 5, 96, 2048 + 97])
def test_scores_of_centroids(fill: Fill, centroids: int, length: int, width: int) -> None:
    """The second of two parts, into memory that another query has used."""
    rng = np.random.default_rng(centroids + length)
    first, lanes = 64, -(-length // 32) * 32
    rows, query = fill(rng, first + centroids, width), np.zeros((lanes, width), dtype=np.int8)
    query[:length] = fill(rng, length, width)
    scores = np.full((len(rows), lanes), 7, dtype=np.float32)
    block_max = np.full((-(-len(rows) // BLOCK), lanes), 7, dtype=np.int32)
    sums = np.full(lanes, 7, dtype=np.int64)
    right = interleaved(query, np.int16)
    score_centroids(rows, first, len(rows), right, length, scores, block_max, sums)
    expected = rows.astype(np.int64) @ query.T.astype(np.int64)
    expected[:first] = 7
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(sums, 7 + expected[first:].sum(axis=0))
    for block, top in enumerate(block_max):
        assert top.tolist() == expected[block * BLOCK : (block + 1) * BLOCK].max(axis=0).tolist()


def test_operands_put_what_is_added_side_by_side() -> None:
    rows = np.arange(19 * 6, dtype=np.int8).repeat(8).reshape(19, 48)
    for dtype, together in ((np.int8, 4), (np.int16, 2)):
        right = interleaved(rows, dtype)
        assert right.shape == (2, 48 // together, PANEL, together)
        assert right.dtype == dtype
        for row in range(19):
            assert right[row // PANEL, :, row % PANEL].ravel().tolist() == rows[row].tolist()
        assert not right[1, :, 3:].any()


@tiles
@fills
@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("rows", [1, ROWS + 1, 200])
@pytest.mark.parametrize("centroids", [1, 15, 16, 50])
def test_nearest_centroids_of_tiles(fill: Fill, centroids: int, rows: int, width: int) -> None:
    """The last of two parts; many ties, which go to the lowest number."""
    rng = np.random.default_rng(centroids + rows)
    left, right = fill(rng, 3 + rows, width), fill(rng, centroids, width)
    right[centroids // 2 :] = right[: centroids - centroids // 2]
    scales = rng.random(3 + rows, dtype=np.float32) * 100
    units = rng.random(3 + rows, dtype=np.float32)
    half_squares = np.square(right.astype(np.float32)).sum(axis=1)
    nearest = np.full(3 + rows, 99, dtype=np.uint32)
    missing = -centroids % PANEL
    operand = interleaved(np.pad(right, ((0, missing), (0, 0)), "edge"), np.int16)
    padded = np.pad(half_squares, (0, missing), "edge")
    nearest_centroids(left, 3, 3 + rows, operand, scales, units, padded, nearest)
    products = (left.astype(np.int64) @ right.T.astype(np.int64)).astype(np.float32)
    values = (scales[:, None] * products - units[:, None] * half_squares).astype(np.int32)
    assert nearest[:3].tolist() == [99] * 3
    assert nearest[3:].tolist() == values[3:].argmax(axis=1).tolist()


@pytest.mark.parametrize("bits", [2, 4])
def test_no_carry_comes_too_late(bits: int) -> None:
    """The largest sum of so many steps fits 16 bits, and that of one more round of them does not."""
    step = 2 * ((1 << bits) - 1) * 127
    assert steps_per_carry(bits) * step <= 32767 < (steps_per_carry(bits) + 2) * step


@tiles
@fills
@pytest.mark.parametrize("width", [16, 48, 128, 1024])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("length", [1, 8, 9, 31, 40])
def test_scores_of_tiles(fill: Fill, length: int, bits: int, width: int) -> None:
    rng = np.random.default_rng(length + bits + width)
    lengths = np.array([1, ROWS - 1, ROWS, ROWS + 1, 40, 3, 2 * ROWS, 100])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens, lanes, centroids = int(offsets[-1]), -(-length // 32) * 32, 20
    levels = random_levels(fill, rng, tokens, width, bits)
    query = np.zeros((lanes, width), dtype=np.int8)
    query[:length] = fill(rng, length, width)
    codes = rng.integers(0, centroids + 3, tokens).astype(np.uint16)  # some beyond the last: damaged ones
    scales = rng.integers(0, 256, (tokens, 2)).astype(np.uint8)
    scores = rng.integers(-(1 << 21), 1 << 21, (centroids, lanes)).astype(np.float32)
    by_centroid, by_length, by_residual = rng.random((3, 256), dtype=np.float32)
    query_scales = rng.random(length, dtype=np.float32)
    documents = rng.permutation(len(lengths)).astype(np.int32)
    totals = np.empty(len(documents), dtype=np.float32)
    score_documents(
        documents,
        offsets,
        codes,
        pack_levels(levels, bits),
        scales,
        bits,
        np.empty((ROWS, width), dtype=np.int16 if bits == 8 else np.uint8),
        interleaved(query, np.int16 if bits == 8 else np.int8),
        steps_per_carry(bits),
        ((1 << bits) - 1) * query.sum(axis=1, dtype=np.int32),
        scores,
        by_centroid,
        by_length,
        by_residual,
        query_scales,
        totals,
    )
    product = (levels.astype(np.int64) @ query.T.astype(np.int64)).astype(np.float32)
    factors = (by_length[scales[:, 0]] * by_residual[scales[:, 1]])[:, None]
    rows = scores[np.minimum(codes, centroids - 1)]
    values = by_centroid[scales[:, :1]] * rows + factors * product
    for n, document in enumerate(documents):
        best = values[offsets[document] : offsets[document + 1]].max(axis=0)
        expected = np.float32(0)
        for i in range(length):
            expected += best[i] * query_scales[i]
        assert totals[n] == expected


def random_levels(
    fill: Fill, rng: np.random.Generator, tokens: int, width: int, bits: int
) -> NDArray[np.int8]:
    """Levels of so many bits; the extremes of ``fill`` become the extreme levels."""
    found = fill(rng, tokens, width)
    if bits == 8:
        return found
    code = (found.astype(np.int64) + 127) * ((1 << bits) - 1) // 254
    return (2 * code - ((1 << bits) - 1)).astype(np.int8)


@pytest.mark.parametrize("lanes", [32, 96])
def test_interaction_of_empty_documents_and_damaged_codes(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    table = rng.integers(0, 256, (30, lanes)).astype(np.uint8)
    table[7] = 255
    lengths = np.array([3, 0, 200, 1, 8])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    codes = rng.integers(0, 40, offsets[-1]).astype(np.uint16)
    ties = rng.integers(0, 1 << 32, len(lengths)).astype(np.uint32)
    documents = np.array([4, 1, 2, 0, 3, 2], dtype=np.int32)
    keys = np.empty(len(documents), dtype=np.int64)
    interaction_keys(documents, offsets, codes, table, ties, keys)
    rows = table[np.minimum(codes, 29)].astype(np.int64)
    expected = [rows[offsets[i] : offsets[i + 1]].max(axis=0, initial=0).sum() for i in documents]
    assert (keys >> 32).tolist() == expected
    assert (keys & 0xFFFFFFFF).tolist() == ties[documents].tolist()
