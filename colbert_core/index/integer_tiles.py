"""Tiles of exact integer products in AVX2 registers, for processors without int8 matrix units.

The compiler makes no such instructions from loops: ``vpmaddubsw`` multiplies unsigned bytes with signed
ones and adds pairs in 16 bits, ``vpmaddwd`` does so with 16-bit numbers in 32 bits. A tile holds the sums
of some left rows with some vectors of eight right rows until they are used, and broadcasts the left rows'
numbers from memory.

Left operands are plain rows. A right operand is interleaved (:func:`interleaved`): in panels as wide as a
tile, which stay in the first cache, where the numbers that are added to each other lie side by side:
``[panels, width / n, PANEL, n]``, n = 4 bytes or 2 words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 8  # right rows of a vector
ROWS = 6  # left rows of a tile
VECTORS = 2  # of a tile: 12 of sums, two of right rows, one of left numbers and a product fill 16 registers
PANEL = VECTORS * LANES
_UNROLLED = 2  # steps of the inner loop; more of them, and LLVM adds in an order that needs more registers
STEP_WIDTH = 4 * _UNROLLED  # numbers of a row that the inner loop takes at once, as bytes
_UNPACKED, _UNPACKED_LAST = 16, 4  # bytes at a time; the shortest residual has four

_INDEX, _INT32 = ir.IntType(64), ir.IntType(32)
_BYTES, _WORDS = ir.VectorType(ir.IntType(8), 4 * LANES), ir.VectorType(ir.IntType(16), 2 * LANES)
_SUMS, _FLOATS = ir.VectorType(_INT32, LANES), ir.VectorType(ir.FloatType(), LANES)
_Sums = list[list[Any]]


@cache
def has_tiles() -> bool:
    """Whether this processor has the instructions."""
    return bool(llvm.get_host_cpu_features().get("avx2", False))


def interleaved(rows: NDArray[np.int8], dtype: type[np.int8] | type[np.int16]) -> NDArray[Any]:
    """The right operand of int8 rows ``[m, width]``, as bytes (n = 4) or words (n = 2).

    m is rounded up to a multiple of ``PANEL`` by rows of zeros; width is a multiple of ``STEP_WIDTH``.
    """
    count, width = rows.shape
    together, panels = 4 if dtype is np.int8 else 2, -(-count // PANEL)
    padded = np.zeros((panels * PANEL, width), dtype=dtype)
    padded[:count] = rows
    split = padded.reshape(panels, PANEL, width // together, together)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3))


def steps_per_carry(bits: int) -> int:
    """How many steps of four bytes can be added in 16 bits, as a multiple of the unrolled ones.

    A sum grows by two products of a code of so many bits and an int8 within ±127.
    """
    return (32767 // (2 * ((1 << bits) - 1) * 127)) // _UNROLLED * _UNROLLED


class _Frame:
    """Builds one tile: operands, loops, and arrays by name."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any, rows: int, vectors: int):
        self.context, self.builder, self.rows, self.vectors = context, builder, rows, vectors
        self._signature, self.arguments = signature, arguments

    def array(self, place: int) -> Any:
        """The array that is an argument."""
        made = self.context.make_array(self._signature.args[place])
        return made(self.context, self.builder, self.arguments[place])

    def extent(self, place: int, axis: int) -> Any:
        """A length of that array."""
        return self.builder.extract_value(self.array(place).shape, axis)

    def load(self, place: int, at: Any, kind: Any) -> Any:
        """What lies at an element of an array, as this type."""
        pointer = self.builder.gep(self.array(place).data, [at])
        return self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()), align=1)

    def pointer(self, place: int, at: Any, kind: Any) -> Any:
        """The place of an element of an array, as a pointer to this type."""
        return self.builder.bitcast(self.builder.gep(self.array(place).data, [at]), kind.as_pointer())

    def at(self, row: Any, width: Any, column: Any) -> Any:
        """``row · width + column``."""
        return self.builder.add(self.builder.mul(row, width), column)

    def plus(self, value: Any, constant: int) -> Any:
        return self.builder.add(value, ir.Constant(_INDEX, constant))

    def call(self, name: str, result: Any, *operands: Any) -> Any:
        """Calls a function of LLVM."""
        kind = ir.FunctionType(result, [operand.type for operand in operands])
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, name), list(operands)
        )

    def accumulators(self, kind: Any) -> _Sums:
        """Places for a vector for each left row and vector of right rows; zeros."""
        made = [
            [cgutils.alloca_once(self.builder, kind) for _ in range(self.vectors)] for _ in range(self.rows)
        ]
        self.clear(made, kind)
        return made

    def clear(self, sums: _Sums, kind: Any) -> None:
        for row in sums:
            for place in row:
                self.builder.store(ir.Constant(kind, [0] * kind.count), place)

    def spread(self, value: Any, kind: Any) -> Any:
        """A vector that holds the value in all lanes."""
        blank = ir.Constant(kind, ir.Undefined)
        single = self.builder.insert_element(blank, value, ir.Constant(_INT32, 0))
        zeros = ir.Constant(ir.VectorType(_INT32, kind.count), [0] * kind.count)
        return self.builder.shuffle_vector(single, blank, zeros)

    def raise_(self, sums: _Sums, step: Any, kind: Any, product: Callable[[Any, Any], Any]) -> None:
        """Adds the products of one step: 32 bits of each left row with each right row of the panel."""
        builder, together = self.builder, 4 if kind is _BYTES else 2
        width = self.extent(0, 1)
        panel = builder.udiv(self.arguments[2], ir.Constant(_INDEX, PANEL))
        place = self.at(panel, self.extent(1, 1), step)
        place = builder.mul(place, ir.Constant(_INDEX, PANEL * together))
        right = [self.load(1, self.plus(place, v * LANES * together), kind) for v in range(self.vectors)]
        column = builder.mul(step, ir.Constant(_INDEX, together))
        for r in range(self.rows):
            value = self.load(0, self.at(ir.Constant(_INDEX, r), width, column), _INT32)
            left = builder.bitcast(self.spread(value, _SUMS), kind)
            for v in range(self.vectors):
                total = builder.add(builder.load(sums[r][v]), product(left, right[v]))
                builder.store(total, sums[r][v])

    def steps(self, start: Any, stop: Any, add: Callable[[Any], None]) -> None:
        """Calls ``add`` for all steps from start to stop, whose difference is a multiple of the unrolled."""
        with cgutils.for_range_slice(self.builder, start, stop, ir.Constant(_INDEX, _UNROLLED), _INDEX) as (
            step,
            _,
        ):
            for i in range(_UNROLLED):
                add(self.plus(step, i))

    def word_sums(self) -> _Sums:
        """Sums of int16 left rows with words."""
        sums = self.accumulators(_SUMS)

        def product(left: Any, right: Any) -> Any:
            return self.call("llvm.x86.avx2.pmadd.wd", _SUMS, left, right)

        stop = self.extent(1, 1)
        self.steps(ir.Constant(_INDEX, 0), stop, lambda step: self.raise_(sums, step, _WORDS, product))
        return sums

    def byte_sums(self, carry: Any) -> _Sums:
        """Sums of uint8 left rows with bytes, carried to 32 bits after so many steps."""
        sums, short = self.accumulators(_SUMS), self.accumulators(_WORDS)
        ones, builder = ir.Constant(_WORDS, [1] * _WORDS.count), self.builder

        def product(left: Any, right: Any) -> Any:
            return self.call("llvm.x86.avx2.pmadd.ub.sw", _WORDS, left, right)

        total = self.extent(1, 1)
        with cgutils.for_range_slice(builder, ir.Constant(_INDEX, 0), total, carry, _INDEX) as (start, _):
            end = builder.add(start, carry)
            stop = builder.select(builder.icmp_signed("<", end, total), end, total)
            self.clear(short, _WORDS)
            self.steps(start, stop, lambda step: self.raise_(short, step, _BYTES, product))
            for r in range(self.rows):
                for v in range(self.vectors):
                    wide = self.call("llvm.x86.avx2.pmadd.wd", _SUMS, builder.load(short[r][v]), ones)
                    builder.store(builder.add(builder.load(sums[r][v]), wide), sums[r][v])
        return sums


def unpack_row(bits: int) -> Any:
    """An intrinsic ``(residuals uint8 [tokens, width * bits / 8], token, left [>= row, width], row)``.

    It writes a token's residual as a left row: codes of 2 or 4 bits, uint8; levels of 8 bits, int16.
    """

    @intrinsic
    def unpack(typing_context: Any, residuals: Any, token: Any, left: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            frame = _Frame(context, builder, signature, arguments, rows=1, vectors=1)
            stride, width = frame.extent(0, 1), frame.extent(2, 1)
            source = builder.mul(arguments[1], stride)
            target = builder.mul(arguments[3], width)

            def some(start: Any, stop: Any, count: int) -> None:
                kind = ir.VectorType(ir.IntType(8), count)
                with cgutils.for_range_slice(builder, start, stop, ir.Constant(_INDEX, count), _INDEX) as (
                    byte,
                    _,
                ):
                    packed = frame.load(0, builder.add(source, byte), kind)
                    if bits == 8:
                        words = ir.VectorType(ir.IntType(16), count)
                        level = builder.sub(builder.zext(packed, words), ir.Constant(words, [128] * count))
                        builder.store(level, frame.pointer(2, builder.add(target, byte), words), align=1)
                        return
                    for part, shift in enumerate(range(0, 8, bits)):
                        code = builder.and_(
                            builder.lshr(packed, ir.Constant(kind, [shift] * count)),
                            ir.Constant(kind, [(1 << bits) - 1] * count),
                        )
                        place = builder.add(builder.mul(stride, ir.Constant(_INDEX, part)), byte)
                        builder.store(code, frame.pointer(2, builder.add(target, place), kind), align=1)

            whole = builder.and_(stride, ir.Constant(_INDEX, -_UNPACKED))
            some(ir.Constant(_INDEX, 0), whole, _UNPACKED)
            some(whole, stride, _UNPACKED_LAST)
            return context.get_dummy_value()

        return types.void(residuals, types.int64, left, types.int64), generate

    return unpack


def product_tile(rows: int, vectors: int) -> Any:
    """An intrinsic ``(left int16 [>= rows, width], right words, column, out int32 [m, n], row)``.

    It writes products of the first ``rows`` left rows to ``out[row:, column:column + vectors · LANES]``;
    column is the first one of a panel, here as in :func:`similarity_tile`.
    """

    @intrinsic
    def tile(typing_context: Any, left: Any, right: Any, column: Any, out: Any, row: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            frame = _Frame(context, builder, signature, arguments, rows, vectors)
            for r, sums in enumerate(frame.word_sums()):
                start = frame.at(frame.plus(arguments[4], r), frame.extent(3, 1), arguments[2])
                for v, place in enumerate(sums):
                    target = frame.pointer(3, frame.plus(start, v * LANES), _SUMS)
                    builder.store(builder.load(place), target, align=4)
            return context.get_dummy_value()

        return types.void(left, right, types.int64, out, types.int64), generate

    return tile


def nearest_tile(rows: int) -> Any:
    """An intrinsic that keeps the best right rows of a panel for some left rows; see ``nearest_centroids``.

    Its arguments are ``(left int16 [>= rows, width], right words, column, scales float32 [n], units float32
    [n], half_squares float32 [panels · PANEL], best int32 [>= rows, PANEL], found int32 the same,
    row)``: the number of the first left row in ``scales`` and ``units``.
    """

    @intrinsic
    def tile(
        typing_context: Any,
        left: Any,
        right: Any,
        column: Any,
        scales: Any,
        units: Any,
        half_squares: Any,
        best: Any,
        found: Any,
        row: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            frame = _Frame(context, builder, signature, arguments, rows, VECTORS)
            column = arguments[2]
            first = builder.trunc(column, _INT32)
            for r, sums in enumerate(frame.word_sums()):
                scale, unit = (
                    frame.spread(frame.load(array, frame.plus(arguments[8], r), ir.FloatType()), _FLOATS)
                    for array in (3, 4)
                )
                for v, place in enumerate(sums):
                    lane = frame.plus(column, v * LANES)
                    numbers = ir.Constant(_SUMS, [v * LANES + i for i in range(LANES)])
                    numbers = builder.add(frame.spread(first, _SUMS), numbers)
                    # Rounded after every operation, as everywhere.
                    value = builder.fsub(
                        builder.fmul(scale, builder.sitofp(builder.load(place), _FLOATS)),
                        builder.fmul(unit, frame.load(5, lane, _FLOATS)),
                    )
                    value = builder.fptosi(value, _SUMS)
                    kept = ir.Constant(_INDEX, r * PANEL + v * LANES)
                    top, number = (frame.pointer(array, kept, _SUMS) for array in (6, 7))
                    old = builder.load(top, align=4)
                    better = builder.icmp_signed(">", value, old)
                    builder.store(builder.select(better, value, old), top, align=4)
                    # Numbers only rise. A choice would become a masked store, slow on AMD's processors.
                    risen = builder.and_(builder.sext(better, _SUMS), numbers)
                    old = builder.load(number, align=4)
                    risen = builder.select(builder.icmp_signed(">", risen, old), risen, old)
                    builder.store(risen, number, align=4)
            return context.get_dummy_value()

        place = types.int64
        return types.void(left, right, place, scales, units, half_squares, best, found, place), generate

    return tile


def similarity_tile(rows: int, vectors: int) -> Any:
    """An intrinsic that raises a document's best similarities by some of its tokens.

    Its arguments are ``(left [>= rows, width], right, column, carry, constants int32 [lanes], scores
    float32 [centroids, lanes], places int64 [>= rows], factors float32 [>= rows, 2], best float32
    [lanes])``. Left are uint8 codes, beside bytes on the right: a product of levels is twice that of the
    codes, less the query token's constant, and sums are carried after so many steps. Or they are int16
    levels, beside words. A token's scores begin at ``scores.flat[place]``; its factors are those of its
    centroid's score and of the product.
    """

    @intrinsic
    def tile(
        typing_context: Any,
        left: Any,
        right: Any,
        column: Any,
        carry: Any,
        constants: Any,
        scores: Any,
        places: Any,
        factors: Any,
        best: Any,
    ) -> Any:
        codes = left.dtype == types.uint8

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            frame = _Frame(context, builder, signature, arguments, rows, vectors)
            column, carry = arguments[2], arguments[3]
            sums = frame.byte_sums(carry) if codes else frame.word_sums()
            for v in range(vectors):
                lane = frame.plus(column, v * LANES)
                target = frame.pointer(8, lane, _FLOATS)
                found = builder.load(target, align=4)
                for r in range(rows):
                    total = builder.load(sums[r][v])
                    if codes:
                        total = builder.sub(builder.add(total, total), frame.load(4, lane, _SUMS))
                    row = ir.Constant(_INDEX, r)
                    place = builder.add(frame.load(6, row, _INDEX), lane)
                    by_length, by_residual = (
                        frame.spread(frame.load(7, ir.Constant(_INDEX, 2 * r + i), ir.FloatType()), _FLOATS)
                        for i in range(2)
                    )
                    # Rounded after every operation, as everywhere.
                    value = builder.fadd(
                        builder.fmul(by_length, frame.load(5, place, _FLOATS)),
                        builder.fmul(by_residual, builder.sitofp(total, _FLOATS)),
                    )
                    # Not a choice, which may become a masked store.
                    found = frame.call("llvm.x86.avx.max.ps.256", _FLOATS, value, found)
                builder.store(found, target, align=4)
            return context.get_dummy_value()

        place = types.int64
        return types.void(left, right, place, place, constants, scores, places, factors, best), generate

    return tile
