"""What a process keeps of the memory it has used: freed blocks, in huge pages, but few compiled kernels.

Every step of training and encoding allocates and frees activations of tens of megabytes. glibc serves
such blocks by ``mmap`` and returns them at once, so each step faults all its pages in again. Keeping
them makes elementwise operations on large tensors two to three times faster (``docs/experiments.md``).

oneDNN, torch's CPU kernels, compiles a kernel for each shape of a matrix product and keeps 1,024 of them
with their buffers, some 12 MB each. Ragged batches rarely meet a shape again: gigabytes of no use.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable

import psutil

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_INT = 2**31 - 1
# Python's own is 700: while a training worker imports what it needs, that is 1,100 collections of nothing.
NEW_OBJECTS = 20_000
# How far a process may grow beyond the need of a step, and how many steps it takes at least between releases.
GROWTH, LEAST_STEPS = 1.1, 4
# Enough for the layers of one batch, forward and backward, which do share their shapes.
COMPILED_KERNELS = "24"


def keep_freed_memory() -> bool:
    """Makes glibc keep freed blocks, torch ask for huge pages and oneDNN keep few kernels, in this process.

    Runs when :mod:`colbert_core` is imported, since torch and oneDNN read their settings at first use.
    The process then stays at its peak size; ``RAYCOLBERT_KEEP_MEMORY=0`` turns it off.

    Returns:
        Whether the setting was applied; it is not off Linux or without glibc.
    """
    if os.environ.get("RAYCOLBERT_KEEP_MEMORY") == "0" or not sys.platform.startswith("linux"):
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", COMPILED_KERNELS)
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 2**30)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST_INT))


def collect_cycles_rarely() -> None:
    """Makes Python look for unreachable cycles after 20,000 new objects; more, if so set, stays.

    Runs when :mod:`colbert_core` is imported. A worker imports torch, transformers, Ray and DeepSpeed,
    millions of objects that stay: every seventh second of its start went into looking at them.
    """
    youngest, *older = gc.get_threshold()
    if 0 < youngest < NEW_OBJECTS:
        gc.set_threshold(NEW_OBJECTS, *older)


def release_freed_memory() -> None:
    """Returns to the system what this process keeps but does not use, at the end of a stage of work."""
    gc.collect()
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


class GrowthLimit:
    """Releases freed memory between steps of work, once the process has grown by more than they need.

    Activations of ever other sizes leave gaps between what stays, and the process grows beyond the largest
    step's need. Releasing the gaps costs the next step its page faults, a tenth to a quarter of its time.

    Args:
        resident: bytes that the process has in memory.
        release: gives back what is not used.
    """

    def __init__(
        self,
        resident: Callable[[], int] = lambda: int(psutil.Process().memory_info().rss),
        release: Callable[[], None] = release_freed_memory,
    ) -> None:
        self._resident, self._release = resident, release
        self._needed = 0  # the most after the very first steps, and after the first step from each release
        self._first = LEAST_STEPS  # steps from which that is learnt
        self._steps = 0  # since the last release

    def after_step(self) -> bool:
        """Call after each step; returns whether memory was released."""
        self._steps += 1
        now = self._resident()
        if self._steps <= self._first:
            self._needed = max(self._needed, now)
        if self._steps < LEAST_STEPS or now <= GROWTH * self._needed:
            return False
        self._release()
        self._first, self._steps = 1, 0
        return True


def _glibc(name: str) -> Callable[..., int] | None:
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):  # not glibc
        return None
    return function
