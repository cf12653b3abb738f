"""The fan-out: who is asked, how long is waited, and what is said about those that fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from colbert_core.errors import DataError, SearchError
from serving.errors import DeadlineExceeded, ShardsUnavailable
from serving.metrics import Metrics
from serving.protocol import GroupHits, GroupQuery, NotLoaded, Refusal
from serving.router import Gathered, GroupFailed, ReplicaLost, Router, shards_of_group


class Group:
    """A shard group that plays a script: each call takes the next step of it, the last one for ever."""

    def __init__(self, name: str, *script: object, seconds: float = 0.0) -> None:
        self.name = name
        self.calls = 0
        self._script = list(script) or [GroupHits([], {name: {}})]
        self._seconds = seconds

    async def search(self, query: GroupQuery) -> GroupHits | Refusal | NotLoaded:
        step = self._script[min(self.calls, len(self._script) - 1)]
        self.calls += 1
        await asyncio.sleep(self._seconds)
        if isinstance(step, Exception):
            raise step
        assert isinstance(step, (GroupHits, Refusal, NotLoaded))
        return step

    async def score(self, query: GroupQuery, ids: Sequence[str]) -> dict[str, float]:
        return {}


def ask(
    groups: Sequence[Group], shards: int = 4, deadline_s: float = 0.3, allow_partial: bool = False
) -> tuple[Gathered[GroupHits], Metrics]:
    metrics = Metrics()
    router = Router(groups, deadline_s, metrics)
    answer = asyncio.run(
        router.ask(lambda group: group.search(None), shards, allow_partial=allow_partial)  # type: ignore[arg-type]
    )
    return answer, metrics


def names(answer: Gathered[GroupHits]) -> list[str]:
    return sorted(name for hits in answer.answers for name in hits.records)


def test_every_shard_belongs_to_exactly_one_group() -> None:
    for groups in range(1, 6):
        for shards in range(1, 12):
            assigned = [shards_of_group(group, groups, shards) for group in range(groups)]
            assert sorted(number for numbers in assigned for number in numbers) == list(range(shards))
            sizes = [len(numbers) for numbers in assigned]
            assert max(sizes) - min(sizes) <= 1


def test_all_groups_are_asked_at_the_same_time() -> None:
    begin = time.perf_counter()
    answer, metrics = ask([Group(f"g{i}", seconds=0.2) for i in range(4)], deadline_s=5.0)
    assert time.perf_counter() - begin < 0.6, "one after the other they would take 0.8 s"
    assert names(answer) == ["g0", "g1", "g2", "g3"]
    assert (answer.report.ok, answer.report.total, answer.report.failed) == (4, 4, [])
    assert metrics.registry.get_sample_value("raycolbert_group_seconds_count", {"group": "g0"}) == 1


def test_a_group_without_shards_is_not_asked() -> None:
    groups = [Group("g0"), Group("g1"), Group("g2")]
    answer, _ = ask(groups, shards=2)
    assert names(answer) == ["g0", "g1"]
    assert groups[2].calls == 0
    assert answer.report.ok == 2


def test_a_late_group_fails_the_request_with_its_name() -> None:
    begin = time.perf_counter()
    with pytest.raises(DeadlineExceeded, match=r"2 of 4 shards.*g1 \(shards \[1, 3\]\).*within 300 ms"):
        ask([Group("g0"), Group("g1", seconds=30.0)])
    assert time.perf_counter() - begin < 2.0


def test_a_late_group_is_named_in_a_partial_answer() -> None:
    answer, metrics = ask([Group("g0"), Group("g1", seconds=30.0)], allow_partial=True)
    assert names(answer) == ["g0"]
    assert (answer.report.ok, answer.report.total) == (2, 4)
    (failed,) = answer.report.failed
    assert (failed.group, failed.shards) == ("g1", [1, 3])
    assert failed.reason == "no answer within 300 ms"
    labels = {"group": "g1", "reason": "late"}
    assert metrics.registry.get_sample_value("raycolbert_shard_failures_total", labels) == 1


def test_a_failed_group_is_told_from_a_late_one() -> None:
    broken = Group("g1", GroupFailed("IndexFormatError: shard 1 is damaged"))
    with pytest.raises(ShardsUnavailable, match=r"g1.*shard 1 is damaged"):
        ask([Group("g0"), broken])
    assert broken.calls == 1
    answer, metrics = ask([Group("g0"), broken], allow_partial=True)
    assert answer.report.failed[0].reason == "IndexFormatError: shard 1 is damaged"
    labels = {"group": "g1", "reason": "failed"}
    assert metrics.registry.get_sample_value("raycolbert_shard_failures_total", labels) == 1


def test_a_partial_answer_from_nobody_is_an_error() -> None:
    with pytest.raises(ShardsUnavailable):
        ask([Group("g0", GroupFailed("x")), Group("g1", GroupFailed("y"))], allow_partial=True)


def test_a_call_is_repeated_when_its_replica_is_lost_or_lacks_the_version() -> None:
    group = Group("g0", ReplicaLost("died"), NotLoaded("v"), NotLoaded("v"), GroupHits([], {"g0": {}}))
    answer, _ = ask([group], deadline_s=5.0)
    assert names(answer) == ["g0"]
    assert group.calls == 4


def test_repeating_ends_with_the_deadline() -> None:
    group = Group("g0", NotLoaded("v"))
    with pytest.raises(DeadlineExceeded):
        ask([group])
    assert group.calls > 3


@pytest.mark.parametrize(("kind", "expected"), [("DataError", DataError), ("SomethingNew", SearchError)])
def test_a_refusal_is_the_clients_error_even_in_a_partial_answer(kind: str, expected: type) -> None:
    with pytest.raises(expected, match="no metadata column 'colour'"):
        ask([Group("g0"), Group("g1", Refusal(kind, "no metadata column 'colour'"))], allow_partial=True)
