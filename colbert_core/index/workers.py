"""Threads for compiled kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Workers:
    """A fixed number of threads, each of which computes on one core.

    torch would give every calling thread a team of its own, so its products run single-threaded here.
    """

    def __init__(self, threads: int) -> None:
        """Starts the threads.

        Args:
            threads: at least 1.
        """
        self.threads = threads
        # Setting torch's thread count in a thread also changes the default of threads yet to come; it is
        # put back once all workers have passed the barrier.
        barrier = threading.Barrier(threads + 1)
        before = torch.get_num_threads()

        def start() -> None:
            torch.set_num_threads(1)
            barrier.wait()

        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="index", initializer=start)
        for _ in range(threads):
            self._pool.submit(_nothing)
        barrier.wait()
        torch.set_num_threads(before)

    def map(self, functions: Sequence[Callable[[], Result]]) -> list[Result]:
        """Calls the functions on the threads and returns their results in order; must not be nested."""
        futures = [self._pool.submit(function) for function in functions]
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


def _nothing() -> None:
    """Makes the pool start a thread: it starts one with each of its first tasks while none is idle."""
