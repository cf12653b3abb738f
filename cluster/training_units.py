"""Tokenised units: what a training worker is fed, made by Ray Data readers on any node.

Documents that several queries of a unit share are tokenised, sent and later encoded once: the scores
and the gradient are the same, at a fraction of the compute.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from cluster.streams import TrainingTuple, TupleIndex, UnitSchedule, UnitSlot
from colbert_core.errors import RaycolbertError
from colbert_core.text import TextProcessor, TokenBatch, TruncationCount

# Units of one Ray Data execution: the list of its tasks is made up front. Starting the next one costs
# some seconds, once in this many units. What is read ahead is bounded by Ray Data's own back-pressure.
SEGMENT_UNITS = 4096
# Tuples that one task reads and tokenises, at least: a task costs some 10 ms of scheduling.
TASK_TUPLES = 64


@dataclass
class TokenisedUnit:
    """A unit, ready for the encoder.

    Attributes:
        slot: its place in the run.
        labels: what to call each tuple in messages, ``[n]``.
        queries: token ids of the n queries.
        documents: token ids of the distinct documents.
        document_of: int64 ``[n, nway]``, the number in ``documents`` of each tuple's documents.
        teacher: float32 ``[n, nway]``.
        truncation: what tokenising cut.
    """

    slot: UnitSlot
    labels: list[str]
    queries: TokenBatch
    documents: TokenBatch
    document_of: NDArray[np.int64]
    teacher: NDArray[np.float32]
    truncation: TruncationCount


def tokenise_unit(slot: UnitSlot, tuples: Sequence[TrainingTuple], text: TextProcessor) -> TokenisedUnit:
    """Tokenises a unit; equal texts become one document."""
    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(document, len(numbers)) for document in item.documents] for item in tuples]
    before = asdict(text.truncation)
    queries = text.queries([item.query for item in tuples], training=True)
    documents = text.documents(list(numbers))
    cut = {name: count - before[name] for name, count in asdict(text.truncation).items()}
    return TokenisedUnit(
        slot=slot,
        labels=[item.label for item in tuples],
        queries=queries,
        documents=documents,
        document_of=np.asarray(rows, dtype=np.int64),
        teacher=np.stack([item.scores for item in tuples]),
        truncation=TruncationCount(**cut),
    )


@dataclass(frozen=True)
class UnitSource:
    """All that a reader needs; lies in the object store once, and is unpacked once by each reader."""

    index: TupleIndex
    text: TextProcessor
    nway: int

    def unit(self, slot: UnitSlot) -> TokenisedUnit:
        """Reads and tokenises one unit."""
        return tokenise_unit(slot, self.index.read(slot.first, slot.count, self.nway), self.text)


class UnitStream:
    """The units of one worker, step by step, read ahead by Ray Data.

    Args:
        source: what to read.
        schedule: which units a step takes.
        rank: of this worker.
        workers: how many share each step.
        start: first step to yield: a resumed run starts where its checkpoint was made.
        stop: one past the last step.
        readers: processes that read and tokenise for this worker.

    Attributes:
        wait_s: seconds that the consumer waited for data in the last step.
    """

    def __init__(
        self,
        source: UnitSource,
        schedule: UnitSchedule,
        *,
        rank: int,
        workers: int,
        start: int,
        stop: int,
        readers: int = 1,
    ) -> None:
        self._schedule = schedule
        self._rank, self._workers = rank, workers
        self._start, self._stop = start, stop
        self._readers = readers
        self._source = ray.put(source)
        self.wait_s = 0.0

    def __iter__(self) -> Iterator[tuple[int, list[TokenisedUnit]]]:
        """Yields (step, units of this worker); a worker without a unit in a step gets an empty list.

        Raises:
            DataError: a tuple is malformed.
        """
        steps = range(self._start, self._stop)
        most = -(-self._schedule.units_per_step // self._workers)
        ready: queue.Queue[TokenisedUnit | BaseException] = queue.Queue(maxsize=2 * most + 2)
        leave = threading.Event()
        reader = threading.Thread(target=self._read_ahead, args=(ready, leave), daemon=True)
        reader.start()
        try:
            for step in steps:
                begin, units = time.perf_counter(), []
                for slot in self._schedule.share(step, self._rank, self._workers):
                    item = ready.get()
                    if isinstance(item, BaseException):
                        raise item
                    if item.slot != slot:
                        raise RuntimeError(f"unit {item.slot} came where {slot} was due")
                    units.append(item)
                self.wait_s = time.perf_counter() - begin
                yield step, units
        finally:
            leave.set()

    def _read_ahead(self, ready: queue.Queue[TokenisedUnit | BaseException], leave: threading.Event) -> None:
        """Fills the queue in order, one Ray Data execution after the other."""

        def put(item: TokenisedUnit | BaseException) -> bool:
            while not leave.is_set():
                try:
                    ready.put(item, timeout=0.5)
                    return True
                except queue.Full:
                    continue
            return False

        try:
            segment: list[UnitSlot] = []
            for step in range(self._start, self._stop):
                segment += self._schedule.share(step, self._rank, self._workers)
                if len(segment) >= SEGMENT_UNITS or step + 1 == self._stop:
                    for unit in self._run(segment):
                        if not put(unit):
                            return
                    segment = []
        except BaseException as error:
            cause = getattr(error, "cause", None)
            put(cause if isinstance(cause, RaycolbertError) else error)

    def _run(self, slots: Sequence[UnitSlot]) -> Iterator[TokenisedUnit]:
        if not slots:
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.raise_original_map_exception = True
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        per_task = max(1, TASK_TUPLES // self._schedule.micro_batch)
        dataset = ray.data.from_items(
            [asdict(slot) for slot in slots], override_num_blocks=-(-len(slots) // per_task)
        ).map_batches(
            UnitReader,
            fn_constructor_args=(self._source,),
            batch_size=None,
            batch_format="pyarrow",
            # Claiming no CPU, readers start also where the training workers hold every one, and the
            # two cannot wait for each other; how many run is bounded by their number.
            num_cpus=0,
            compute=ray.data.ActorPoolStrategy(size=self._readers),
        )
        for batch in dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=1):
            yield unpack_unit(batch)


class UnitReader:
    """The Ray Data actor: rows of unit slots in, rows of packed units out.

    It keeps tokenizer, open files and footers between tasks.
    """

    def __init__(self, source: ray.ObjectRef[UnitSource]) -> None:
        self._source = ray.get(source)

    def __call__(self, slots: pa.Table) -> pa.Table:
        units = [pack_unit(self._source.unit(UnitSlot(**row))) for row in slots.to_pylist()]
        return pa.concat_tables(units).combine_chunks()


def pack_unit(unit: TokenisedUnit) -> pa.Table:
    """One row of Arrow data, flat arrays in list columns; :func:`unpack_unit` undoes it."""
    columns: dict[str, pa.Array] = {
        "slot": pa.array([asdict(unit.slot)]),
        "truncation": pa.array([asdict(unit.truncation)]),
        "labels": pa.array([unit.labels], type=pa.list_(pa.string())),
        "document_of": _list(unit.document_of),
        "teacher": _list(unit.teacher),
    }
    for name, batch in (("queries", unit.queries), ("documents", unit.documents)):
        columns[f"{name}_lengths"] = _list(np.asarray([len(ids) for ids in batch.ids], dtype=np.int32))
        columns[f"{name}_ids"] = _list(np.concatenate(batch.ids).astype(np.int32))
        # Two flags of a token in one byte.
        attend, score = np.concatenate(batch.attend), np.concatenate(batch.score)
        columns[f"{name}_flags"] = _list(attend.astype(np.uint8) + 2 * score.astype(np.uint8))
    return pa.table(columns)


def unpack_unit(table: pa.Table) -> TokenisedUnit:
    """The unit in a one-row table."""
    row = {name: table.column(name)[0] for name in table.column_names}
    labels = row["labels"].as_py()

    def batch(name: str) -> TokenBatch:
        cuts = np.cumsum(_array(row[f"{name}_lengths"]))[:-1]
        flags = _array(row[f"{name}_flags"])
        return TokenBatch(
            ids=np.split(_array(row[f"{name}_ids"]), cuts),
            attend=np.split((flags & 1).astype(np.bool_), cuts),
            score=np.split((flags & 2).astype(np.bool_), cuts),
        )

    return TokenisedUnit(
        slot=UnitSlot(**row["slot"].as_py()),
        labels=labels,
        queries=batch("queries"),
        documents=batch("documents"),
        document_of=_array(row["document_of"]).reshape(len(labels), -1),
        teacher=_array(row["teacher"]).reshape(len(labels), -1),
        truncation=TruncationCount(**row["truncation"].as_py()),
    )


def _list(values: NDArray[Any]) -> pa.ListArray:
    flat = pa.array(values.reshape(-1))
    return pa.ListArray.from_arrays(pa.array([0, len(flat)], type=pa.int32()), flat)


def _array(scalar: pa.ListScalar) -> NDArray[Any]:
    return scalar.values.to_numpy(zero_copy_only=False)
