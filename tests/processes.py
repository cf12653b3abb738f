"""Processes that a test starts, with all that those start."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from typing import Any

import psutil

STOP_SECONDS = 30

# Forks from a process that has done nothing but import: each start would cost seconds of imports otherwise.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["jobs.compact_index", "jobs.update_index"])


def begun(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Starts a process that does some work, and returns when the work first sets the event it gets last."""
    begin = _SERVER.Event()
    process = _SERVER.Process(target=work, args=(*arguments, begin))
    process.start()
    while not begin.wait(0.1):
        assert process.is_alive(), f"ended with {process.exitcode} before it began"
    return process


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
