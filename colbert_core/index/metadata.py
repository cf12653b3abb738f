"""Rows of the tables that hold what is known of documents beside their vectors."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def take_rows(table: pa.Table, rows: NDArray[np.integer]) -> pa.Table:
    """The rows of a table with these numbers, in this order.

    :meth:`pyarrow.Table.take` copies all of a column into one piece first, a whole shard's texts for one
    answer, and fails where they are more than 2 GiB. Here only the pieces that rows come from are touched.
    """
    if not table.num_columns:
        return table  # it has no rows either
    ends = np.cumsum([len(chunk) for chunk in table.column(0).chunks], dtype=np.int64)
    piece = np.searchsorted(ends, rows, side="right")
    starts = np.concatenate([[0], ends])
    parts = [
        table.slice(starts[number], ends[number] - starts[number]).take(
            pa.array(rows[piece == number] - starts[number], pa.int64())
        )
        for number in np.unique(piece)
    ]
    by_piece = np.empty(len(rows), dtype=np.int64)
    by_piece[np.argsort(piece, kind="stable")] = np.arange(len(rows))
    return pa.concat_tables([table.slice(0, 0), *parts]).combine_chunks().take(pa.array(by_piece))
