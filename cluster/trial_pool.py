"""Runs pieces of work on the cluster, so many at once, each in steps with resources of their own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cluster.storage import ObjectStore
from cluster.training_log import figures_of, read_progress
from colbert_core.errors import RaycolbertError, TrainingError

POLL_S = 1.0


@dataclass(frozen=True)
class Step:
    """One Ray task.

    Attributes:
        task: what it calls.
        arguments: with what.
        claims: options of the task: ``num_cpus``, ``num_gpus``.
    """

    task: Callable[..., None]
    arguments: tuple[Any, ...]
    claims: Mapping[str, float]


@dataclass
class Work:
    """Steps that run one after the other.

    Attributes:
        name: what to call it.
        steps: those that are left.
        run: the training run whose progress is shown while more than the last step is left, or None.
        trains: the training runs that it makes, all before its last step. One process at a time may make a
            run, so what has one in common with running work waits for it.
    """

    name: str
    steps: list[Step]
    run: str | None = None
    trains: frozenset[str] = frozenset()
    begun: float = field(default=0.0, init=False)

    def start(self) -> ray.ObjectRef[Any]:
        """Submits the next step."""
        step = self.steps.pop(0)
        return ray.remote(step.task).options(**step.claims).remote(*step.arguments)


def run_all(
    work: Sequence[Work], at_once: int, store: ObjectStore, console: Console | None = None
) -> dict[str, str]:
    """Runs all work, at most ``at_once`` pieces together, in the order given.

    A piece whose step raises :class:`TrainingError`, or whose process dies, ends there, and the others go on.

    Args:
        work: what to run; its steps are used up.
        at_once: how many pieces run together.
        store: where training runs leave their progress.
        console: where progress is shown; default: standard error.

    Returns:
        The names of the pieces that failed, with why.

    Raises:
        RaycolbertError: any other typed error of a step, as it was raised there; what still runs is
            cancelled.
    """
    waiting, running = deque(work), dict[ray.ObjectRef[Any], Work]()
    failed: dict[str, str] = {}
    with _Display(len(work), store, console or Console(stderr=True)) as display:
        try:
            while waiting or running:
                while len(running) < at_once and (item := next_of(waiting, running.values())) is not None:
                    display.begin(item)
                    running[item.start()] = item
                ready, _ = ray.wait(list(running), timeout=POLL_S)
                for reference in ready:
                    item = running.pop(reference)
                    if reason := _failure(reference):
                        failed[item.name] = reason
                        item.steps.clear()
                    if item.steps:
                        running[item.start()] = item
                    else:
                        display.end(item, failed.get(item.name))
                display.update(running.values())
        finally:
            for reference in running:
                ray.cancel(reference)
    return failed


def next_of(waiting: deque[Work], running: Collection[Work]) -> Work | None:
    """Takes the first work that makes no training run which running work makes, if there is any."""
    busy = frozenset[str]().union(*(item.trains for item in running if item.steps))
    for item in waiting:
        if item.trains.isdisjoint(busy):
            waiting.remove(item)
            return item
    return None


def _failure(reference: ray.ObjectRef[Any]) -> str | None:
    """Why a finished step failed in training, or None; raises what else it raised."""
    try:
        ray.get(reference)
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, TrainingError):
            return str(cause)
        if isinstance(cause, RaycolbertError):
            raise cause from None
        raise
    except RayError as error:
        # Its process was killed, for want of memory say, or its node died: the others can go on.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


class _Display:
    """A bar over all work and a line for each piece that runs; without a terminal, a line as each ends."""

    def __init__(self, total: int, store: ObjectStore, console: Console) -> None:
        self._store, self._console = store, console
        self._lines: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._all = self._progress.add_task("[bold]trials and references", total=total, figures="")
        self._total, self._ended = total, 0

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, item: Work) -> None:
        item.begun = time.monotonic()
        self._lines[item.name] = self._progress.add_task(item.name, total=None, figures="")

    def update(self, running: Iterable[Work]) -> None:
        for item in running:
            latest = read_progress(self._store, f"runs/{item.run}/") if item.run and item.steps else None
            if latest is not None:
                self._progress.update(
                    self._lines[item.name],
                    total=latest["steps"],
                    completed=latest["step"],
                    figures=figures_of(latest),
                )

    def end(self, item: Work, failure: str | None) -> None:
        self._ended += 1
        self._progress.remove_task(self._lines.pop(item.name))
        self._progress.advance(self._all)
        text = f"failed: {failure}" if failure else "done"
        self._console.print(
            f"{self._ended} of {self._total}: {item.name}: {text} ({time.monotonic() - item.begun:.0f} s)",
            highlight=False,
        )
