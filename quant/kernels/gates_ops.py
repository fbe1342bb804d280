"""How the CPU's kernels write a tile of outputs: as they are, or gates times what they gate.

The first half of a gated matrix's outputs are gates, and each of the other half is to be multiplied with silu(gate),
silu(x) = x / (1 + e^-x). Where a kernel does that itself, twice as many numbers as are needed never go to
memory and back. A tile of such a matrix holds vectors of gates and of what they gate by turns (`gate_order`).
All functions that take a `builder` make LLVM code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir
import torch
from numba.extending import intrinsic

from quant.base import PackedWeight
from quant.kernels.powers import exp_of


def count_gates(packed: PackedWeight, tile_outputs: int) -> int:
    """Number of outputs that are gates; 0: there are none, or they do not fill whole tiles of so many outputs."""
    num_outputs = len(packed.weight)
    return num_outputs // 2 if packed.is_gated and num_outputs % tile_outputs == 0 else 0


def gate_order(num_outputs: int, num_gates: int, lanes: int) -> torch.Tensor:
    """The outputs in the order of tiles, [num_outputs] int64; `num_gates` 0: as they are."""
    outputs = torch.arange(num_outputs)
    return outputs.reshape(2, -1, lanes).transpose(0, 1).flatten() if num_gates else outputs


def gated_of(builder: Any, gate: Any, value: Any) -> Any:
    """silu(gate) * value in every lane."""
    one, zero = (ir.Constant(gate.type, [number] * gate.type.count) for number in (1.0, 0.0))
    below = builder.fadd(one, exp_of(builder, builder.fsub(zero, gate)))
    return builder.fmul(builder.fdiv(gate, below), value)


@intrinsic
def gated(typing_context: Any, gate: Any, value: Any) -> Any:
    """`gated_of` lanes, within `numba.njit`."""
    return gate(gate, value), lambda context, builder, signature, args: gated_of(builder, *args)


def output_columns(builder: Any, tile: Any, gates: Any, units: int, lanes: int) -> list[Any]:
    """The first output of each of a tile's vectors, of a matrix with so many gates; 0: it has none."""

    def number(value: int) -> ir.Constant:
        return ir.Constant(tile.type, value)

    half = units * lanes // 2
    plain = [number(u * lanes) for u in range(units)]
    split = [builder.add(number(u // 2 * lanes), gates) if u % 2 else number(u // 2 * lanes) for u in range(units)]
    has_none = builder.icmp_signed("==", gates, number(0))
    first = builder.mul(tile, builder.select(has_none, number(2 * half), number(half)))
    offsets = [builder.select(has_none, *pair) for pair in zip(plain, split, strict=True)]
    return [builder.add(first, offset) for offset in offsets]


def write_tile(
    builder: Any,
    out: Any,
    first_row: Any,
    rows: Sequence[Sequence[Any]],
    columns: Sequence[Any],
    gates: Any,
    width: Any,
    stride: Any = None,
) -> None:
    """Write the vectors of each row to out, a typed pointer, [*, width] float32, from `first_row` on.

    If `gates` equals `width`, out gets silu(gate) * value alone. Otherwise it gets all outputs, `width` of them.
    Rows begin `stride` after each other where they are not `width` wide.
    """
    stride = width if stride is None else stride

    def put(r: int, column: Any, value: Any) -> None:
        row = builder.add(first_row, ir.Constant(first_row.type, r))
        place = builder.gep(out, [builder.add(builder.mul(row, stride), column)])
        builder.store(value, builder.bitcast(place, value.type.as_pointer())).align = 4

    with builder.if_else(builder.icmp_signed("==", gates, width)) as (gating, plain):
        with gating:
            for r, values in enumerate(rows):
                for gate, value, column in zip(values[::2], values[1::2], columns[::2], strict=True):
                    put(r, column, gated_of(builder, gate, value))
        with plain:
            for r, values in enumerate(rows):
                for value, column in zip(values, columns, strict=True):
                    put(r, column, value)
