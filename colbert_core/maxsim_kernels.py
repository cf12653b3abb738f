"""The largest dot product of each query vector with each document, compiled for CPUs.

A matrix product as long as a candidate list and as narrow as a query runs at half of what its library
reaches with square ones, and its result has to be read again for the maxima. Here a tile of products stays
in registers until its maximum is taken, and the rows of a later tile are fetched meanwhile. The tile is
written in LLVM's vector types: numba's compiler does not keep it in registers by itself.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

# Accumulators, two vectors of the query and one of the document have to fit the registers: 32 of 16 floats
# with AVX-512, 16 of 8 otherwise.
_WIDE = bool(llvm.get_host_cpu_features().get("avx512f", False))
_LANES = 16 if _WIDE else 8
# Document rows of a tile; the smaller ones are for the last of a document.
_ROWS, _MIDDLE, _FEW = (14, 8, 4) if _WIDE else (6, 4, 2)
COLUMNS = 2 * _LANES  # query vectors of a tile; the matrix of query vectors is padded to a multiple
_FETCHED = 16  # floats of a cache line
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
            given = dict(zip(("documents", "queries", "best"), (0, 2, 4), strict=True))
            arrays = {
                name: context.make_array(signature.args[place])(context, builder, arguments[place])
                for name, place in given.items()
            }
            index, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), _LANES)
            first, column, number = arguments[1], arguments[3], arguments[5]
            dim = cgutils.unpack_tuple(builder, arrays["documents"].shape, 2)[1]
            width = cgutils.unpack_tuple(builder, arrays["queries"].shape, 2)[1]

            def add(left: Any, right: int) -> Any:
                return builder.add(left, ir.Constant(index, right))

            def pointer(name: str, place: Any) -> Any:
                return builder.bitcast(builder.gep(arrays[name].data, [place]), vector.as_pointer())

            def library(name: str, operands: int) -> Any:
                kind = ir.FunctionType(vector, [vector] * operands)
                return cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{_LANES}f32")

            product, maximum = library("fmuladd", 3), library("maximum", 2)
            zero = ir.Constant(vector, [0.0] * _LANES)
            sums = [[cgutils.alloca_once(builder, vector) for _ in range(2)] for _ in range(rows)]
            for pair in sums:
                for place in pair:
                    builder.store(zero, place)
            starts = [builder.mul(add(first, row), dim) for row in range(rows)]
            ahead = builder.mul(add(first, rows * _AHEAD), dim)
            with cgutils.for_range(builder, dim, intp=index) as loop:
                if fetch:
                    line = builder.add(ahead, builder.mul(loop.index, ir.Constant(index, _FETCHED)))
                    _fetch(builder, builder.gep(arrays["documents"].data, [line]))
                place = builder.add(builder.mul(loop.index, width), column)
                query = [
                    builder.load(pointer("queries", add(place, part * _LANES)), align=4) for part in range(2)
                ]
                for row in range(rows):
                    value = builder.load(
                        builder.gep(arrays["documents"].data, [builder.add(starts[row], loop.index)])
                    )
                    value = _spread(builder, value, vector)
                    for part in range(2):
                        total = builder.call(product, [value, query[part], builder.load(sums[row][part])])
                        builder.store(total, sums[row][part])
            for part in range(2):
                target = pointer("best", add(builder.add(builder.mul(number, width), column), part * _LANES))
                found = builder.load(target, align=4)
                for row in range(rows):
                    # Which of two zeros is the larger one matters to nobody, and costs as much as the rest.
                    operands = [found, builder.load(sums[row][part])]
                    found = builder.call(maximum, operands, fastmath=("nsz",))
                builder.store(found, target, align=4)
            return context.get_dummy_value()

        return signature, generate

    return raise_best


def _spread(builder: Any, value: Any, vector: Any) -> Any:
    """A vector that holds the value in all lanes."""
    blank = ir.Constant(vector, ir.Undefined)
    single = builder.insert_element(blank, value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES)
    return builder.shuffle_vector(single, blank, lanes)


def _fetch(builder: Any, address: Any) -> None:
    """Asks for the cache line at an address, which may lie outside of the array."""
    flag, byte = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(address, byte), flag(0), flag(3), flag(1)])


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
