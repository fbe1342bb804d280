"""AMX, the tile unit of Intel's processors since Sapphire Rapids, as LLVM operations and Numba intrinsics.

A tile is a register of 16 rows of 64 bytes, of which a thread has eight. One instruction multiplies a tile of rows with
one of weights and adds to a third, 16 rows by 16 outputs; it takes 32 inputs of bfloat16 or 64 of 8 bits.

The instruction for bfloat16, `tdpbf16ps`, adds the products of the even inputs and those of the odd ones apart: each
sum begins at 0 and takes one fused multiply-add per input, in order. It adds the two sums, and adds the result to the
total. Numbers below 2^-126 count as 0. Which rows run together changes nothing. Those for 8 bits add integers.

A thread says which rows its tiles have before it uses them (`configure`) and gives them back (`release`). Nothing else
that these kernels call uses tiles, so what they hold stays from one intrinsic to the next.

Numba keeps compiled kernels by the instructions that it compiles for (`COMPILES_AMX`), whether or not Linux gives a
process the tiles (`HAS_AMX`). So no kernel may ask for the latter: those that have another way are told by an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llvmlite.ir as ir
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.arrays import LINE_BYTES
from quant.kernels.simd import I32, enabled_features

TILE_ROWS = 16
UNITS = 2
OUTPUTS = TILE_ROWS * UNITS
"""Outputs of a matrix's tile, of which a tile of AMX has a unit: a lane of 32 bits each."""
LANES = OUTPUTS // UNITS
SUMS, ROWS, WEIGHTS = (0, 1, 2, 3), (4, 5), (6, 7)
"""The tiles of a matrix product: what each holds is said where it is multiplied."""
STEP_BYTES = LINE_BYTES
"""Bytes of a row's inputs that an instruction takes."""
BFLOAT16, SIGNED_BY_UNSIGNED = "llvm.x86.tdpbf16ps", "llvm.x86.tdpbsud"
"""LLVM's names of the products; the second multiplies int8 rows with uint8 weights."""

_FEATURES = {"amx-tile", "amx-bf16", "amx-int8", "avx512bf16", "avx512dq", "avx512vnni"}
_CONFIG_BYTES, _ROW_BYTES_AT, _ROWS_AT = 64, 16, 48
"""Places in the memory that the shapes of tiles are loaded from, and its size first."""
_I8, _I16, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)
_BYTES = _I8.as_pointer()


COMPILES_AMX = _FEATURES <= enabled_features()
"""Whether there is code for tiles; without their features LLVM would end the process."""
HAS_AMX = COMPILES_AMX and bool(torch.cpu._init_amx())  # pyright: ignore[reportPrivateUsage]
"""Whether this process may use tiles: Linux gives their large registers to those who ask. Not for use in a kernel."""


def _call(b: Any, name: str, *operands: Any) -> None:
    signature = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    b.call(cgutils.get_or_insert_function(b.module, signature, name), operands)


def _tile(index: int) -> ir.Constant:
    return ir.Constant(_I8, index)


def load_tile(b: Any, tile: int, place: Any, stride: Any) -> None:
    """Rows from a pointer on; `stride` is in bytes."""
    _call(b, "llvm.x86.tileloadd64", _tile(tile), b.bitcast(place, _BYTES), stride)


def store_tile(b: Any, tile: int, place: Any, stride: Any) -> None:
    _call(b, "llvm.x86.tilestored64", _tile(tile), b.bitcast(place, _BYTES), stride)


def clear_tile(b: Any, tile: int) -> None:
    _call(b, "llvm.x86.tilezero", _tile(tile))


def load_weights(b: Any, tile: int, unit: int, place: Any) -> None:
    """A step's weights of one unit: of each the step has 16 lines, by turns with the other's, from a pointer on."""
    line = b.gep(b.bitcast(place, _BYTES), [ir.Constant(_I64, unit * LINE_BYTES)])
    load_tile(b, tile, line, ir.Constant(_I64, UNITS * LINE_BYTES))


def add_products(b: Any, product: str, sums: int, rows: int, weights: int) -> None:
    """Add the products of a tile of rows and one of weights to one of sums."""
    _call(b, product, _tile(sums), _tile(rows), _tile(weights))


def shape_tiles(b: Any, shapes: Sequence[tuple[Any, int]]) -> None:
    """Set each tile's rows, an integer of LLVM, and bytes of a row, from tile 0 on."""
    memory = cgutils.alloca_once(b, ir.ArrayType(_I8, _CONFIG_BYTES))
    b.store(ir.Constant(memory.type.pointee, None), memory)
    place = b.bitcast(memory, _BYTES)

    def put(offset: int, value: Any) -> None:
        b.store(value, b.bitcast(b.gep(place, [ir.Constant(I32, offset)]), value.type.as_pointer())).align = 1

    put(0, ir.Constant(_I8, 1))  # the only palette
    for tile, (rows, row_bytes) in enumerate(shapes):
        put(_ROW_BYTES_AT + 2 * tile, ir.Constant(_I16, row_bytes))
        put(_ROWS_AT + tile, b.trunc(rows, _I8))
    _call(b, "llvm.x86.ldtilecfg", place)


@intrinsic
def configure(typing_context, rows):  # type: ignore[no-untyped-def]
    """Give the tiles of sums and of rows so many rows, 16 at most, and those of weights 16."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if COMPILES_AMX:
            all_rows = ir.Constant(args[0].type, TILE_ROWS)
            shape_tiles(b, [(args[0], LINE_BYTES)] * len(SUMS + ROWS) + [(all_rows, LINE_BYTES)] * len(WEIGHTS))
        return context.get_dummy_value()

    return types.none(types.intp), codegen


@intrinsic
def release(typing_context):  # type: ignore[no-untyped-def]
    """Give this thread's tiles back: Linux then need not save their 8 KB when it switches threads."""

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if COMPILES_AMX:
            _call(b, "llvm.x86.tilerelease")
        return context.get_dummy_value()

    return types.none(), codegen
