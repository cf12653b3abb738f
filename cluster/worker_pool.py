"""A pool of Ray actors of one class: tasks go to whichever is free, an actor that dies is replaced."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError
from rich.console import Console

from cluster.progress import progress
from colbert_core.errors import RaycolbertError

# Deaths of an actor, and of the task it was at, before the job gives up.
RESTARTS = 3
# After so long without any actor, the user is told what is being waited for.
PATIENCE_S = 30.0
# What a call raises whose actor, or whose actor's node, has died.
_DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError)


class WorkerPool:
    """Actors for the time of a ``with`` block; they must keep nothing that a fresh one could not find.

    Tasks begin as soon as one actor is up, so that a cluster with room for fewer than ``size`` works with
    those it has, and one that is still growing uses each as it comes. The task of an actor that dies goes to
    another one: Ray's own restarts would keep it for the same actor, which waits for ever if its node died
    and no other has room.

    Args:
        worker: the class.
        arguments: of its constructor.
        size: how many actors.
        cpus, gpus: what each of them takes.

    Attributes:
        actors: those that are up, and those that are starting.
    """

    def __init__(
        self, worker: type, arguments: Sequence[Any], *, size: int, cpus: float, gpus: float
    ) -> None:
        self._needs = f"{cpus:g} CPUs and {gpus:g} GPUs"
        self._class: Any = ray.remote(num_cpus=cpus, num_gpus=gpus)(worker)
        self._arguments = arguments
        self._replacements = RESTARTS * size
        self.actors: list[Any] = []
        # An actor is up when its first, empty call returns.
        self._starting: dict[Any, Any] = {}
        self._free: list[Any] = []
        for _ in range(size):
            self._start()

    def wait(self) -> None:
        """Returns when at least one actor is up."""
        told = False
        while len(self._starting) == len(self.actors):
            up, _ = ray.wait([*self._starting], timeout=PATIENCE_S)
            for reference in up:
                self._greet(reference)
            if not up and not told:
                Console(stderr=True).print(f"waiting for a worker with {self._needs} to start")
                told = True

    def run(
        self, method: str, tasks: Sequence[Any], description: str, *, weights: Sequence[int] | None = None
    ) -> list[Any]:
        """The results of :meth:`map`, in the order of the tasks."""
        results: list[Any] = [None] * len(tasks)
        for number, result in self.map(method, tasks, description, weights=weights):
            results[number] = result
        return results

    def map(
        self, method: str, tasks: Sequence[Any], description: str, *, weights: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Calls a method of any actor for each task; yields numbers of tasks and their results as they come.

        Args:
            method: name of a method with one argument.
            tasks: the arguments.
            description: shown beside the progress bar.
            weights: how much of the bar each task is; 1 by default.

        Raises:
            RaycolbertError: what a worker raised.
            ray.exceptions.RayError: actors died too often, or each that a task was given to.
        """
        sizes = weights or [1] * len(tasks)
        waiting = deque(range(len(tasks)))
        running: dict[Any, tuple[int, Any]] = {}
        deaths: Counter[int] = Counter()
        with progress() as bar:
            row = bar.add_task(description, total=sum(sizes))
            while waiting or running:
                if not running:
                    self.wait()
                while waiting and self._free:
                    number, actor = waiting.popleft(), self._free.pop()
                    running[getattr(actor, method).remote(tasks[number])] = (number, actor)
                done, _ = ray.wait([*running, *self._starting])
                for reference in done:
                    if reference in self._starting:
                        self._greet(reference)
                        continue
                    number, actor = running.pop(reference)
                    try:
                        result = result_of(reference)
                    except _DEATHS as death:
                        deaths[number] += 1
                        if deaths[number] > RESTARTS:
                            raise
                        self._replace(actor, death)
                        waiting.appendleft(number)
                        continue
                    self._free.append(actor)
                    bar.advance(row, sizes[number])
                    yield number, result

    def ask(self, method: str, argument: Any) -> list[Any]:
        """What a method of each actor that is up returns; none may be at work."""
        asked = [(actor, getattr(actor, method).remote(argument)) for actor in self._free]
        answers = []
        for actor, reference in asked:
            try:
                answers.append(result_of(reference))
            except _DEATHS as death:
                self._free.remove(actor)
                self._replace(actor, death)
        return answers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _start(self) -> None:
        actor = self._class.remote(*self._arguments)
        self.actors.append(actor)
        self._starting[actor.__ray_ready__.remote()] = actor

    def _greet(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            result_of(reference)
        except _DEATHS as death:
            self._replace(actor, death)
        else:
            self._free.append(actor)

    def _replace(self, actor: Any, death: Exception) -> None:
        """Starts another actor for one that died, while there are not too many of these."""
        self.actors.remove(actor)
        ray.kill(actor)  # it may be out of reach only
        if not self._replacements:
            raise death
        self._replacements -= 1
        self._start()


def result_of(reference: Any) -> Any:
    """What a task returned; a typed error that it raised is raised here as it was."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        # Ray's own class of the same name carries a page of traceback as its message.
        if isinstance(error.cause, RaycolbertError):
            raise error.cause from None
        raise
