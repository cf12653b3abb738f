"""The residual quantiser: a uniform grid of 2^bits levels per dimension, and two scales per vector."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

# Steps of the uniform quantiser with the least mean squared error for a normal variable of variance 1
# (Max, "Quantizing for minimum distortion", 1960). With 8 bits the step is such that the largest
# component just fits: that is finer for most vectors, and clips none.
STEP = {2: 0.9957, 4: 0.3352, 8: 0.0}


def unpack_levels(residuals: NDArray[np.uint8], bits: int, width: int) -> NDArray[np.int8]:
    """Levels int8 ``[n, width]`` of packed residuals uint8 ``[n, width * bits / 8]``.

    Byte j of a row holds dimensions j, j + stride, …, lowest bits first, with stride = width · bits / 8:
    unpacking is the same shift for a whole run of bytes.
    """
    if bits == 8:
        return (residuals.astype(np.int16) - 128).astype(np.int8)
    codes = [(residuals >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return (2 * np.concatenate(codes, axis=1).astype(np.int16) - ((1 << bits) - 1)).astype(np.int8)


def factor_tables(
    lengths: NDArray[np.float32], residual_factors: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The 256 values each that a vector's two scale bytes choose from.

    Both are spaced evenly over what the sample asks for and a little more; residual factors begin at 0,
    for the vectors that are centroids.
    """
    length_table = np.linspace(max(lengths.min() * 0.98, 1e-6), max(lengths.max() * 1.02, 2e-6), 256)
    factor_table = np.linspace(0, max(residual_factors.max() * 1.1, 1e-9), 256)
    return length_table.astype(np.float32), factor_table.astype(np.float32)


def pack_levels(levels: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Inverse of :func:`unpack_levels`."""
    if bits == 8:
        return (levels.astype(np.int16) + 128).astype(np.uint8)
    codes = ((levels.astype(np.int16) + ((1 << bits) - 1)) >> 1).astype(np.uint8)
    packed: NDArray[Any] = np.zeros((len(levels), levels.shape[1] * bits // 8), dtype=np.uint8)
    for part, shift in enumerate(range(0, 8, bits)):
        packed |= codes[:, part * packed.shape[1] : (part + 1) * packed.shape[1]] << shift
    return packed


@njit(nogil=True, cache=True)
def fit_levels(rotated, nearest, centroids, centroid_scale, step, bits, levels, norms, factors):  # type: ignore[no-untyped-def]
    """Rounds residuals to levels and finds the least-squares scale of each.

    Args:
        rotated: float32 ``[n, width]``.
        nearest: uint32 ``[n]``, the centroid of each.
        centroids: int8 ``[K, width]``, in units of ``centroid_scale``.
        step: the grid's step for residuals of variance 1; not used with 8 bits.
        bits: 2, 4 or 8.
        levels: int8 ``[n, width]``, written: odd numbers within ±(2^bits − 1) for 2 and 4 bits; whole
            numbers within ±127 for 8.
        norms: float32 ``[n]``, written: lengths of the residuals.
        factors: float32 ``[n]``, written: ``<residual, levels> / <levels, levels>``.
    """
    width = rotated.shape[1]
    residual = np.empty(width, np.float32)
    half = np.float32(1 << (bits - 1))
    for i in range(rotated.shape[0]):
        centroid = nearest[i]
        square = np.float32(0)
        for k in range(width):
            residual[k] = rotated[i, k] - centroid_scale * np.float32(centroids[centroid, k])
        for k in range(width):
            square += residual[k] * residual[k]
        norms[i] = np.sqrt(square)
        size = step * norms[i] / np.sqrt(np.float32(width))
        inverse = np.float32(1) / size if size > 0 else np.float32(0)
        if bits == 8:
            largest = np.float32(0)
            for k in range(width):
                largest = max(largest, abs(residual[k]))
            inverse = np.float32(127) / largest if largest > 0 else np.float32(0)
            for k in range(width):
                value = np.rint(residual[k] * inverse)
                levels[i, k] = np.int8(np.int32(min(max(value, np.float32(-127)), np.float32(127))))
        else:
            for k in range(width):
                value = np.floor(residual[k] * inverse)
                value = min(max(value, -half), half - np.float32(1))
                levels[i, k] = np.int8(2 * np.int32(value) + 1)
        dot = np.float32(0)
        squares = np.int32(0)
        for k in range(width):
            level = np.int32(levels[i, k])
            squares += level * level
        for k in range(width):
            dot += residual[k] * np.float32(levels[i, k])
        factors[i] = dot / np.float32(squares) if squares > 0 else np.float32(0)


@njit(nogil=True, cache=True)
def fit_lengths(rotated, nearest, centroids, centroid_scale, levels, factors, lengths):  # type: ignore[no-untyped-def]
    """What ``centroid + factor · levels`` must be multiplied by to have the vector's length.

    Args:
        rotated, nearest, centroids, centroid_scale, levels, factors: as for :func:`fit_levels`.
        lengths: float32 ``[n]``, written; 1 where the rounded vector is 0.
    """
    width = rotated.shape[1]
    for i in range(rotated.shape[0]):
        centroid = nearest[i]
        wanted = np.float32(0)
        found = np.float32(0)
        for k in range(width):
            value = centroid_scale * np.float32(centroids[centroid, k]) + factors[i] * np.float32(
                levels[i, k]
            )
            found += value * value
            wanted += rotated[i, k] * rotated[i, k]
        lengths[i] = np.sqrt(wanted / found) if found > 0 else np.float32(1)


def nearest_entry(table: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Numbers of the entries of an ascending ``table[256]`` that lie nearest to ``values[n]``."""
    middles = (table[1:] + table[:-1]) / np.float32(2)
    return np.searchsorted(middles, values).astype(np.uint8)
