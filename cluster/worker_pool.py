"""A pool of Ray actors of one class: tasks go to whichever is free, an actor that dies is started again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayTaskError
from rich.console import Console

from cluster.scorers.progress import progress
from colbert_core.errors import RaycolbertError

# Deaths of an actor, and of the task it was at, before the job gives up.
RESTARTS = 3
# After so long without any actor, the user is told what is being waited for.
PATIENCE_S = 30.0


class WorkerPool:
    """Actors for the time of a ``with`` block; they must keep nothing that a fresh one could not find.

    Tasks begin as soon as one actor is up, so that a cluster with room for fewer than ``size`` works with
    those it has, and one that is still growing uses each as it comes.

    Args:
        worker: the class.
        arguments: of its constructor.
        size: how many actors.
        cpus, gpus: what each of them takes.
    """

    def __init__(
        self, worker: type, arguments: Sequence[Any], *, size: int, cpus: float, gpus: float
    ) -> None:
        self._needs = f"{cpus:g} CPUs and {gpus:g} GPUs"
        actor: Any = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=RESTARTS, max_task_retries=RESTARTS
        )(worker)
        self._actors: list[Any] = [actor.remote(*arguments) for _ in range(size)]
        # An actor is up when its first, empty call returns.
        self._starting = {handle.__ray_ready__.remote(): handle for handle in self._actors}
        self._free: list[Any] = []

    def wait(self) -> None:
        """Returns when at least one actor is up."""
        told = False
        while len(self._starting) == len(self._actors):
            up, _ = ray.wait([*self._starting], timeout=PATIENCE_S)
            for reference in up:
                self._greet(reference)
            if not up and not told:
                Console(stderr=True).print(f"waiting for a worker with {self._needs} to start")
                told = True

    def run(
        self, method: str, tasks: Sequence[Any], description: str, *, weights: Sequence[int] | None = None
    ) -> list[Any]:
        """Calls a method of any actor for each task; returns the results in the order of the tasks.

        Args:
            method: name of a method with one argument.
            tasks: the arguments.
            description: shown beside the progress bar.
            weights: how much of the bar each task is; 1 by default.

        Raises:
            RaycolbertError: what a worker raised.
            ray.exceptions.RayError: an actor died too often.
        """
        sizes = weights or [1] * len(tasks)
        results: list[Any] = [None] * len(tasks)
        waiting = deque(enumerate(tasks))
        running: dict[Any, tuple[int, Any]] = {}
        self.wait()
        with progress() as bar:
            row = bar.add_task(description, total=sum(sizes))
            while waiting or running:
                while waiting and self._free:
                    number, task = waiting.popleft()
                    actor = self._free.pop()
                    running[getattr(actor, method).remote(task)] = (number, actor)
                done, _ = ray.wait([*running, *self._starting])
                for reference in done:
                    if reference in self._starting:
                        self._greet(reference)
                        continue
                    number, actor = running.pop(reference)
                    results[number] = result_of(reference)
                    self._free.append(actor)
                    bar.advance(row, sizes[number])
        return results

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def _greet(self, reference: Any) -> None:
        result_of(reference)
        self._free.append(self._starting.pop(reference))


def result_of(reference: Any) -> Any:
    """What a task returned; a typed error that it raised is raised here as it was."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # Ray's own class of the same name carries a page of traceback as its message.
        if isinstance(error.cause, RaycolbertError):
            raise error.cause from None
        raise
