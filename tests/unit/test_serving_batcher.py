"""Dynamic batching: who is encoded together, in which order, and what happens when encoding fails."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import numpy as np
import pytest

from serving.batcher import MicroBatcher


class Recorder:
    """An encoder that notes its batches; each text becomes one vector of its length."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self._seconds = seconds

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        self.batches.append(texts)
        self.threads.add(threading.get_ident())
        time.sleep(self._seconds)
        if "bad" in texts:
            raise ValueError("a text that cannot be encoded")
        return [np.full((1, 1), len(text)) for text in texts]


def test_waiting_requests_share_a_batch_and_get_their_own_vectors_back() -> None:
    recorder, sizes = Recorder(), []

    async def run() -> list[list[np.ndarray]]:
        batcher = MicroBatcher(8, 0.05, lambda size, seconds: sizes.append(size))
        requests = (["a", "bb"], ["ccc"], ["dddd", "eeeee"])
        return await asyncio.gather(*(batcher.encode(recorder.encode, texts) for texts in requests))

    answers = asyncio.run(run())
    assert [[int(v[0, 0]) for v in answer] for answer in answers] == [[1, 2], [3], [4, 5]]
    assert recorder.batches == [["a", "bb", "ccc", "dddd", "eeeee"]]
    assert sizes == [5]
    assert threading.get_ident() not in recorder.threads, "encoding must not run in the event loop's thread"


def test_a_batch_is_full_at_max_batch_without_waiting() -> None:
    recorder = Recorder()

    async def run() -> float:
        batcher = MicroBatcher(2, 30.0)
        begin = time.perf_counter()
        await batcher.encode(recorder.encode, ["a", "b", "c", "d"])
        return time.perf_counter() - begin

    assert asyncio.run(run()) < 5.0
    assert recorder.batches == [["a", "b"], ["c", "d"]]


def test_a_busy_encoder_collects_larger_batches() -> None:
    recorder = Recorder(seconds=0.1)

    async def run() -> None:
        batcher = MicroBatcher(16, 0.0)
        first = asyncio.create_task(batcher.encode(recorder.encode, ["first"]))
        await asyncio.sleep(0.03)
        later = []
        for number in range(5):
            later.append(asyncio.create_task(batcher.encode(recorder.encode, [f"later {number}"])))
            await asyncio.sleep(0.005)
        await asyncio.gather(first, *later)

    asyncio.run(run())
    assert recorder.batches == [["first"], [f"later {number}" for number in range(5)]]


def test_the_event_loop_runs_while_a_batch_is_encoded() -> None:
    recorder = Recorder(seconds=0.3)

    async def run() -> int:
        batcher = MicroBatcher(1, 0.0)
        task = asyncio.create_task(batcher.encode(recorder.encode, ["a"]))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(run()) >= 10


def test_two_models_are_never_mixed_in_a_batch() -> None:
    old, new = Recorder(), Recorder()

    async def run() -> None:
        batcher = MicroBatcher(8, 0.05)
        await asyncio.gather(
            batcher.encode(old.encode, ["a"]),
            batcher.encode(new.encode, ["b", "c"]),
            batcher.encode(old.encode, ["d"]),
        )

    asyncio.run(run())
    assert old.batches == [["a"], ["d"]]
    assert new.batches == [["b", "c"]]


def test_a_failed_batch_fails_its_requests_and_no_later_one() -> None:
    recorder = Recorder()

    async def run() -> list[np.ndarray]:
        batcher = MicroBatcher(8, 0.0)
        with pytest.raises(ValueError, match="cannot be encoded"):
            await batcher.encode(recorder.encode, ["bad", "good"])
        return await batcher.encode(recorder.encode, ["good"])

    assert len(asyncio.run(run())) == 1


def test_a_cancelled_request_is_not_encoded() -> None:
    recorder = Recorder(seconds=0.1)

    async def run() -> None:
        batcher = MicroBatcher(1, 0.0)
        first = asyncio.create_task(batcher.encode(recorder.encode, ["first"]))
        await asyncio.sleep(0.02)
        given_up = asyncio.create_task(batcher.encode(recorder.encode, ["given up"]))
        last = asyncio.create_task(batcher.encode(recorder.encode, ["last"]))
        await asyncio.sleep(0.02)
        given_up.cancel()
        await asyncio.gather(first, last)

    asyncio.run(run())
    assert recorder.batches == [["first"], ["last"]]


def test_an_idle_batcher_lets_go_of_the_last_encoder() -> None:
    """It holds a model, which a newer version has replaced."""

    async def run() -> bool:
        batcher, recorder = MicroBatcher(8, 0.0), Recorder()
        await batcher.encode(recorder.encode, ["a"])
        gone = weakref.ref(recorder)
        del recorder
        await asyncio.sleep(0.05)
        gc.collect()
        return gone() is None

    assert asyncio.run(run())
