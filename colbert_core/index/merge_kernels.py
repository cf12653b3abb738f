"""Compiled kernels of merging: which of one group's documents could be among the best of all groups."""

from __future__ import annotations

import numpy as np

from colbert_core.index.kernels import jit


@jit
def best_of_prefixes(order, values, keep, kept):  # type: ignore[no-untyped-def]
    """Marks the items that are among the ``keep`` best of some prefix of an order.

    Args:
        order: int64 ``[n]``, descending; equal ones enter a prefix together.
        values: int64 ``[n]``; an item is among the best if fewer than ``keep`` have a larger value.
        keep: at least 1.
        kept: bool ``[n]``, written.
    """
    n = order.shape[0]
    heap = np.empty(keep, np.int64)  # min-heap of the largest values so far
    size = 0
    start = 0
    while start < n:
        stop = start + 1
        while stop < n and order[stop] == order[start]:
            stop += 1
        for j in range(start, stop):
            value = values[j]
            if size < keep:
                at = size
                size += 1
                while at > 0 and heap[(at - 1) // 2] > value:
                    heap[at] = heap[(at - 1) // 2]
                    at = (at - 1) // 2
                heap[at] = value
            elif value > heap[0]:
                at = 0
                while True:
                    child = 2 * at + 1
                    if child >= size:
                        break
                    if child + 1 < size and heap[child + 1] < heap[child]:
                        child += 1
                    if heap[child] >= value:
                        break
                    heap[at] = heap[child]
                    at = child
                heap[at] = value
        for j in range(start, stop):
            kept[j] = size < keep or values[j] >= heap[0]
        start = stop


@jit
def not_outranked(first, second, scores, keep, kept):  # type: ignore[no-untyped-def]
    """Marks the items over which fewer than ``keep`` others win.

    An item wins over another by a larger score, with both keys at least as large.

    Args:
        first, second: int64 ``[n]``.
        scores: float32 ``[n]``.
        keep: at least 1.
        kept: bool ``[n]``, written.
    """
    n = first.shape[0]
    for i in range(n):
        wins = 0
        for j in range(n):
            wins += (first[j] >= first[i]) & (second[j] >= second[i]) & (scores[j] > scores[i])
        kept[i] = wins < keep
