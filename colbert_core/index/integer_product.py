"""Exact products of int8 matrices.

Every score of the index is built from dot products of small integers. Their sums are exact, so a
score depends neither on the shape of the matrix product that computed it, nor on the processor: that
is what makes N shards answer as one does, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm
import numpy as np
import torch
from numpy.typing import NDArray

from colbert_core.index.integer_tiles import LANES, STEP_WIDTH, has_tiles, interleaved
from colbert_core.index.tile_kernels import tile_products

MAX_MAGNITUDE = 127
_INT8_UNITS = ("avx512vnni", "avxvnni", "amx-int8")
_EXACT_IN_FLOAT32 = (1 << 24) // MAX_MAGNITUDE**2  # widest rows whose dot products a float32 holds exactly


@dataclass(frozen=True)
class RightOperand:
    """The right matrix of a product, prepared once for many of them.

    Attributes:
        rows: int8 ``[n, width]``, values within ±127.
        words: the same for tiles, where they compute the products.
    """

    rows: NDArray[np.int8]
    words: NDArray[np.int16] | None


def right_operand(rows: NDArray[np.int8]) -> RightOperand:
    """Prepares int8 ``[n, width]``, values within ±127."""
    return RightOperand(rows, interleaved(rows, np.int16) if tiles_are_faster(rows.shape[1]) else None)


def integer_product(
    left: NDArray[np.int8], right: NDArray[np.int8] | RightOperand, out: NDArray[np.int32] | None = None
) -> NDArray[np.int32]:
    """``left @ right.T`` in 32-bit integers.

    Args:
        left: int8 ``[m, width]``, values within ±127.
        right: int8 ``[n, width]``, values within ±127.
        out: int32 ``[m, n]``, C-contiguous, to write to.

    Returns:
        int32 ``[m, n]``, exact on every processor.
    """
    operand = right if isinstance(right, RightOperand) else right_operand(right)
    rows, words = operand.rows, operand.words
    if out is None:
        out = np.empty((left.shape[0], rows.shape[0]), dtype=np.int32)
    if left.shape[0] == 0 or rows.shape[0] == 0:
        return out
    if words is not None:
        if len(rows) % LANES == 0:
            tile_products(left, words, out)
        else:
            padded = np.empty((len(left), -(-len(rows) // LANES) * LANES), dtype=np.int32)
            tile_products(left, words, padded)
            out[...] = padded[:, : len(rows)]
    elif int8_units_are_exact():
        torch._int_mm(torch.from_numpy(left), torch.from_numpy(rows).t(), out=torch.from_numpy(out))
    elif left.shape[1] <= _EXACT_IN_FLOAT32:
        out[...] = left.astype(np.float32) @ rows.astype(np.float32).T
    else:
        np.matmul(left.astype(np.int32), rows.astype(np.int32).T, out=out)
    return out


@cache
def tiles_are_faster(width: int) -> bool:
    """Whether products of rows this wide are computed by tiles.

    They are where AVX2 is there and int8 matrix units are missing; torch's int8 product is exact without
    such units, too, and then a plain loop. Other widths than a codec's may be no multiple of a tile's step.
    """
    features = llvm.get_host_cpu_features()
    missing = not any(features.get(unit, False) for unit in _INT8_UNITS)
    return missing and has_tiles() and width % STEP_WIDTH == 0


@cache
def int8_units_are_exact() -> bool:
    """Whether torch's int8 matrix product is exact here.

    Processors without VNNI may add pairs of products in 16 bits, which saturates; the extreme values
    that would show it are tried once, in the shapes in use.
    """
    generator = np.random.default_rng(0)
    for rows, width, columns in ((256, 128, 32), (64, 48, 7), (512, 1024, 64)):
        signs = generator.choice(np.array([-127, 127], dtype=np.int8), size=(rows + columns, width))
        signs[0] = signs[rows] = 127
        left, right = signs[:rows], signs[rows:]
        try:
            found = torch._int_mm(torch.from_numpy(left), torch.from_numpy(right).t()).numpy()
        except RuntimeError:
            return False
        if not np.array_equal(found, left.astype(np.int32) @ right.astype(np.int32).T):
            return False
    return True
