"""Compiled sums and means against numpy's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from colbert_core.mean_kernels import add_to_sums, begin_sums, finish_means

LENGTH = 2 * 4096 + 77


def values(seed: int, dtype: str = "<f4") -> np.ndarray:
    """Numbers of very different size, and both zeros."""
    random = np.random.default_rng(seed)
    found = random.standard_normal(LENGTH) * 10.0 ** random.integers(-30, 30, LENGTH)
    found[:2] = 0.0, -0.0
    return found.astype(dtype)


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("shift", [0, 1])
def test_the_bits_are_those_of_rounded_products(dtype: str, shift: int) -> None:
    """Where inputs lie at no multiple of an element's size, too."""
    weights, share = (0.3, 0.7, 2.1), 1 / 3.1
    inputs = []
    for seed in range(3):
        raw = bytearray(shift) + values(seed, dtype).tobytes()
        inputs.append(np.frombuffer(memoryview(raw)[shift:], dtype))
    sums, means = np.empty(LENGTH), np.empty(LENGTH, "<f4")
    begin_sums(inputs[0], weights[0], sums)
    add_to_sums(inputs[1], weights[1], sums)
    assert finish_means(inputs[2], weights[2], sums, share, means)
    first, second, third = (weight * each.astype("<f8") for weight, each in zip(weights, inputs, strict=True))
    expected = ((first + second + third) * share).astype("<f4")
    assert means.tobytes() == expected.tobytes()


@pytest.mark.parametrize("place", [0, 4095, 4096, LENGTH - 1])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_one_mean_that_is_not_finite_is_found(place: int, value: float) -> None:
    stored = np.ones(LENGTH, "<f4")
    stored[place] = value
    sums, means = np.zeros(LENGTH), np.empty(LENGTH, "<f4")
    assert not finish_means(stored, 2.0, sums, 1.0, means)
    stored[place] = -1e38
    assert finish_means(stored, 2.0, sums, 1.0, means)


def test_a_sum_that_begins_with_negative_zero_is_what_is_added() -> None:
    stored, means = values(0), np.empty(LENGTH, "<f4")
    assert finish_means(stored, 1.0, np.full(LENGTH, -0.0), 1.0, means)
    assert means.tobytes() == stored.tobytes()
