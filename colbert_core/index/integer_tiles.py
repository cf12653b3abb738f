"""Tiles of exact integer products in AVX2 registers, for processors without int8 matrix units.

The compiler makes no such instructions from loops: ``vpmaddubsw`` multiplies unsigned bytes with signed
ones and adds pairs in 16 bits, ``vpmaddwd`` does so with 16-bit numbers in 32 bits. A tile holds the sums
of some left rows with some vectors of eight right rows until they are used, and broadcasts the left rows'
numbers from memory.

Left operands are plain rows. A right operand is interleaved (:func:`interleaved`), so that the numbers
that are added to each other lie side by side: ``[width / n, right rows, n]``, n = 4 bytes or 2 words.
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
VECTORS = (
    2  # of a tile: 12 vectors of sums, two of right rows, one of left numbers and a product fill 16 registers
)
_UNROLLED = 2  # steps of the inner loop; more of them, and LLVM adds in an order that needs more registers

_INDEX, _INT32 = ir.IntType(64), ir.IntType(32)
_BYTES, _WORDS = ir.VectorType(ir.IntType(8), 4 * LANES), ir.VectorType(ir.IntType(16), 2 * LANES)
_SUMS, _FLOATS = ir.VectorType(_INT32, LANES), ir.VectorType(ir.FloatType(), LANES)
_Sums = list[list[Any]]


@cache
def has_tiles() -> bool:
    """Whether this processor has the instructions."""
    return bool(llvm.get_host_cpu_features().get("avx2", False))


def interleaved(rows: NDArray[np.int8], dtype: type[np.int8] | type[np.int16]) -> NDArray[Any]:
    """The right operand ``[width / n, m, n]`` of int8 rows ``[m, width]``, as bytes (n = 4) or words (n = 2).

    m is rounded up to a multiple of ``LANES`` by rows of zeros.
    """
    count, width = rows.shape
    together = 4 if dtype is np.int8 else 2
    right = np.zeros((width // together, -(-count // LANES) * LANES, together), dtype=dtype)
    right[:, :count] = rows.reshape(count, width // together, together).transpose(1, 0, 2)
    return right


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
        """Adds the products of one step: 32 bits of each left row with each right row."""
        builder, together = self.builder, 4 if kind is _BYTES else 2
        width, lanes = self.extent(0, 1), self.extent(1, 1)
        place = builder.mul(self.at(step, lanes, self.arguments[2]), ir.Constant(_INDEX, together))
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

        stop = self.extent(1, 0)
        self.steps(ir.Constant(_INDEX, 0), stop, lambda step: self.raise_(sums, step, _WORDS, product))
        return sums

    def byte_sums(self, carry: Any) -> _Sums:
        """Sums of uint8 left rows with bytes, carried to 32 bits after so many steps."""
        sums, short = self.accumulators(_SUMS), self.accumulators(_WORDS)
        ones, builder = ir.Constant(_WORDS, [1] * _WORDS.count), self.builder

        def product(left: Any, right: Any) -> Any:
            return self.call("llvm.x86.avx2.pmadd.ub.sw", _WORDS, left, right)

        total = self.extent(1, 0)
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


def product_tile(rows: int, vectors: int) -> Any:
    """An intrinsic ``(left int16 [>= rows, width], right words, column, out int32 [m, n], row)``.

    It writes products of the first ``rows`` left rows to ``out[row:, column:column + vectors · LANES]``.
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
                    found = builder.select(builder.fcmp_ordered(">", value, found), value, found)
                builder.store(found, target, align=4)
            return context.get_dummy_value()

        place = types.int64
        return types.void(left, right, place, place, constants, scores, places, factors, best), generate

    return tile
