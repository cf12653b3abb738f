"""LLVM's vector types for compiled kernels: what numba's compiler does not find by itself.

It keeps no tile of a product in registers, and has no vectors of exponentials. LLVM's vectors are portable:
it makes the widest instructions of the processor at hand of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# Accumulators, two vectors of the right operand and one of the left have to fit the registers: 32 of 16
# floats with AVX-512, 16 of 8 otherwise.
WIDE = bool(llvm.get_host_cpu_features().get("avx512f", False))
LANES = 16 if WIDE else 8
COLUMNS = 2 * LANES  # of a tile

INDEX, INT32, FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
VECTOR, INTEGERS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)
Sums = list[list[Any]]

LINE = 16  # floats of a cache line


class VectorCode:
    """Builds an intrinsic: its arguments, vectors in their elements, tiles of sums, LLVM's functions."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self.builder = builder
        self._context, self._signature, self._arguments = context, signature, arguments

    def array(self, place: int) -> Any:
        """The array that is an argument."""
        made = self._context.make_array(self._signature.args[place])
        return made(self._context, self.builder, self._arguments[place])

    def data(self, place: int) -> Any:
        """Pointer to its first element."""
        return self.array(place).data

    def pointer(self, data: Any, at: Any, kind: Any = VECTOR) -> Any:
        """The vector that starts at an element."""
        return self.builder.bitcast(self.builder.gep(data, [at]), kind.as_pointer())

    def load(self, data: Any, at: Any) -> Any:
        return self.builder.load(self.pointer(data, at), align=4)

    def store(self, value: Any, data: Any, at: Any) -> None:
        self.builder.store(value, self.pointer(data, at), align=4)

    def plus(self, value: Any, number: int) -> Any:
        return self.builder.add(value, INDEX(number))

    def call(self, name: str, *operands: Any, result: Any = VECTOR, fastmath: tuple[str, ...] = ()) -> Any:
        """Calls LLVM's function of this name for vectors."""
        kind = ir.FunctionType(result, [operand.type for operand in operands])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.v{LANES}f32")
        return self.builder.call(function, operands, fastmath=fastmath)

    def fma(self, left: Any, right: Any, added: Any) -> Any:
        return self.call("fmuladd", left, right, added)

    def spread(self, value: Any) -> Any:
        """A vector that holds the value in all lanes."""
        blank = ir.Constant(VECTOR, ir.Undefined)
        single = self.builder.insert_element(blank, value, ir.Constant(INT32, 0))
        return self.builder.shuffle_vector(single, blank, ir.Constant(INTEGERS, [0] * LANES))

    def sums(self, rows: int) -> Sums:
        """Places for a tile of so many rows of ``COLUMNS`` sums; zeros."""
        made = [[cgutils.alloca_once(self.builder, VECTOR) for _ in range(2)] for _ in range(rows)]
        for row in made:
            for place in row:
                self.builder.store(constant(0.0), place)
        return made

    def add_products(
        self, sums: Sums, steps: Any, left: Callable[[int, Any], Any], right: Callable[[Any], Any]
    ) -> None:
        """Adds a product to a tile.

        Args:
            sums: the tile.
            steps: the product's inner length.
            left: pointer to the number of a row in a step.
            right: pointer to the first of a step's ``COLUMNS`` numbers.
        """
        builder = self.builder
        with cgutils.for_range(builder, steps, intp=INDEX) as loop:
            start = right(loop.index)
            taken = [self.load(start, INDEX(part * LANES)) for part in range(2)]
            for row, places in enumerate(sums):
                value = self.spread(builder.load(left(row, loop.index)))
                for part, place in enumerate(places):
                    builder.store(self.fma(value, taken[part], builder.load(place)), place)

    def fetch(self, address: Any) -> None:
        """Asks for the cache line at an address, which may lie outside of any array."""
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(function, [self.builder.bitcast(address, byte), INT32(0), INT32(3), INT32(1)])

    def every(self, count: Any, step: int) -> Any:
        """A loop over each ``step``-th number below ``count``."""
        return cgutils.for_range_slice(self.builder, INDEX(0), count, INDEX(step), INDEX)


def constant(value: float) -> Any:
    """A vector that holds the number in all lanes."""
    return ir.Constant(VECTOR, [value] * LANES)


@intrinsic
def fetch(typing_context: Any, array: Any, position: Any, lines: Any) -> Any:
    """Asks for cache lines from ``array.flat[position]`` on, which may lie outside of the array.

    Args:
        array: C-contiguous.
        position: int64.
        lines: int64, how many.
    """
    signature = types.void(array, types.int64, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = VectorCode(context, builder, signature, arguments)
        byte = ir.IntType(8).as_pointer()
        start = builder.bitcast(builder.gep(code.data(0), [arguments[1]]), byte)
        with cgutils.for_range(builder, arguments[2], intp=INDEX) as loop:
            code.fetch(builder.gep(start, [builder.mul(loop.index, INDEX(4 * LINE))]))
        return context.get_dummy_value()

    return signature, generate
