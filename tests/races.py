"""Attempts at the same thing at once, of which some are refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def winners(attempt: Callable[[int], object], count: int, refusal: type[Exception]) -> list[int]:
    """Which of the attempts 0 to ``count - 1``, each on a thread of its own, did not raise ``refusal``."""

    def won(number: int) -> bool:
        try:
            attempt(number)
        except refusal:
            return False
        return True

    with ThreadPoolExecutor(count) as pool:
        return [number for number, success in enumerate(pool.map(won, range(count))) if success]
