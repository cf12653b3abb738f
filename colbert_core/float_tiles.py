"""Small fp32 products, exponentials, maxima and random bits in registers, for compiled kernels.

Operands are flat arrays with a first element and a stride between rows, so that a kernel can take blocks of
one matrix in turn.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from colbert_core.vector_code import (
    COLUMNS,
    FLOAT,
    INDEX,
    INT32,
    INTEGERS,
    LANES,
    VECTOR,
    WIDE,
    VectorCode,
    constant,
)

ROWS = 14 if WIDE else 6  # of a tile
STREAMS = 16  # of random bits, side by side; of any processor, so that masks are the same on all
_STREAM = ir.VectorType(INT32, STREAMS)

_MAGIC = 12582912.0  # 1.5 · 2**23: added to a small number, it leaves the nearest integer in the low bits
_LOG2_E = 1.44269504088896341
# ln 2 in two parts, the first short enough for its multiples to be exact (Cephes).
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_SMALLEST = -87.0  # exponentials of less are 0; they would be below the smallest normal number
_TAYLOR = [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0]


def _exponential(code: VectorCode, x: Any) -> Any:
    """exp(x) for x ≤ 0."""
    builder = code.builder
    shifted = code.fma(x, constant(_LOG2_E), constant(_MAGIC))
    whole = builder.fsub(shifted, constant(_MAGIC))
    rest = code.fma(whole, constant(-_LN2_HIGH), x)
    rest = code.fma(whole, constant(-_LN2_LOW), rest)
    power = constant(_TAYLOR[0])
    for term in _TAYLOR[1:]:
        power = code.fma(power, rest, constant(term))
    bits = builder.shl(builder.bitcast(shifted, INTEGERS), ir.Constant(INTEGERS, [23] * LANES))
    bits = builder.add(bits, ir.Constant(INTEGERS, [127 << 23] * LANES))
    power = builder.fmul(power, builder.bitcast(bits, VECTOR))
    small = builder.fcmp_ordered("<", x, constant(_SMALLEST))
    return builder.select(small, constant(0.0), power)


def _tile(rows: int, *, transposed: bool, adds: bool) -> Any:
    """An intrinsic that writes, or adds, a tile of a product.

    ``(left, at, stride, right, at, stride, steps, out, at, stride)``: flat fp32 arrays, int64 numbers. Out
    gets ``rows`` rows of ``COLUMNS``. Step k takes column k of left, or with ``transposed`` row k.
    """

    @intrinsic
    def tile(
        typing_context: Any,
        left: Any,
        left_at: Any,
        left_stride: Any,
        right: Any,
        right_at: Any,
        right_stride: Any,
        steps: Any,
        out: Any,
        out_at: Any,
        out_stride: Any,
    ) -> Any:
        number = types.int64
        signature = types.void(left, number, number, right, number, number, number, out, number, number)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            code = VectorCode(context, builder, signature, arguments)
            lefts, rights, outs = code.data(0), code.data(3), code.data(7)
            _, left_at, left_stride, _, right_at, right_stride, steps, _, out_at, out_stride = arguments
            targets = [builder.add(out_at, builder.mul(out_stride, INDEX(row))) for row in range(rows)]
            sums = code.sums(rows)
            if adds:
                for row in range(rows):
                    for part in range(2):
                        builder.store(code.load(outs, code.plus(targets[row], part * LANES)), sums[row][part])
            starts = [
                code.plus(left_at, row)
                if transposed
                else builder.add(left_at, builder.mul(left_stride, INDEX(row)))
                for row in range(rows)
            ]

            def left_number(row: int, step: Any) -> Any:
                step = builder.mul(step, left_stride) if transposed else step
                return builder.gep(lefts, [builder.add(starts[row], step)])

            def right_row(step: Any) -> Any:
                return builder.gep(rights, [builder.add(right_at, builder.mul(step, right_stride))])

            code.add_products(sums, steps, left_number, right_row)
            for row in range(rows):
                for part in range(2):
                    code.store(builder.load(sums[row][part]), outs, code.plus(targets[row], part * LANES))
            return context.get_dummy_value()

        return signature, generate

    return tile


_product_tile = _tile(ROWS, transposed=False, adds=False)
_adding_tile = _tile(ROWS, transposed=True, adds=True)


@njit(nogil=True, boundscheck=False)
def multiply(left, left_stride, rows, right, right_stride, columns, steps, out, out_stride):  # type: ignore[no-untyped-def]
    """``out = left · right`` of flat fp32 arrays: ``[rows, steps] · [steps, columns]``.

    Rows are taken ``ROWS`` at a time and columns ``COLUMNS`` at a time: all three arrays are as large as
    the multiples ask.
    """
    for row in range(0, rows, ROWS):
        for column in range(0, columns, COLUMNS):
            at = row * out_stride + column
            _product_tile(
                left, row * left_stride, left_stride, right, column, right_stride, steps, out, at, out_stride
            )


@njit(nogil=True, boundscheck=False)
def add_transposed(left, left_stride, rows, right, right_stride, columns, steps, out, out_stride):  # type: ignore[no-untyped-def]
    """``out += leftᵀ · right``: left is ``[steps, rows]``; otherwise as :func:`multiply`."""
    for row in range(0, rows, ROWS):
        for column in range(0, columns, COLUMNS):
            at = row * out_stride + column
            _adding_tile(left, row, left_stride, right, column, right_stride, steps, out, at, out_stride)


@intrinsic
def maximum(typing_context: Any, values: Any, at: Any, count: Any) -> Any:
    """The largest of ``values.flat[at : at + count]``; count is a multiple of ``LANES``; no NaN counts."""
    signature = types.float32(values, types.int64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = VectorCode(context, builder, signature, arguments)
        data, (_, at, count) = code.data(0), arguments
        best = cgutils.alloca_once_value(builder, constant(float("-inf")))
        with code.every(count, LANES) as (position, _):
            found = code.load(data, builder.add(at, position))
            builder.store(code.call("maxnum", builder.load(best), found), best)
        return code.call("vector.reduce.fmax", builder.load(best), result=FLOAT)

    return signature, generate


@intrinsic
def exponentials(typing_context: Any, values: Any, at: Any, count: Any, shift: Any) -> Any:
    """Replaces ``values.flat[at : at + count]`` by exp(value − shift), and returns their sum.

    Args:
        values: fp32, flat.
        at, count: int64; count is a multiple of ``COLUMNS``.
        shift: fp32, at least the largest value; below −87 an exponential is 0. A NaN stays one.
    """
    signature = types.float32(values, types.int64, types.int64, types.float32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = VectorCode(context, builder, signature, arguments)
        data, (_, at, count, shift) = code.data(0), arguments
        shift = code.spread(shift)
        # Two vectors at a time: one waits for its own last operation.
        totals = [cgutils.alloca_once_value(builder, constant(0.0)) for _ in range(2)]
        with code.every(count, COLUMNS) as (position, _):
            for part, total in enumerate(totals):
                place = code.plus(builder.add(at, position), part * LANES)
                power = _exponential(code, builder.fsub(code.load(data, place), shift))
                code.store(power, data, place)
                builder.store(builder.fadd(builder.load(total), power), total)
        total = builder.fadd(*(builder.load(total) for total in totals))
        # In any order: the result is the same on every run of one machine.
        start = ir.Constant(FLOAT, 0.0)
        return code.call("vector.reduce.fadd", start, total, result=FLOAT, fastmath=("reassoc",))

    return signature, generate


@intrinsic
def draw(typing_context: Any, state: Any, words: Any) -> Any:
    """Fills uint32 ``words``, whose number is a multiple of ``STREAMS``, with random bits.

    Each of the streams is an SFC32 (Doty-Humphrey, PractRand).

    Args:
        state: uint32 ``[4 * STREAMS]``, changed: three words and a counter of each stream.
        words: uint32, written.
    """
    signature = types.void(state, words)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = VectorCode(context, builder, signature, arguments)
        kept, target = code.data(0), code.data(1)
        count = builder.extract_value(code.array(1).shape, 0)
        places = [code.pointer(kept, INDEX(part * STREAMS), _STREAM) for part in range(4)]
        parts = [cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in places]

        def left(value: Any, by: int) -> Any:
            return builder.shl(value, _STREAM([by] * STREAMS))

        def right(value: Any, by: int) -> Any:
            return builder.lshr(value, _STREAM([by] * STREAMS))

        with code.every(count, STREAMS) as (position, _):
            a, b, c, counter = (builder.load(part) for part in parts)
            drawn = builder.add(builder.add(a, b), counter)
            turned = builder.or_(left(c, 21), right(c, 11))
            builder.store(builder.xor(b, right(b, 9)), parts[0])
            builder.store(builder.add(c, left(c, 3)), parts[1])
            builder.store(builder.add(turned, drawn), parts[2])
            builder.store(builder.add(counter, _STREAM([1] * STREAMS)), parts[3])
            builder.store(drawn, code.pointer(target, position, _STREAM), align=4)
        for part, place in zip(parts, places, strict=True):
            builder.store(builder.load(part), place, align=4)
        return context.get_dummy_value()

    return signature, generate
