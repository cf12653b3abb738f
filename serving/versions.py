"""Which index version a front answers from, and how it gets to the next one.

A version lives beside the others: loading one never touches the one that answers. The keeper makes a new
version current only when its model is loaded here and every replica of every shard group says that it is
ready, so no request meets a half-loaded version. Requests keep the version that they began with.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import numpy as np
import torch

from cluster.artifacts import ArtifactRef
from cluster.registry import Registry
from colbert_core.encoder import ColBERT
from colbert_core.errors import IndexFormatError, RaycolbertError
from colbert_core.formats import load_model
from colbert_core.maxsim import maxsim_ragged
from colbert_core.vectors import RaggedVectors
from serving.errors import NotReady, VersionNotServed
from serving.metrics import Metrics
from serving.protocol import GroupHealth, Health, ReplicaState
from serving.shards import shard_paths

logger = logging.getLogger("ray.serve")

# While a new version is loading, its state is asked for this often.
PENDING_POLL_S = 0.1


@dataclass(frozen=True, eq=False)
class ServedVersion:
    """An index version as a front needs it.

    Attributes:
        ref: the index version.
        model: encodes queries for this index.
        shards: number of shards of the index.
    """

    ref: ArtifactRef
    model: ColBERT
    shards: int

    def encode_queries(self, texts: list[str]) -> list[np.ndarray]:
        """fp32 vectors ``[length, dim]`` of each query."""
        return [vectors.numpy() for vectors in self.model.encode_queries(texts)]

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """fp32 vectors ``[length, dim]`` of each document."""
        return [vectors.numpy() for vectors in self.model.encode_documents(texts)]


def load_served(registry: Registry, ref: ArtifactRef) -> ServedVersion:
    """Loads the model that an index was encoded with.

    Raises:
        ArtifactNotFound: the index or its model is not published.
        IndexFormatError: the index has no shards, or not exactly one model.
        IntegrityError, ModelError: the model cannot be loaded.
    """
    manifest = registry.manifest(ref)
    models = [parent.ref for parent in manifest.parents if parent.ref.kind == "models"]
    if len(models) != 1:
        raise IndexFormatError(f"{ref}: its manifest names {len(models)} models; an index has exactly one")
    shards = len(shard_paths(registry, ref))
    directory = registry.pull(models[0])
    with registry.cache.released_on_error(directory):
        model = load_model(directory)
        _warm(model)
    served = ServedVersion(ref, model, shards)
    weakref.finalize(served, registry.cache.release, directory)
    return served


def _warm(model: ColBERT) -> None:
    """Compiles or loads the kernel of a rerank, so that no request waits for that."""
    vector = torch.zeros(1, model.config.dim)
    maxsim_ragged(vector, RaggedVectors(vector, torch.tensor([1])))


class SyncedGroup(Protocol):
    """What the keeper asks of a shard group."""

    name: str

    async def sync(self, wanted: Sequence[str]) -> list[ReplicaState]:
        """Tells every replica which versions are wanted, and returns what each holds."""


class VersionKeeper:
    """Holds the versions of one front and moves on to new ones.

    Args:
        resolve: the version that the configured alias names now; blocking.
        load: loads what a front needs of a version; blocking.
        groups: the shard groups.
        metrics: counts swaps and failures.
        poll_s: how often ``resolve`` is asked.
        grace_s: how long a version stays loaded after it was replaced.
    """

    def __init__(
        self,
        resolve: Callable[[], ArtifactRef],
        load: Callable[[ArtifactRef], ServedVersion],
        groups: Sequence[SyncedGroup],
        metrics: Metrics,
        *,
        poll_s: float,
        grace_s: float,
    ) -> None:
        self._resolve = resolve
        self._load = load
        self._groups = groups
        self._metrics = metrics
        self._poll_s = poll_s
        self._grace_s = grace_s
        self._current: ServedVersion | None = None
        self._candidate: ServedVersion | None = None
        self._retired: dict[str, tuple[ServedVersion, float]] = {}
        self._problem: str | None = None
        self._first = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def served(self, version: str | None = None) -> ServedVersion:
        """The current version, or another one that is still loaded.

        Raises:
            NotReady: nothing is ready yet.
            VersionNotServed: the version is not loaded; the message names those that are.
        """
        if self._current is None:
            raise NotReady(self._problem or "no index version is ready yet; try again in a moment")
        if version is None or version == self._current.ref.version:
            return self._current
        if version in self._retired:
            return self._retired[version][0]
        there = ", ".join([self._current.ref.version, *self._retired])
        raise VersionNotServed(f"index version {version!r} is not served; there are: {there}")

    async def start(self, patience_s: float) -> None:
        """Begins to follow the alias; returns when a first version is ready, or when patience ends."""
        self._task = asyncio.create_task(self._follow())
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._first.wait(), patience_s)

    def close(self) -> None:
        """Stops following the alias."""
        if self._task is not None:
            self._task.cancel()

    async def health(self, timeout_s: float) -> Health:
        """Asks every replica of every group whether it can answer for the current version."""
        current = self._current
        groups = []
        for group in self._groups:
            try:
                states = await asyncio.wait_for(group.sync(self._wanted()), timeout_s)
                problem = None
            except Exception as error:
                states, problem = [], _reason(error, timeout_s)
            version = current.ref.version if current else ""
            ready = sum(state.versions.get(version) == "ready" for state in states)
            groups.append(GroupHealth(name=group.name, replicas=len(states), ready=ready, problem=problem))
        complete = current is not None and all(group.ready > 0 for group in groups)
        return Health(
            status="ok" if complete else "starting" if current is None else "degraded",
            index=current.ref.name if current else "",
            version=current.ref.version if current else None,
            groups=groups,
            pending_version=self._candidate.ref.version if self._candidate else None,
            problem=self._problem,
        )

    async def step(self) -> None:
        """Looks the alias up once, and does what can be done about it without waiting.

        Groups hear at every step which versions are wanted; a version that no front wants any longer is
        let go by the groups themselves.
        """
        problem = None
        try:
            await self._prepare(await asyncio.to_thread(self._resolve))
        except Exception as error:
            problem = self._note(error)
        try:
            states = await asyncio.gather(*(group.sync(self._wanted()) for group in self._groups))
            self._flip_if_ready(states)
        except Exception as error:
            problem = self._note(error)
        self._problem = problem
        for version, (_, until) in list(self._retired.items()):
            if monotonic() > until:
                index = self._retired.pop(version)[0].ref.name
                with suppress(KeyError):
                    self._metrics.version.remove(index, version)

    async def _follow(self) -> None:
        while True:
            await self.step()
            loading = self._candidate is not None and self._problem is None
            await asyncio.sleep(min(PENDING_POLL_S, self._poll_s) if loading else self._poll_s)

    def _note(self, error: Exception) -> str:
        """Logs a failure once. The version that answers goes on answering; the next step tries again."""
        message = f"{type(error).__name__}: {error}"
        if message != self._problem:
            logger.warning("index version: %s", message, exc_info=not isinstance(error, RaycolbertError))
            self._metrics.load_failures.inc()
        return message

    async def _prepare(self, target: ArtifactRef) -> None:
        """Makes ``target`` the candidate, unless it is current already."""
        if self._current is not None and target == self._current.ref:
            self._candidate = None
        elif self._candidate is None or target != self._candidate.ref:
            retired = self._retired.get(target.version)
            self._candidate = None
            self._candidate = retired[0] if retired else await asyncio.to_thread(self._load, target)

    def _flip_if_ready(self, states: Sequence[Sequence[ReplicaState]]) -> None:
        if self._candidate is None:
            return
        version = self._candidate.ref.version
        for group, replicas in zip(self._groups, states, strict=True):
            for replica in replicas:
                state = replica.versions.get(version, "missing")
                if state.startswith("failed"):
                    raise NotReady(f"{group.name} cannot load {version}: {state}")
            if not replicas or any(replica.versions.get(version) != "ready" for replica in replicas):
                return
        if self._current is not None:
            old = self._current
            self._retired[old.ref.version] = (old, monotonic() + self._grace_s)
            self._metrics.version.labels(old.ref.name, old.ref.version).set(0)
            self._metrics.swaps.inc()
        self._retired.pop(version, None)
        self._current, self._candidate = self._candidate, None
        self._metrics.version.labels(self._current.ref.name, version).set(1)
        self._first.set()
        logger.info("index version: now %s", self._current.ref)

    def _wanted(self) -> list[str]:
        versions = [version for version in (self._current, self._candidate) if version is not None]
        return [*(version.ref.version for version in versions), *self._retired]


def _reason(error: Exception, timeout_s: float) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return f"no answer within {timeout_s:g} s"
    return f"{type(error).__name__}: {error}".splitlines()[0]
