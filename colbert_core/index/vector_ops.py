"""Vector operations that numba's compiler does not find by itself.

They are written in LLVM's portable vector types, not for one processor: LLVM makes the widest instructions
of the processor at hand of them. A maximum of bytes is 20 times as fast so than as a loop.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

BYTES = 32


@intrinsic
def sum_of_best_bytes(typing_context: Any, codes: Any, begin: Any, end: Any, table: Any, first: Any) -> Any:
    """Sums the columns' largest bytes of ``table[codes[begin:end], first:first + 32]``, as int64.

    Args:
        codes: unsigned ``[tokens]``; one beyond the table counts as its last row.
        begin, end: int64; without any codes between them, the sum is 0.
        table: uint8 ``[rows, lanes]``, C-contiguous.
        first: int64 column.
    """
    signature = types.int64(codes, types.int64, types.int64, table, types.int64)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        index, vector = ir.IntType(64), ir.VectorType(ir.IntType(8), BYTES)
        rows, cells = (
            context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 3)
        )
        count, lanes = cgutils.unpack_tuple(builder, cells.shape, 2)
        last = builder.sub(count, ir.Constant(index, 1))
        best = cgutils.alloca_once_value(builder, ir.Constant(vector, [0] * BYTES))
        with cgutils.for_range_slice(builder, arguments[1], arguments[2], ir.Constant(index, 1), index) as (
            position,
            _,
        ):
            row = builder.zext(builder.load(builder.gep(rows.data, [position])), index)
            row = builder.select(builder.icmp_unsigned("<", row, last), row, last)
            place = builder.add(builder.mul(row, lanes), arguments[4])
            cell = builder.bitcast(builder.gep(cells.data, [place]), vector.as_pointer())
            old, new = builder.load(best), builder.load(cell, align=1)
            builder.store(builder.select(builder.icmp_unsigned(">", new, old), new, old), best)
        # No sum of so many bytes exceeds 16 bits.
        wide = ir.VectorType(ir.IntType(16), BYTES)
        kind = ir.FunctionType(ir.IntType(16), [wide])
        add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.add.v{BYTES}i16")
        return builder.zext(builder.call(add, [builder.zext(builder.load(best), wide)]), index)

    return signature, generate
