"""Order, reading and refusal of training tuples, without Ray."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.streams import (
    ROW_GROUP_TUPLES,
    TupleIndex,
    TupleWriter,
    UnitSchedule,
    permuted,
    tuple_schema,
)
from colbert_core.errors import ConfigError, DataError


def row(number: int, documents: int = 3) -> dict[str, Any]:
    return {
        "query": f"query {number}",
        "documents": [f"document {number}.{i}" for i in range(documents)],
        "scores": [float(i) for i in range(documents)],
        "query_id": f"q{number}",
        "document_ids": [f"d{number}.{i}" for i in range(documents)],
    }


def write(path: Path, numbers: range, **more: Any) -> str:
    with TupleWriter(path, ids=True) as writer:
        for number in numbers:
            writer.write(row(number, **more))
    return str(path)


def damaged(path: Path, **change: Any) -> str:
    """Three tuples, the second with changed columns."""
    rows = [row(0), {**row(1), **change}, row(2)]
    pq.write_table(pa.Table.from_pylist(rows, schema=tuple_schema(ids=True)), path)
    return str(path)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_permutation_holds_every_number_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(np.arange(size), size, seed, epoch)) == list(range(size))


def test_permutation_is_the_same_for_ever() -> None:
    # A changed value here would make every running training see tuples twice.
    assert permuted(np.arange(8), 8, 12345, 0).tolist() == [2, 1, 3, 7, 0, 6, 5, 4]
    assert permuted(np.arange(8), 8, 12345, 1).tolist() == [7, 0, 1, 3, 4, 2, 6, 5]
    assert permuted(np.asarray([999_999]), 1_000_000, 7, 3).tolist() == [990442]


def test_permutations_are_spread_evenly() -> None:
    counts = Counter(tuple(permuted(np.arange(4), 4, seed, 0).tolist()) for seed in range(4800))
    assert len(counts) == 24
    # 200 expected of each; the standard deviation is 14.
    assert 130 < min(counts.values()) <= max(counts.values()) < 270


@settings(max_examples=60, deadline=None)
@given(
    tuples=st.integers(1, 200),
    micro_batch=st.integers(1, 9),
    per_step=st.integers(1, 7),
    seed=st.integers(0, 1000),
    workers=st.integers(1, 9),
)
def test_every_tuple_once_an_epoch_for_any_number_of_workers(
    tuples: int, micro_batch: int, per_step: int, seed: int, workers: int
) -> None:
    schedule = UnitSchedule(tuples, micro_batch, per_step * micro_batch, seed)
    steps = -(-2 * schedule.units // per_step)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(steps):
        whole = schedule.step(step)
        shares = [schedule.share(step, rank, workers) for rank in range(workers)]
        assert sorted(itertools.chain(*shares), key=lambda slot: slot.position) == whole
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert sum(slot.weight for slot in whole) == pytest.approx(1.0)
        for slot in whole:
            assert slot.weight == slot.count / sum(other.count for other in whole)
            seen.update((slot.epoch, number) for number in range(slot.first, slot.first + slot.count))
    for epoch in (0, 1):
        assert [seen[epoch, number] for number in range(tuples)] == [1] * tuples


def test_order_depends_on_seed_and_epoch_alone() -> None:
    one, other = UnitSchedule(160, 16, 32, 1), UnitSchedule(160, 16, 32, 2)
    first = [slot.unit for step in range(5) for slot in one.step(step)]
    second = [slot.unit for step in range(5, 10) for slot in one.step(step)]
    assert first != second
    assert first != [slot.unit for step in range(5) for slot in other.step(step)]
    larger_steps = UnitSchedule(160, 16, 80, 1)
    assert first == [slot.unit for step in range(2) for slot in larger_steps.step(step)]


def test_a_step_must_hold_whole_units() -> None:
    with pytest.raises(ConfigError, match="no multiple"):
        UnitSchedule(100, 16, 40, 0)


def test_reading_across_row_groups_and_files(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a.parquet", range(150)),
        write(tmp_path / "b.parquet", range(150, 153)),
        write(tmp_path / "c.parquet", range(153, 300)),
    ]
    assert pq.ParquetFile(paths[0]).metadata.row_group(0).num_rows == ROW_GROUP_TUPLES
    index = pickle.loads(pickle.dumps(TupleIndex(paths)))  # noqa: S301 - sent between processes so
    assert index.tuples == 300
    for first, count in ((0, 300), (60, 10), (148, 7), (299, 1), (63, 2)):
        found = index.read(first, count, 2)
        assert [item.label for item in found] == [f"q{i}" for i in range(first, first + count)]
        assert found[0].query == f"query {first}"
        assert found[-1].documents == [f"document {first + count - 1}.{i}" for i in range(2)]
        assert found[0].scores.tolist() == [0.0, 1.0]


def test_tuples_without_ids_are_called_by_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "plain.parquet"
    with TupleWriter(path) as writer:
        for number in range(70):
            writer.write({key: row(number)[key] for key in ("query", "documents", "scores")})
    assert TupleIndex([str(path)]).read(65, 1, 3)[0].label == f"{path}#66"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": []}, "row 2 .query q1.: 'documents' is empty"),
        ({"documents": None}, "row 2 .query q1.: 'documents' is empty"),
        ({"scores": [1.0, 2.0]}, "row 2 .query q1.: 3 documents but 2 scores"),
        ({"scores": None}, "row 2 .query q1.: 3 documents but 0 scores"),
        ({"scores": [1.0, float("nan"), 0.0]}, "row 2 .query q1.: score 1 is nan"),
        ({"scores": [1.0, 0.0, float("inf")]}, "row 2 .query q1.: score 2 is inf"),
        ({"scores": [None, 0.0, 1.0]}, "row 2 .query q1.: score 0 is nan"),
        ({"documents": ["a", None, "c"]}, "row 2 .query q1.: document 1 is missing"),
        ({"query": None}, "row 2: 'query' is missing"),
        ({"documents": ["a", "b"], "scores": [1.0, 2.0]}, "2 documents, fewer than nway 3"),
    ],
)
def test_malformed_tuples_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = damaged(tmp_path / "t.parquet", **change)
    index = TupleIndex([path])
    assert len(index.read(0, 1, 3)) == 1
    with pytest.raises(DataError, match=message) as caught:
        index.read(0, 3, 3)
    assert str(caught.value).startswith(path)


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    columns = {"query": ["a"], "documents": [["b"]], "scores": [[1.0]]}
    lacking = tmp_path / "lacking.parquet"
    pq.write_table(pa.table({"query": ["a"], "documents": [["b"]]}), lacking)
    with pytest.raises(DataError, match=r"no column 'scores'.*has query, documents"):
        TupleIndex([str(lacking)])
    for name, wrong in (("documents", ["b"]), ("scores", [["1"]]), ("query", [1])):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({**columns, name: wrong}), path)
        with pytest.raises(DataError, match=f"column '{name}' is .*, expected"):
            TupleIndex([str(path)])
    with pytest.raises(DataError, match="no such training file"):
        TupleIndex([str(tmp_path / "nowhere.parquet")])
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(DataError, match="not readable as Parquet"):
        TupleIndex([str(tmp_path / "text.parquet")])
    with pytest.raises(DataError, match="holds no tuple"):
        TupleIndex([write(tmp_path / "empty.parquet", range(0))])
    with pytest.raises(DataError, match="at least one"):
        TupleIndex([])


def test_damaged_pages_are_found(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write(path, range(50))
    content = bytearray(path.read_bytes())
    content[len(content) // 8] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="row group 0 cannot be read"):
        TupleIndex([str(path)]).read(0, 50, 3)
