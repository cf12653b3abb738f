"""The largest dot product of each query vector with each document, compiled for CPUs.

A matrix product as long as a candidate list and as narrow as a query runs at half of what its library
reaches with square ones, and its result has to be read again for the maxima. Here a tile of products stays
in registers until its maximum is taken, and the rows of a later tile are fetched meanwhile. The tile is
written in LLVM's vector types.
"""

from __future__ import annotations

from typing import Any

from numba import njit
from numba.core import types
from numba.extending import intrinsic

from colbert_core.vector_code import COLUMNS, INDEX, LANES, LINE, WIDE, VectorCode

# Document rows of a tile; the smaller ones are for the last of a document.
_ROWS, _MIDDLE, _FEW = (14, 8, 4) if WIDE else (6, 4, 2)
_CACHED_COLUMNS = 16 * COLUMNS  # of queries, which stay in a core's cache
_AHEAD = 2  # tiles between the rows that are fetched and those that are computed with


def _tile(rows: int, fetch: bool) -> Any:
    """An intrinsic that raises ``best`` by the products of so many document rows with a tile's columns."""

    @intrinsic
    def raise_best(
        typing_context: Any,
        documents: Any,
        start: Any,
        queries: Any,
        column: Any,
        best: Any,
        number: Any,
    ) -> Any:
        signature = types.void(documents, start, queries, column, best, number)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            code = VectorCode(context, builder, signature, arguments)
            data = {"documents": code.data(0), "queries": code.data(2), "best": code.data(4)}
            first, column, number = arguments[1], arguments[3], arguments[5]
            dim = builder.extract_value(code.array(0).shape, 1)
            width = builder.extract_value(code.array(2).shape, 1)
            starts = [builder.mul(code.plus(first, row), dim) for row in range(rows)]
            ahead = builder.mul(code.plus(first, rows * _AHEAD), dim)

            def document(row: int, step: Any) -> Any:
                return builder.gep(data["documents"], [builder.add(starts[row], step)])

            def query(step: Any) -> Any:
                if fetch:
                    line = builder.add(ahead, builder.mul(step, INDEX(LINE)))
                    code.fetch(builder.gep(data["documents"], [line]))
                return builder.gep(data["queries"], [builder.add(builder.mul(step, width), column)])

            sums = code.sums(rows)
            code.add_products(sums, dim, document, query)
            target = builder.add(builder.mul(number, width), column)
            for part in range(2):
                place = code.plus(target, part * LANES)
                found = code.load(data["best"], place)
                for row in range(rows):
                    # Which of two zeros is the larger one matters to nobody, and costs as much as the rest.
                    operands = (found, builder.load(sums[row][part]))
                    found = code.call("maximum", *operands, fastmath=("nsz",))
                code.store(found, data["best"], place)
            return context.get_dummy_value()

        return signature, generate

    return raise_best


_raise_by_tile = _tile(_ROWS, fetch=True)
_raise_by_fetched_tile = _tile(_ROWS, fetch=False)
_raise_by_middle = _tile(_MIDDLE, fetch=False)
_raise_by_few = _tile(_FEW, fetch=False)
_raise_by_row = _tile(1, fetch=False)


@njit(nogil=True, cache=True, boundscheck=False)
def document_maxima(documents, offsets, first, last, queries, best):  # type: ignore[no-untyped-def]
    """Raises ``best`` to the products of documents ``first`` to ``last`` (exclusive); a NaN stays.

    Rows of a last tile may be taken twice, which leaves a maximum as it is.

    Args:
        documents: float32 ``[tokens, dim]``, C-contiguous.
        offsets: int64 ``[n + 1]``: document i owns rows ``offsets[i]`` to ``offsets[i + 1]``, which are
            within bounds.
        first, last: which documents.
        queries: float32 ``[dim, width]``, C-contiguous; width is a multiple of ``COLUMNS``.
        best: float32 ``[n, width]``, C-contiguous, changed.
    """
    width = queries.shape[1]
    for left in range(0, width, _CACHED_COLUMNS):
        right = min(left + _CACHED_COLUMNS, width)
        for number in range(first, last):
            row, end = offsets[number], offsets[number + 1]
            if end - row < _ROWS:
                for single in range(row, end):
                    for column in range(left, right, COLUMNS):
                        _raise_by_row(documents, single, queries, column, best, number)
                continue
            # All columns of a tile's rows in turn: the rows are read from memory once, and those of a later
            # tile have the time of all columns to arrive.
            while row + _ROWS <= end:
                _raise_by_tile(documents, row, queries, left, best, number)
                for column in range(left + COLUMNS, right, COLUMNS):
                    _raise_by_fetched_tile(documents, row, queries, column, best, number)
                row += _ROWS
            for column in range(left, right, COLUMNS):
                if end - row > _MIDDLE:
                    _raise_by_fetched_tile(documents, end - _ROWS, queries, column, best, number)
                elif end - row > _FEW:
                    _raise_by_middle(documents, end - _MIDDLE, queries, column, best, number)
                elif end - row > 0:
                    _raise_by_few(documents, end - _FEW, queries, column, best, number)
