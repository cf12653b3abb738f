"""Weighted sums and their means, compiled: each element is read once and leaves no copy behind.

They are compiled when this module is imported, or found in numba's cache: a mean is not kept waiting.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

_ELEMENTS_AT_ONCE = 4096  # still in the processor's cache when they are looked at again
_EXPONENT = np.uint32(0x7F800000)

_SUMS, _MEANS = types.float64[::1], types.float32[::1]
# What was read lies anywhere in a buffer.
_VALUES = tuple(types.Array(kind, 1, "C", readonly=True, aligned=False) for kind in (types.f4, types.f8))


def _compiled(*others: Any) -> Any:
    """Compiles for values of either precision, and other arguments of these types.

    No fast mathematics: products are rounded before they are added, so that every processor gives the
    same bits, and NaN stays NaN.
    """
    return njit([(values, *others) for values in _VALUES], nogil=True, cache=True)


@_compiled(types.f8, _SUMS)
def begin_sums(values, weight, sums):  # type: ignore[no-untyped-def]
    """Begins sums with weighted values.

    Args:
        values: fp32 or fp64 ``[n]``.
        weight: fp64.
        sums: fp64 ``[n]``, written.
    """
    for i in range(values.shape[0]):
        sums[i] = weight * np.float64(values[i])


@_compiled(types.f8, _SUMS)
def add_to_sums(values, weight, sums):  # type: ignore[no-untyped-def]
    """Adds weighted values to sums.

    Args:
        values: fp32 or fp64 ``[n]``.
        weight: fp64.
        sums: fp64 ``[n]``, changed.
    """
    for i in range(values.shape[0]):
        sums[i] += weight * np.float64(values[i])


@_compiled(types.f8, _SUMS, types.f8, _MEANS)
def finish_means(values, weight, sums, share, means):  # type: ignore[no-untyped-def]
    """Adds the last weighted values to sums and makes means of them.

    Args:
        values: fp32 or fp64 ``[n]``.
        weight: fp64.
        sums: fp64 ``[n]`` of the others.
        share: fp64, by which a sum is multiplied.
        means: fp32 ``[n]``, written.

    Returns:
        Whether all means are finite.
    """
    largest = np.uint32(0)
    for begin in range(0, values.shape[0], _ELEMENTS_AT_ONCE):
        # Slices, so that the compiler sees indices that begin at 0 and uses vectors.
        place = slice(begin, begin + _ELEMENTS_AT_ONCE)
        some, of_others, mean = values[place], sums[place], means[place]
        for i in range(some.shape[0]):
            mean[i] = np.float32((of_others[i] + weight * np.float64(some[i])) * share)
        bits = mean.view(np.uint32)
        for i in range(bits.shape[0]):
            largest = max(largest, bits[i] & _EXPONENT)
    return largest < _EXPONENT
