"""Training tuples in a reproducible order, read lazily, whatever the number of workers.

A *unit* is ``micro_batch`` consecutive tuples of the training set, in file order: tuples that were
mined together, and share documents, stay together. The units of an epoch are permuted by a pure
function of (seed, epoch); global step s takes units [s G, (s + 1) G) of the epochs' permutations
laid end to end. Nothing here depends on who reads: a run continues at step s by asking for step s.

When the tuples do not fill the last unit, that unit is smaller, and weighs less in its step; a step
may hold the end of one epoch and the beginning of the next. Each tuple is thus in exactly one unit,
and each unit exactly once in an epoch.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.fs import FileSystem, LocalFileSystem

from colbert_core.errors import ConfigError, DataError

COLUMNS = ("query", "documents", "scores")
OPTIONAL_COLUMNS = ("query_id", "document_ids")
# Reading 16 tuples decodes the whole row group they are in, so row groups are small.
ROW_GROUP_TUPLES = 64

_ROUNDS = 8
_THREADS = 8
_OPEN_FILES = 16


def tuple_schema(*, ids: bool = False) -> pa.Schema:
    """The Arrow schema of native training tuples, with or without the optional id columns."""
    fields = [
        pa.field("query", pa.string()),
        pa.field("documents", pa.list_(pa.string())),
        pa.field("scores", pa.list_(pa.float32())),
    ]
    if ids:
        fields += [pa.field("query_id", pa.string()), pa.field("document_ids", pa.list_(pa.string()))]
    return pa.schema(fields)


class TupleWriter:
    """Writes native training tuples to one Parquet file, in row groups fit for random units.

    Use as a context manager. Pages carry checksums, which reading verifies.

    Args:
        path: the file to write.
        ids: also write ``query_id`` and ``document_ids``.
    """

    def __init__(self, path: str | Path, *, ids: bool = False) -> None:
        self._schema = tuple_schema(ids=ids)
        self._writer = pq.ParquetWriter(
            path, self._schema, compression="zstd", write_page_checksum=True, store_schema=True
        )
        self._rows: list[dict[str, Any]] = []
        self.tuples = 0

    def write(self, row: dict[str, Any]) -> None:
        """Adds one tuple, a mapping of the schema's columns."""
        self._rows.append(row)
        self.tuples += 1
        if len(self._rows) == ROW_GROUP_TUPLES:
            self._flush()

    def __enter__(self) -> TupleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows.clear()


@dataclass(frozen=True)
class TrainingTuple:
    """One query with its documents and the teacher's scores.

    Attributes:
        label: ``query_id`` where there is one, else file and row: what messages call this tuple.
        query: text.
        documents: ``nway`` texts.
        scores: float32 ``[nway]``, finite.
    """

    label: str
    query: str
    documents: list[str]
    scores: NDArray[np.float32]


class TupleIndex:
    """Where each tuple of a set of Parquet files is: their footers, and nothing of their content.

    Attributes:
        tuples: how many there are, over all files in the order given.
    """

    def __init__(self, paths: Sequence[str], filesystem: FileSystem | None = None) -> None:
        """Reads the footers.

        Args:
            paths: Parquet files, in the order that makes up the training set.
            filesystem: where they are; default: the local file system.

        Raises:
            DataError: a file is missing or no Parquet, lacks a column, has one of the wrong type, or
                there is no tuple at all; the message names the file.
        """
        if not paths:
            raise DataError("a training set has at least one Parquet file; none was given")
        self._filesystem = filesystem or LocalFileSystem()
        self._paths = list(paths)
        self._files: dict[str, pq.ParquetFile] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            rows = list(pool.map(self._read_footer, self._paths))
        groups = [(file, group, count) for file, counts in enumerate(rows) for group, count in counts]
        counts = np.asarray([count for _, _, count in groups], dtype=np.int64)
        self._groups = [(file, group) for file, group, _ in groups]
        self._starts: list[int] = [0, *np.cumsum(counts).tolist()]
        self._file_starts: list[int] = [
            0,
            *np.cumsum([sum(count for _, count in counts) for counts in rows]).tolist(),
        ]
        self.tuples = self._starts[-1]
        if self.tuples == 0:
            raise DataError(f"{self._paths[0]}: the training set holds no tuple")

    def read(self, first: int, count: int, nway: int) -> list[TrainingTuple]:
        """Consecutive tuples, cut to their first ``nway`` documents.

        Args:
            first: global number of the first tuple, from 0.
            count: how many.
            nway: documents to keep of each.

        Raises:
            DataError: a tuple is malformed; the message names file and row (from 1).
        """
        found: list[TrainingTuple] = []
        position, end = first, first + count
        while position < end:
            number = bisect_right(self._starts, position) - 1
            offset = position - self._starts[number]
            take = min(end, self._starts[number + 1]) - position
            file, group = self._groups[number]
            table = self._read_group(self._paths[file], group).slice(offset, take)
            row = position - self._file_starts[file] + 1
            found += [
                _checked(values, self._paths[file], row + i, nway)
                for i, values in enumerate(table.to_pylist())
            ]
            position += take
        return found

    def _read_footer(self, path: str) -> list[tuple[int, int]]:
        with self._open(path) as file:
            schema = file.schema_arrow
            for name in COLUMNS:
                if name not in schema.names:
                    raise DataError(
                        f"{path}: no column {name!r}; training tuples need {', '.join(COLUMNS)}, "
                        f"this file has {', '.join(schema.names)}"
                    )
            for name in (*COLUMNS, *OPTIONAL_COLUMNS):
                if name in schema.names:
                    _check_type(path, name, schema.field(name).type)
            metadata = file.metadata
            return [(group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]

    def _read_group(self, path: str, group: int) -> pa.Table:
        try:
            file = self._open_kept(path)
            columns = [name for name in (*COLUMNS, *OPTIONAL_COLUMNS) if name in file.schema_arrow.names]
            return file.read_row_group(group, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: row group {group} cannot be read: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def _open_kept(self, path: str) -> pq.ParquetFile:
        """An open file with its footer, kept between units: both cost a request on object storage."""
        if path not in self._files:
            if len(self._files) == _OPEN_FILES:
                self._files.pop(next(iter(self._files))).close(force=True)
            self._files[path] = self._open(path)
        return self._files[path]

    def _open(self, path: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._filesystem.open_input_file(path), page_checksum_verification=True)
        except FileNotFoundError:
            raise DataError(f"{path}: no such training file") from None
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: not readable as Parquet: {error}") from None


@dataclass(frozen=True)
class UnitSlot:
    """One unit at its place in the run.

    Attributes:
        position: place in the run, from 0; step ``position // G``.
        epoch: from 0.
        unit: number of the unit in file order.
        first: global number of its first tuple.
        count: its tuples.
        weight: its share of the step's tuples: the factor of its mean loss in the step's loss.
    """

    position: int
    epoch: int
    unit: int
    first: int
    count: int
    weight: float


@dataclass(frozen=True)
class UnitSchedule:
    """Which units a global step takes: a pure function of these five numbers.

    Attributes:
        tuples: size of the training set.
        micro_batch: tuples of a unit.
        queries_per_step: tuples of a global step, a multiple of ``micro_batch``.
        seed: of the permutations.
    """

    tuples: int
    micro_batch: int
    queries_per_step: int
    seed: int

    def __post_init__(self) -> None:
        if self.queries_per_step % self.micro_batch:
            raise ConfigError(
                f"queries_per_step ({self.queries_per_step}) is no multiple of "
                f"micro_batch ({self.micro_batch})"
            )

    @property
    def units(self) -> int:
        """Units of an epoch."""
        return -(-self.tuples // self.micro_batch)

    @property
    def units_per_step(self) -> int:
        return self.queries_per_step // self.micro_batch

    def step(self, step: int) -> list[UnitSlot]:
        """The units of a global step (from 0), in their order."""
        places = range(step * self.units_per_step, (step + 1) * self.units_per_step)
        placed = []
        for position in places:
            epoch, index = divmod(position, self.units)
            unit = int(permuted(np.asarray([index]), self.units, self.seed, epoch)[0])
            first = unit * self.micro_batch
            placed.append((position, epoch, unit, first, min(self.micro_batch, self.tuples - first)))
        total = sum(count for *_, count in placed)
        return [UnitSlot(*place, weight=place[-1] / total) for place in placed]

    def share(self, step: int, rank: int, workers: int) -> list[UnitSlot]:
        """The units that one of ``workers`` runs: unit i of the step goes to rank ``i mod workers``.

        With more workers than units in a step, some have none.
        """
        return self.step(step)[rank::workers]


def permuted(index: NDArray[Any], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Places ``index`` of a random permutation of ``range(size)``, in constant memory.

    A Feistel network over the smallest even power of two that holds ``size``, walked until it lands
    inside. Unlike a library's shuffle it gives any place without the others, needs no memory, and
    will be the same in every version of every library.

    Args:
        index: integers in [0, size).
        size: length of the permutation.
        seed, epoch: choose the permutation.
    """
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    value = np.asarray(index).astype(np.uint64)
    outside = np.ones(value.shape, dtype=np.bool_)
    while outside.any():
        left, right = value[outside] >> np.uint64(half), value[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        value[outside] = (left << np.uint64(half)) | right
        outside = value >= size
    return value.astype(np.int64)


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _check_type(path: str, name: str, given: pa.DataType) -> None:
    def is_text(kind: pa.DataType) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def is_list(kind: pa.DataType) -> bool:
        return pa.types.is_list(kind) or pa.types.is_large_list(kind)

    if name in ("query", "query_id"):
        fits, expected = is_text(given), "string"
    elif name == "scores":
        fits = is_list(given) and pa.types.is_floating(given.value_type)
        expected = "list<float>"
    else:
        fits, expected = is_list(given) and is_text(given.value_type), "list<string>"
    if not fits:
        raise DataError(f"{path}: column {name!r} is {given}, expected {expected}")


def _checked(values: dict[str, Any], path: str, row: int, nway: int) -> TrainingTuple:
    """A tuple from one row, or an error that names the row."""
    where = f"{path}: row {row}"
    label = values.get("query_id") or f"{path}#{row}"
    query, documents, scores = (values[name] for name in COLUMNS)
    if query is None or not isinstance(query, str):
        raise DataError(f"{where}: 'query' is missing")
    if not documents:
        raise DataError(f"{where} (query {label}): 'documents' is empty")
    if scores is None or len(scores) != len(documents):
        count = 0 if scores is None else len(scores)
        raise DataError(f"{where} (query {label}): {len(documents)} documents but {count} scores")
    if len(documents) < nway:
        raise DataError(f"{where} (query {label}): {len(documents)} documents, fewer than nway {nway}")
    kept = documents[:nway]
    for place, document in enumerate(kept):
        if document is None:
            raise DataError(f"{where} (query {label}): document {place} is missing")
    teacher = np.asarray([np.nan if s is None else s for s in scores[:nway]], dtype=np.float32)
    if not np.isfinite(teacher).all():
        place = int(np.flatnonzero(~np.isfinite(teacher))[0])
        raise DataError(f"{where} (query {label}): score {place} is {teacher[place]}, not a finite number")
    return TrainingTuple(str(label), query, kept, teacher)
