"""Processes that a test started, with all that those started."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import psutil

STOP_SECONDS = 30


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants; nothing where it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kills what still runs of these, and waits for their end."""
    processes = list(processes)
    for process in processes:
        # Any of them may end between the question and the signal.
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, STOP_SECONDS)
