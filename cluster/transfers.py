"""Many files moved at once, with a progress bar where somebody is watching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

Result = TypeVar("Result")

_THREADS = 8


def transfer(label: str, sizes: Mapping[str, int], work: Callable[[str], Result]) -> dict[str, Result]:
    """Runs ``work`` on every path, several at a time, the largest first.

    Args:
        label: shown beside the bar.
        sizes: bytes by path.
        work: moves one file.

    Returns:
        The results by path.

    Raises:
        Whatever ``work`` raises first; files not yet begun are then left alone.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        task = progress.add_task(label, total=sum(sizes.values()))

        def run(path: str) -> Result:
            result = work(path)
            progress.advance(task, sizes[path])
            return result

        futures = {path: pool.submit(run, path) for path in sorted(sizes, key=lambda path: -sizes[path])}
        try:
            return {path: future.result() for path, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
