"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# Seconds between two lines; work that takes less has none.
PRINT_S = 30.0


def progress() -> Progress:
    """On standard error: what is done, how much of it, and the time left."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if console.is_terminal:
        return Progress(*columns, console=console, transient=True)
    return _Lines(*columns, console=console, disable=True)


class _Lines(Progress):
    """For logs of batch jobs. An actor keeps still: whoever gives it work says how far that is."""

    def __init__(self, *columns: Any, **settings: Any) -> None:
        super().__init__(*columns, **settings)
        self._told = time.monotonic()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        if time.monotonic() - self._told < PRINT_S:
            return
        self._told = time.monotonic()
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
            return
        task = next(each for each in self.tasks if each.id == task_id)
        left = task.time_remaining
        known = "" if left is None else f", {timedelta(seconds=round(left))} left"
        text = f"{task.description}: {task.completed:,.0f} of {task.total or 0:,.0f}{known}"
        self.console.print(text, highlight=False, markup=False)
