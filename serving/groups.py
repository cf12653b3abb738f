"""Shard groups as a front calls them: the one place that knows Ray Serve's handles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from serving.protocol import GroupHits, GroupQuery, NotLoaded, Refusal, ReplicaState
from serving.router import GroupFailed, ReplicaLost

# A replica that does not answer a question about its versions for this long counts as not ready.
SYNC_TIMEOUT_S = 5.0


class ServeGroup:
    """One shard group behind a deployment handle.

    Args:
        name: the deployment's name.
        handle: its handle.
    """

    def __init__(self, name: str, handle: DeploymentHandle[Any]) -> None:
        self.name = name
        self._handle = handle

    async def search(self, query: GroupQuery) -> GroupHits | Refusal | NotLoaded:
        """One Serve call to one replica."""
        return await self._call("search", query)

    async def score(self, query: GroupQuery, ids: Sequence[str]) -> dict[str, float] | Refusal | NotLoaded:
        """One Serve call to one replica."""
        return await self._call("score", query, list(ids))

    async def sync(self, wanted: Sequence[str]) -> list[ReplicaState]:
        """Asks every running replica; one that does not answer holds nothing, as far as can be told."""
        try:
            answers = await broadcast(self._handle, "sync", list(wanted))
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return [
            answer if isinstance(answer, ReplicaState) else ReplicaState(f"unknown: {answer}")
            for answer in answers
        ]

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
            raise ReplicaLost(str(error)) from error
        except RayTaskError as error:
            # The text of a remote error is its traceback: that belongs in a log, not in an answer.
            cause = error.cause
            raise GroupFailed(f"{type(cause).__name__}: {cause}") from error


async def broadcast(handle: DeploymentHandle[Any], method: str, *arguments: Any) -> list[Any]:
    """Calls a method of every running replica of a deployment.

    ``DeploymentHandle.broadcast`` is young (alpha in Ray 2.60), hence called from here only.

    Returns:
        One result for each replica; the exception for those that failed.

    Raises:
        DeploymentUnavailableError: no replica is running.
        TimeoutError: a replica did not answer.
    """
    response = handle.broadcast(method, *arguments)
    return list(await response.results_async(timeout_s=SYNC_TIMEOUT_S, return_exceptions=True))
