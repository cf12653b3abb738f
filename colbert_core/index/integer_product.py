"""Exact products of int8 matrices.

Every score of the index is built from dot products of small integers. Their sums are exact, so a
score depends neither on the shape of the matrix product that computed it, nor on the processor: that
is what makes N shards answer as one does, bit for bit.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

MAX_MAGNITUDE = 127
_EXACT_IN_FLOAT32 = (1 << 24) // MAX_MAGNITUDE**2  # widest rows whose dot products a float32 holds exactly


def integer_product(
    left: NDArray[np.int8], right: NDArray[np.int8], out: NDArray[np.int32] | None = None
) -> NDArray[np.int32]:
    """``left @ right.T`` in 32-bit integers.

    Args:
        left: int8 ``[m, width]``, values within ±127.
        right: int8 ``[n, width]``, values within ±127.
        out: int32 ``[m, n]``, C-contiguous, to write to.

    Returns:
        int32 ``[m, n]``, exact on every processor.
    """
    if out is None:
        out = np.empty((left.shape[0], right.shape[0]), dtype=np.int32)
    if left.shape[0] == 0 or right.shape[0] == 0:
        return out
    if int8_units_are_exact():
        torch._int_mm(torch.from_numpy(left), torch.from_numpy(right).t(), out=torch.from_numpy(out))
    elif left.shape[1] <= _EXACT_IN_FLOAT32:
        out[...] = left.astype(np.float32) @ right.astype(np.float32).T
    else:
        np.matmul(left.astype(np.int32), right.astype(np.int32).T, out=out)
    return out


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
