"""Version swaps: when a front flips, what it keeps, and what a failure leaves untouched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from cluster.artifacts import ArtifactRef
from colbert_core.encoder import ColBERT
from colbert_core.errors import StorageError
from serving.errors import NotReady, VersionNotServed
from serving.metrics import Metrics
from serving.protocol import ReplicaState
from serving.versions import ServedVersion, VersionKeeper


class Group:
    """A group whose replicas hold what the test says."""

    def __init__(self, name: str, *replicas: dict[str, str]) -> None:
        self.name = name
        self.replicas = list(replicas)
        self.wanted: list[str] = []
        self.seconds = 0.0

    async def sync(self, wanted: Sequence[str]) -> list[ReplicaState]:
        await asyncio.sleep(self.seconds)
        self.wanted = list(wanted)
        return [ReplicaState(str(number), dict(state)) for number, state in enumerate(self.replicas)]


class World:
    """An alias, and what loading a version does."""

    def __init__(self, *groups: Group, grace_s: float = 60.0) -> None:
        self.alias = "v1"
        self.resolve_error: Exception | None = None
        self.load_error: Exception | None = None
        self.loads: list[str] = []
        self.metrics = Metrics()
        self.keeper = VersionKeeper(
            self._resolve, self._load, groups, self.metrics, poll_s=0.05, grace_s=grace_s
        )

    def _resolve(self) -> ArtifactRef:
        if self.resolve_error:
            raise self.resolve_error
        return ArtifactRef("indexes", "news", self.alias)

    def _load(self, ref: ArtifactRef) -> ServedVersion:
        self.loads.append(ref.version)
        if self.load_error:
            raise self.load_error
        return ServedVersion(ref, cast(ColBERT, None), shards=2)

    @property
    def current(self) -> str:
        return self.keeper.served().ref.version


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(scenario())


def test_nothing_is_served_before_every_replica_of_every_group_is_ready() -> None:
    one, two = Group("g0", {"v1": "ready"}), Group("g1", {"v1": "ready"}, {"v1": "loading"})
    world = World(one, two)

    async def scenario() -> None:
        await world.keeper.step()
        with pytest.raises(NotReady, match="no index version is ready"):
            world.keeper.served()
        assert (await world.keeper.health(1.0)).status == "starting"
        two.replicas[1] = {"v1": "ready"}
        await world.keeper.step()
        assert world.current == "v1"
        assert (await world.keeper.health(1.0)).status == "ok"

    run(scenario)


def test_a_group_without_replicas_is_not_ready() -> None:
    group = Group("g0")
    world = World(group)

    async def scenario() -> None:
        await world.keeper.step()
        with pytest.raises(NotReady):
            world.keeper.served()

    run(scenario)


def test_a_new_version_is_asked_for_beside_the_old_one_and_flips_when_ready() -> None:
    groups = [Group("g0", {"v1": "ready"}), Group("g1", {"v1": "ready"})]
    world = World(*groups)

    async def scenario() -> None:
        await world.keeper.step()
        before = world.keeper.served()
        world.alias = "v2"
        await world.keeper.step()
        assert world.current == "v1"
        assert set(groups[0].wanted) == {"v1", "v2"}
        assert (await world.keeper.health(1.0)).pending_version == "v2"
        for group in groups:
            group.replicas[0]["v2"] = "ready"
        await world.keeper.step()
        assert world.current == "v2"
        # Requests that began with the old version, and those that name it, still get it.
        assert world.keeper.served("v1") is before
        assert world.loads == ["v1", "v2"]
        sample = world.metrics.registry.get_sample_value
        assert sample("raycolbert_version_swaps_total") == 1
        assert sample("raycolbert_index_version", {"index": "news", "version": "v2"}) == 1
        assert sample("raycolbert_index_version", {"index": "news", "version": "v1"}) == 0

    run(scenario)


def test_the_old_version_goes_after_the_grace_time() -> None:
    group = Group("g0", {"v1": "ready", "v2": "ready"})
    world = World(group, grace_s=0.0)

    async def scenario() -> None:
        await world.keeper.step()
        world.alias = "v2"
        await world.keeper.step()
        await asyncio.sleep(0.01)
        await world.keeper.step()
        with pytest.raises(VersionNotServed, match="'v1' is not served; there are: v2"):
            world.keeper.served("v1")
        assert group.wanted == ["v2"]
        labels = {"index": "news", "version": "v1"}
        assert world.metrics.registry.get_sample_value("raycolbert_index_version", labels) is None

    run(scenario)


def test_a_rollback_within_the_grace_time_loads_nothing_again() -> None:
    group = Group("g0", {"v1": "ready", "v2": "ready"})
    world = World(group)

    async def scenario() -> None:
        for alias in ("v1", "v2", "v1"):
            world.alias = alias
            await world.keeper.step()
        assert world.current == "v1"
        assert world.loads == ["v1", "v2"]

    run(scenario)


@pytest.mark.parametrize("where", ["resolve", "load", "group"])
def test_a_failure_leaves_the_version_that_answers_untouched_and_is_told(where: str) -> None:
    group = Group("g0", {"v1": "ready"})
    world = World(group)

    async def scenario() -> None:
        await world.keeper.step()
        world.alias = "v2"
        if where == "resolve":
            world.resolve_error = StorageError("no connection")
        elif where == "load":
            world.load_error = StorageError("no connection")
        else:
            group.replicas[0]["v2"] = "failed: StorageError: no connection"
        for _ in range(2):
            await world.keeper.step()
        assert world.current == "v1"
        assert "v1" in group.wanted, "groups must hear that the old version is wanted, whatever fails"
        health = await world.keeper.health(1.0)
        assert health.status == "ok" and "no connection" in str(health.problem)
        assert world.metrics.registry.get_sample_value("raycolbert_version_load_failures_total") == 1
        world.resolve_error = world.load_error = None
        group.replicas[0]["v2"] = "ready"
        await world.keeper.step()
        assert world.current == "v2"
        assert (await world.keeper.health(1.0)).problem is None

    run(scenario)


def test_a_candidate_that_the_alias_left_is_dropped() -> None:
    group = Group("g0", {"v1": "ready"})
    world = World(group)

    async def scenario() -> None:
        await world.keeper.step()
        for alias in ("v2", "v1"):
            world.alias = alias
            await world.keeper.step()
        assert group.wanted == ["v1"]
        assert (await world.keeper.health(1.0)).pending_version is None

    run(scenario)


def test_health_names_a_group_that_does_not_answer() -> None:
    groups = [Group("g0", {"v1": "ready"}), Group("g1", {"v1": "ready"})]
    world = World(*groups)

    async def scenario() -> None:
        await world.keeper.step()
        groups[1].seconds = 5.0
        health = await world.keeper.health(0.05)
        assert health.status == "degraded"
        assert [group.ready for group in health.groups] == [1, 0]
        assert health.groups[1].problem == "no answer within 0.05 s"

    run(scenario)


def test_start_follows_the_alias_and_waits_for_the_first_version() -> None:
    group = Group("g0", {"v1": "loading"})
    world = World(group)

    async def scenario() -> None:
        asyncio.get_running_loop().call_later(0.2, group.replicas[0].update, {"v1": "ready", "v2": "ready"})
        await world.keeper.start(patience_s=10.0)
        assert world.current == "v1"
        world.alias = "v2"
        for _ in range(100):
            await asyncio.sleep(0.02)
            if world.current == "v2":
                break
        assert world.current == "v2"
        world.keeper.close()

    run(scenario)
