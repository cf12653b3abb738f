"""One request to all shard groups: ask them at once, wait no longer than the deadline, say who is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, Protocol, TypeVar

from colbert_core import errors as core_errors
from colbert_core.errors import RaycolbertError, SearchError
from serving.errors import DeadlineExceeded, ShardsUnavailable
from serving.metrics import Metrics
from serving.protocol import FailedShards, GroupHits, GroupQuery, NotLoaded, Refusal, ShardReport

Answer = TypeVar("Answer")
Client = TypeVar("Client", bound="GroupClient")

# Pause before a call is repeated that met a replica without the version, or one that died.
RETRY_S = 0.02


class ReplicaLost(Exception):
    """The replica died or left while it had the call; another one may answer."""


class GroupFailed(Exception):
    """The call failed inside the group; repeating it would not help."""


class GroupClient(Protocol):
    """A shard group as the router sees it."""

    name: str

    async def search(self, query: GroupQuery) -> GroupHits | Refusal | NotLoaded:
        """Searches the group's shards; raises :class:`ReplicaLost` if the replica did not survive it."""

    async def score(self, query: GroupQuery, ids: Sequence[str]) -> dict[str, float] | Refusal | NotLoaded:
        """Scores those of the documents that the group has."""


@dataclass(frozen=True)
class Gathered(Generic[Answer]):
    """The answers that came in time, and a report of those that did not."""

    answers: list[Answer]
    report: ShardReport


class Router:
    """Fans a request out over the shard groups.

    Args:
        groups: the groups, in the order of their numbers.
        deadline_s: how long an answer is waited for.
        metrics: latencies and failures by group.
    """

    def __init__(self, groups: Sequence[GroupClient], deadline_s: float, metrics: Metrics) -> None:
        self.groups = list(groups)
        self._deadline_s = deadline_s
        self._metrics = metrics

    async def ask(
        self,
        call: Callable[[GroupClient], Awaitable[Answer | Refusal | NotLoaded]],
        shards: int,
        *,
        allow_partial: bool,
    ) -> Gathered[Answer]:
        """Calls every group that has shards of the index.

        Args:
            call: one call of one group. It is repeated, until the deadline, when the replica that got it
                lacks the version or dies.
            shards: number of shards of the index.
            allow_partial: answer without the groups that failed, as long as one did not.

        Raises:
            RaycolbertError: a group refused the request.
            DeadlineExceeded: groups were late; none failed otherwise.
            ShardsUnavailable: a group failed.
        """
        assigned = {
            group.name: (group, numbers)
            for position, group in enumerate(self.groups)
            if (numbers := shards_of_group(position, len(self.groups), shards))
        }
        tasks = {
            name: asyncio.create_task(self._until_answered(group, call))
            for name, (group, _) in assigned.items()
        }
        try:
            await asyncio.wait(tasks.values(), timeout=self._deadline_s)
            answers: list[Answer] = []
            failed: list[FailedShards] = []
            late = 0
            for name, task in tasks.items():
                if not task.done():
                    late += 1
                    reason = f"no answer within {self._deadline_s * 1000:.0f} ms"
                    self._metrics.shard_failures.labels(name, "late").inc()
                elif (error := task.exception()) is not None:
                    reason = (
                        str(error) if isinstance(error, GroupFailed) else f"{type(error).__name__}: {error}"
                    )
                    self._metrics.shard_failures.labels(name, "failed").inc()
                elif isinstance(answer := task.result(), Refusal):
                    raise _refused(answer)
                else:
                    answers.append(answer)
                    continue
                failed.append(FailedShards(group=name, shards=assigned[name][1], reason=reason))
        finally:
            for task in tasks.values():
                if not task.cancel() and not task.cancelled():
                    task.exception()  # marks it as seen, where a refusal ended the loop before
        missing = sum(len(group.shards) for group in failed)
        report = ShardReport(ok=shards - missing, total=shards, failed=failed)
        if failed and (not allow_partial or not answers):
            summary = "; ".join(f"{group.group} (shards {group.shards}): {group.reason}" for group in failed)
            message = f"{missing} of {shards} shards did not answer: {summary}"
            raise DeadlineExceeded(message) if late == len(failed) else ShardsUnavailable(message)
        return Gathered(answers, report)

    async def _until_answered(
        self, group: GroupClient, call: Callable[[GroupClient], Awaitable[Answer | Refusal | NotLoaded]]
    ) -> Answer | Refusal:
        begin = perf_counter()
        while True:
            with suppress(ReplicaLost):
                answer = await call(group)
                if not isinstance(answer, NotLoaded):
                    self._metrics.groups.labels(group.name).observe(perf_counter() - begin)
                    return answer
            await asyncio.sleep(RETRY_S)


def shards_of_group(group: int, groups: int, shards: int) -> list[int]:
    """Numbers of the shards that a group serves: every ``groups``-th one, so that no group has two more
    than another. A group beyond the number of shards has none."""
    return list(range(group, shards, groups))


def _refused(refusal: Refusal) -> RaycolbertError:
    """The typed error that a group met, as an error of this process."""
    kind = getattr(core_errors, refusal.type, SearchError)
    return kind(refusal.message)
