"""Rows of metadata tables."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colbert_core.index.metadata import take_rows


@given(st.lists(st.integers(0, 5), max_size=6), st.data())
def test_rows_are_those_of_the_table(sizes: list[int], data: st.DataObject) -> None:
    """Whatever pieces the table is in, empty ones included."""
    schema = pa.schema({"number": pa.int64(), "text": pa.string()})
    first, pieces = 0, []
    for size in sizes:
        numbers = list(range(first, first + size))
        texts = [f"text {number}" if number % 3 else None for number in numbers]
        pieces.append(pa.table({"number": numbers, "text": texts}, schema=schema))
        first += size
    table = pa.concat_tables([schema.empty_table(), *pieces])
    rows = np.array(data.draw(st.lists(st.integers(0, first - 1)) if first else st.just([])), dtype=np.int64)
    assert take_rows(table, rows).to_pylist() == table.take(pa.array(rows)).to_pylist()
    assert take_rows(table.select([]), rows).num_columns == 0


def test_more_text_than_one_array_holds() -> None:
    """400 times the same 8 MB: 3.2 GB that nobody may put into one piece."""
    piece = pa.table({"text": pa.array(["x" * 2**20] * 8)})
    table = pa.concat_tables([piece] * 400)
    with pytest.raises(pa.ArrowInvalid, match="overflow"):
        table.take(pa.array([0]))
    found = take_rows(table, np.array([3199, 0, 1600]))
    assert [len(text) for text in found["text"].to_pylist()] == [2**20] * 3
