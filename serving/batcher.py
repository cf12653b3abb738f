"""Dynamic batching: requests that wait at the same time are encoded together, in one thread.

Ray Serve's own ``@serve.batch`` closes a batch when its time is up even while the model is busy, so that
under load many small batches queue up. Here a batch is closed when the model is free: the busier the
model, the larger the batches.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

import numpy as np

Encode = Callable[[list[str]], list[np.ndarray]]


@dataclass(frozen=True)
class _Waiting:
    encode: Encode
    text: str
    future: asyncio.Future[np.ndarray]
    since: float


class MicroBatcher:
    """Collects texts and encodes them together; for use in one event loop.

    Args:
        max_batch: most texts encoded together.
        wait_s: how long an idle encoder waits for company before it encodes a batch that is not full.
        observe: called with the size and the seconds of each batch.
    """

    def __init__(
        self, max_batch: int, wait_s: float, observe: Callable[[int, float], None] | None = None
    ) -> None:
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._observe = observe
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        # One thread: a model is not run twice at once, and the event loop is never held up by it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._task: asyncio.Task[None] | None = None

    async def encode(self, encode: Encode, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts, together with those of other callers that use the same encoder.

        Args:
            encode: called in the encoder's thread with up to ``max_batch`` texts; returns the vectors
                ``[length, dim]`` of each.
            texts: any number of texts.

        Returns:
            The vectors of each text, in order.

        Raises:
            Exception: whatever ``encode`` raised for the batch.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        loop = asyncio.get_running_loop()
        now = perf_counter()
        waiting = [_Waiting(encode, text, loop.create_future(), now) for text in texts]
        self._queue.extend(waiting)
        self._arrived.set()
        return list(await asyncio.gather(*(item.future for item in waiting)))

    def close(self) -> None:
        """Stops the encoder; texts that still wait are not encoded."""
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while True:
            # No name here holds a batch while the next one is waited for: it would keep its encoder's model.
            await self._encode_batch(await self._next_batch())

    async def _encode_batch(self, batch: list[_Waiting]) -> None:
        if not batch:
            return
        begin = perf_counter()
        try:
            vectors = await asyncio.get_running_loop().run_in_executor(
                self._thread, batch[0].encode, [item.text for item in batch]
            )
        except Exception as error:
            for item in batch:
                if not item.future.done():
                    item.future.set_exception(error)
            return
        if self._observe is not None:
            self._observe(len(batch), perf_counter() - begin)
        for item, result in zip(batch, vectors, strict=True):
            if not item.future.done():
                item.future.set_result(result)

    async def _next_batch(self) -> list[_Waiting]:
        """The texts at the head of the queue that share an encoder; those given up are left out."""
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        until = self._queue[0].since + self._wait_s
        while len(self._queue) < self._max_batch and (left := until - perf_counter()) > 0:
            self._arrived.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)
        encode = self._queue[0].encode
        batch: list[_Waiting] = []
        while self._queue and len(batch) < self._max_batch and self._queue[0].encode == encode:
            item = self._queue.popleft()
            if not item.future.done():
                batch.append(item)
        return batch
