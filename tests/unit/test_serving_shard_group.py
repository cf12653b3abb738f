"""What a replica of a shard group loads, keeps and lets go, and how it answers for what it lacks."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any, cast

import pytest

from colbert_core.errors import IndexFormatError, SearchError
from serving.protocol import GroupQuery, NotLoaded, Refusal
from serving.shard_group import ShardGroup


class Shards:
    """An opened version that answers with its own name, or raises."""

    def __init__(self, version: str, error: Exception | None = None) -> None:
        self.version = version
        self._error = error

    def search(self, query: GroupQuery) -> Any:
        if self._error:
            raise self._error
        return self.version, threading.get_ident()


class Store:
    """Opens versions; each may be held back, or fail."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.search_error: Exception | None = None

    def open(self, version: str) -> Any:
        self.opened.append(version)
        if version in self.gates:
            assert self.gates[version].wait(10)
        if version in self.errors:
            raise self.errors[version]
        return Shards(version, self.search_error)

    def group(self, idle_s: float = 60.0) -> ShardGroup:
        return ShardGroup("replica-1", self.open, threads=2, idle_s=idle_s)


def query(version: str) -> GroupQuery:
    return cast(GroupQuery, type("Query", (), {"version": version})())


async def states(group: ShardGroup, *wanted: str) -> dict[str, str]:
    return (await group.sync(wanted)).versions


async def until_ready(group: ShardGroup, version: str) -> None:
    for _ in range(200):
        if (await states(group, version))[version] == "ready":
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{version} did not become ready")


def test_a_version_that_was_loaded_answers_from_a_search_thread() -> None:
    store = Store()
    group = store.group()
    group.load("v1")
    version, thread = asyncio.run(group.search(query("v1")))
    assert version == "v1"
    assert thread != threading.get_ident()


def test_a_missing_version_is_reported_at_once_and_loaded_beside_the_old_one() -> None:
    store = Store()
    store.gates["v2"] = threading.Event()
    group = store.group()
    group.load("v1")

    async def scenario() -> None:
        begin = time.perf_counter()
        assert await group.search(query("v2")) == NotLoaded("v2")
        assert time.perf_counter() - begin < 1.0
        assert await states(group, "v1") == {"v1": "ready", "v2": "loading"}
        assert (await group.search(query("v1")))[0] == "v1"
        store.gates["v2"].set()
        await until_ready(group, "v2")
        assert (await group.search(query("v2")))[0] == "v2"
        assert (await group.search(query("v1")))[0] == "v1"

    asyncio.run(scenario())
    assert store.opened == ["v1", "v2"]


def test_a_version_nobody_wants_is_let_go_once_a_wanted_one_is_ready() -> None:
    store = Store()
    group = store.group(idle_s=0.1)
    group.load("v1")
    group.load("v2")

    async def scenario() -> None:
        for _ in range(30):
            await asyncio.sleep(0.01)
            latest = await states(group, "v2")
        assert latest == {"v2": "ready"}

    asyncio.run(scenario())


def test_the_last_version_is_kept_even_if_no_front_is_there_to_want_it() -> None:
    group = Store().group(idle_s=0.05)
    group.load("v1")

    async def scenario() -> None:
        await asyncio.sleep(0.2)
        assert await states(group) == {"v1": "ready"}

    asyncio.run(scenario())


def test_a_failed_load_is_told_and_tried_again_later() -> None:
    store = Store()
    store.errors["v1"] = IndexFormatError("shard 0 is cut short")
    group = store.group(idle_s=0.1)
    group.load("v1")

    async def scenario() -> None:
        assert await states(group, "v1") == {"v1": "failed: IndexFormatError: shard 0 is cut short"}
        assert store.opened == ["v1"]
        del store.errors["v1"]
        await asyncio.sleep(0.15)
        await until_ready(group, "v1")

    asyncio.run(scenario())
    assert store.opened == ["v1", "v1"]


def test_what_the_client_did_wrong_comes_back_as_a_message_and_what_we_did_as_an_error() -> None:
    store = Store()
    store.search_error = SearchError("filter: no column 'colour'")
    group = store.group()
    group.load("v1")
    assert asyncio.run(group.search(query("v1"))) == Refusal("SearchError", "filter: no column 'colour'")
    store.search_error = IndexFormatError("shard 0 is damaged")
    group.load("v2")
    with pytest.raises(IndexFormatError):
        asyncio.run(group.search(query("v2")))
