"""A shard group: the shards of one node, opened once per index version and searched over threads."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from serving.errors import REFUSED
from serving.protocol import GroupHits, GroupQuery, NotLoaded, Refusal, ReplicaState
from serving.shards import GroupShards

logger = logging.getLogger("ray.serve")

Answer = TypeVar("Answer")


@dataclass
class _Loading:
    """A version on its way, there, or failed."""

    wanted_at: float
    future: Future[GroupShards]
    failed_at: float | None = field(default=None)


class ShardGroup:
    """The versions that one replica of a group holds, and searches in them.

    Args:
        replica: the replica's id.
        open_version: loads the group's shards of a version; blocking.
        threads: searches that run at once.
        idle_s: a version that no front has asked for this long is let go, if a newer one is wanted. A
            version that failed to load is tried again after this time too.
    """

    def __init__(
        self, replica: str, open_version: Callable[[str], GroupShards], threads: int, idle_s: float
    ) -> None:
        self._replica = replica
        self._open = open_version
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._versions: dict[str, _Loading] = {}
        self._searches = ThreadPoolExecutor(threads, thread_name_prefix="search")
        # One version is read at a time, beside the searches.
        self._loads = ThreadPoolExecutor(1, thread_name_prefix="load")

    def load(self, version: str) -> None:
        """Loads a version and waits for it. A failure is kept, and told by :meth:`sync`."""
        self._want(version).exception()

    async def search(self, query: GroupQuery) -> GroupHits | Refusal | NotLoaded:
        """Searches the group's shards for every query."""
        return await self._answer(query.version, lambda shards: shards.search(query))

    async def score(self, query: GroupQuery, ids: Sequence[str]) -> dict[str, float] | Refusal | NotLoaded:
        """Scores, for the first query, those of the documents that the group has."""
        return await self._answer(query.version, lambda shards: shards.score(query, ids))

    async def sync(self, wanted: Sequence[str]) -> ReplicaState:
        """Notes which versions a front wants, begins to load those that lack, and tells what is there."""
        for version in wanted:
            self._want(version)
        self._drop_idle()
        with self._lock:
            states = {version: _state(loading.future) for version, loading in self._versions.items()}
        return ReplicaState(self._replica, states)

    def close(self) -> None:
        """Stops the threads; a search that runs is finished first."""
        self._loads.shutdown(wait=False, cancel_futures=True)
        self._searches.shutdown(wait=True, cancel_futures=True)

    async def _answer(
        self, version: str, run: Callable[[GroupShards], Answer]
    ) -> Answer | Refusal | NotLoaded:
        future = self._want(version)
        if _state(future) != "ready":
            return NotLoaded(version)
        shards = future.result()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._searches, run, shards)
        except REFUSED as error:
            return Refusal(type(error).__name__, str(error))

    def _want(self, version: str) -> Future[GroupShards]:
        now = monotonic()
        with self._lock:
            loading = self._versions.get(version)
            if loading is not None and loading.future.done() and loading.future.exception() is not None:
                if loading.failed_at is None:
                    loading.failed_at = now
                if now - loading.failed_at > self._idle_s:
                    loading = None
            if loading is None:
                loading = self._versions[version] = _Loading(now, self._loads.submit(self._load, version))
            loading.wanted_at = now
            return loading.future

    def _load(self, version: str) -> GroupShards:
        begin = monotonic()
        try:
            shards = self._open(version)
        except Exception:
            logger.exception("index version %s: cannot be loaded", version)
            raise
        logger.info("index version %s: loaded in %.1f s", version, monotonic() - begin)
        return shards

    def _drop_idle(self) -> None:
        """Lets go of versions that nobody wants any longer, never of the last one that can answer."""
        with self._lock:
            fresh = monotonic() - self._idle_s
            ready = [v for v, loading in self._versions.items() if _state(loading.future) == "ready"]
            if not any(self._versions[version].wanted_at > fresh for version in ready):
                return
            for version, loading in list(self._versions.items()):
                if loading.wanted_at <= fresh and loading.future.done():
                    del self._versions[version]
                    logger.info("index version %s: let go", version)


def _state(future: Future[Any]) -> str:
    if not future.done():
        return "loading"
    error = future.exception()
    return "ready" if error is None else f"failed: {type(error).__name__}: {error}"
