"""Compiled kernels on as many threads as torch has."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any


def on_threads(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], threads: int) -> None:
    """Makes the calls on so many threads, this one among them.

    Args:
        function: lets go of the interpreter's lock, as ``njit(nogil=True)`` does.
        calls: the arguments of each call; given out one by one.
        threads: at least 1.
    """
    waiting = iter(calls)

    def work() -> None:
        for arguments in waiting:  # each is given out once, whoever asks
            function(*arguments)

    helpers = min(threads, len(calls)) - 1
    others = [_helpers(threads, os.getpid()).submit(work) for _ in range(helpers)]
    work()
    for other in others:
        other.result()


@lru_cache(maxsize=4)
def _helpers(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads beside the calling one; a forked process gets its own."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix=f"kernels-{process}")
