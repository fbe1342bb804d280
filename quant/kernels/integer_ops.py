"""The inner products of `integer_cpu`, made of LLVM's own operations for the instruction set that the machine has.

A vector holds `lanes` outputs of four inputs each; it is multiplied with four inputs of a row, broadcast, and the four
products of a lane are added to a 32-bit integer: in one instruction with AVX512-VNNI, AVX-VNNI or the dot products of
64-bit ARM, in two or three with AVX2. Numba's own types know none of these. All functions here work inside `numba.njit`
only, on flat C-contiguous arrays and element offsets; nothing is bounds-checked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.kernels.arrays import LINE_BYTES
from quant.kernels.gates_ops import output_columns, write_tile
from quant.kernels.rounded_torch import GROUPS, MIN_ROUNDED
from quant.kernels.simd import array_data, enabled_features, next_tile_part, prefetch_at, spread

INPUTS = 4
"""Inputs whose products with one output share a 32-bit lane."""
CHUNK = 32
"""Inputs that the unrolled inner body takes."""
FEW_ROWS = 2
"""Up to as many rows a tile waits for memory: weights are asked for `AHEAD_OF_FEW` bytes before their use, into the L1
cache. One core of Zen 4 reads 8-bit weights at 20 to 25 GB/s (11 to 17 with longer distances or without), where
torch sums an array at 25 to 33. More rows leave time to ask for the next tile, into the L2 cache."""
AHEAD_OF_FEW = {8: 512, 4: 4096}
"""Bytes, by the bits of a weight. One core of Zen 5 reads 4-bit weights 5 to 14 % faster from afar."""
AHEAD_OF_A_BLOCK = 8192
"""Bytes, for weights of a tile that one block of rows reads, into the L2 cache: a thread waits for no more than so many
when it begins. A call with 8 rows of 896 x 4,864 weights of 8 bits takes 0.8 to 0.85 of what it does a tile ahead, and
6 to 12 KB are alike; of 37,888 x 3,584 weights of 4 bits 0.8 to 0.9."""

I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
ROUNDER = 12582912.0
"""1.5 * 2^23: a float32 of at most 2^22 that is added to it is rounded to the nearest even integer in its low bits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Instructions:
    """An instruction set: `rows` rows times `units * lanes` outputs is the largest tile.

    Its integer sums have registers; those of floats, which are added to once for a group of inputs, may wait in memory.
    """

    feature: str
    lanes: int
    rows: int
    units: int
    is_signed: bool = False
    """Whether weights of 8 bits are taken as they are, not plus 128."""
    product: str | None = None
    """LLVM's name of the one instruction that adds four products to every lane, if there is one."""


INSTRUCTIONS = (
    Instructions("avx512vnni", lanes=16, rows=8, units=2, product="llvm.x86.avx512.vpdpbusd.512"),
    Instructions("avxvnni", lanes=8, rows=4, units=2, product="llvm.x86.avx512.vpdpbusd.256"),
    Instructions("avx2", lanes=8, rows=4, units=2, is_signed=True),
    Instructions("dotprod", lanes=4, rows=4, units=4, is_signed=True, product="llvm.aarch64.neon.sdot.v4i32.v16i8"),
)


def find_instructions() -> Instructions | None:
    """The best set that Numba compiles for on this machine; None: there is none that these kernels know."""
    enabled = enabled_features()
    return next((instructions for instructions in INSTRUCTIONS if instructions.feature in enabled), None)


class Builder:
    """LLVM operations on `lanes` lanes."""

    def __init__(self, builder: Any, isa: Instructions) -> None:
        self.b, self.isa = builder, isa
        self.i32 = ir.VectorType(I32, isa.lanes)
        self.i16 = ir.VectorType(I16, 2 * isa.lanes)
        self.i8 = ir.VectorType(I8, 4 * isa.lanes)
        self.f32 = ir.VectorType(F32, isa.lanes)

    def constant(self, vector: ir.VectorType, value: float) -> ir.Constant:
        return ir.Constant(vector, [value] * vector.count)

    def call(self, name: str, result: Any, *operands: Any) -> Any:
        signature = ir.FunctionType(result, [operand.type for operand in operands])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, signature, name), operands)

    def load(self, data: Any, offset: Any, kind: Any) -> Any:
        """`kind` at element `offset` of a typed pointer, at any address."""
        value = self.b.load(self.b.bitcast(self.b.gep(data, [offset]), kind.as_pointer()))
        value.align = 1
        return value

    def store(self, value: Any, data: Any, offset: Any) -> None:
        written = self.b.store(value, self.b.bitcast(self.b.gep(data, [offset]), value.type.as_pointer()))
        written.align = 4

    def splat(self, scalar: Any) -> Any:
        return spread(self.b, scalar, self.isa.lanes)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.call(f"llvm.fma.v{self.isa.lanes}f32", self.f32, x, y, z)

    def numbers(self, data: Any, offset: Any, dtype: Any) -> Any:
        """Stored scales as float32, stored zero points as int32."""
        lanes = self.isa.lanes
        if dtype == types.float32:
            return self.load(data, offset, self.f32)
        if dtype == types.int16:  # bits of a float16
            return self.b.fpext(self.load(data, offset, ir.VectorType(ir.HalfType(), lanes)), self.f32)
        if dtype == types.uint16:  # bits of a bfloat16
            wide = self.b.zext(self.load(data, offset, ir.VectorType(I16, lanes)), self.i32)
            return self.b.bitcast(self.b.shl(wide, self.constant(self.i32, 16)), self.f32)
        if dtype == types.int8:
            return self.b.sext(self.load(data, offset, ir.VectorType(I8, lanes)), self.i32)
        return self.load(data, offset, self.i32)

    def weights(self, data: Any, offset: Any, bits: int, ahead: int | None) -> list[Any]:
        """A chunk's weights of a unit, a vector of 4 * lanes bytes for each four inputs, units by turns.

        Those `ahead` bytes on are asked for.
        """
        size = 4 * self.isa.lanes * self.isa.units
        at = [self.b.add(offset, ir.Constant(offset.type, step * size)) for step in range(CHUNK * bits // 32)]
        for place in at if ahead is not None else []:
            prefetch_at(self.b, data, self.b.add(place, ir.Constant(offset.type, ahead)), is_near=True)
        if bits == 8:
            return [self.load(data, place, self.i32) for place in at]
        mask, shift = self.constant(self.i32, 0x0F0F0F0F), self.constant(self.i32, 4)
        pairs = [self.load(data, place, self.i32) for place in at]
        return [
            half for pair in pairs for half in (self.b.and_(pair, mask), self.b.and_(self.b.lshr(pair, shift), mask))
        ]

    def add_products(self, totals: Any, w: Any, x: Any, bits: int) -> Any:
        """totals + four products for every lane; w is unsigned, but for 8 bits where the set is signed.

        AVX2 with 4 bits: totals are 16 bits wide, two for each lane, which hold the products of a chunk.
        """
        if self.isa.product is not None and not self.isa.is_signed:
            return self.call(self.isa.product, self.i32, totals, w, x)
        w, x = self.b.bitcast(w, self.i8), self.b.bitcast(x, self.i8)
        if self.isa.product is not None:
            return self.call(self.isa.product, self.i32, totals, w, x)
        if bits == 4:
            return self.b.add(totals, self.call("llvm.x86.avx2.pmadd.ub.sw", self.i16, w, x))
        # the first factor is taken for unsigned: its sign goes to the other one
        x = self.call("llvm.x86.avx2.psign.b", self.i8, x, w)
        w = self.call(f"llvm.abs.v{4 * self.isa.lanes}i8", self.i8, w, ir.Constant(ir.IntType(1), 0))
        return self.b.add(totals, self.sum_pairs(self.call("llvm.x86.avx2.pmadd.ub.sw", self.i16, w, x)))

    def sum_pairs(self, pairs: Any) -> Any:
        return self.call("llvm.x86.avx2.pmadd.wd", self.i32, pairs, self.constant(self.i16, 1))


def make_tile(isa: Instructions, rows: int, *, is_fetching: bool = True) -> Any:
    """`rows` rows times `units * lanes` outputs, as a Numba intrinsic.

    x int8 [*, k_size], x_scales and x_sums [*, k_size / group], from `row`; w packed weights, of 8 bits in an int8
    array, of 4 bits in a uint8 array; scales and zeros [*, num_groups, lanes]; bias [outputs], out [*, width]; `tile`
    counts tiles of outputs, `gates` and `width` are those of `gates_ops.write_tile`. A flat array of scales says that
    there is one group: its scales are applied at the end.
    More than a few rows ask for one `part` of `parts` of the next tile's weights meanwhile (`work_split.fetched_part`)
    if `is_fetching`; that takes a twelfth of the time of the products.
    """
    units = isa.units

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typing_context,
        x,
        x_scales,
        x_sums,
        row,
        group,
        w,
        scales,
        zeros,
        num_groups,
        bias,
        out,
        tile,
        gates,
        width,
        k_size,
        part,
        parts,
    ):
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            v = Builder(builder, isa)
            b = builder
            lanes = isa.lanes
            arrays = (0, 1, 2, 5, 6, 7, 9, 10)
            data = [array_data(context, builder, signature, args, index) for index in arrays]
            x_data, x_scale_data, x_sum_data, w_data, scale_data, zero_data, bias_data, out_data = data
            row, group, num_groups, tile, gates, width, k_size, part, parts = (
                args[index] for index in (3, 4, 8, 11, 12, 13, 14, 15, 16)
            )
            w_type, scale_array, zero_type = signature.args[5].dtype, signature.args[6], signature.args[7].dtype
            bits, is_grouped = 8 if w_type == types.int8 else 4, scale_array.ndim > 1
            # Integers may be added in any order: one row of 4 bits waits for its own sums otherwise.
            chains = 2 if rows == 1 and bits == 4 and isa.product is not None else 1
            intp = k_size.type

            def number(value: int) -> ir.Constant:
                return ir.Constant(intp, value)

            row_count, unit_count = range(rows), range(units)
            sums = {(r, u): cgutils.alloca_once(b, v.f32) for r in row_count for u in unit_count}
            totals = {(*key, c): cgutils.alloca_once(b, v.i32) for key in sums for c in range(chains)}
            for place in sums.values():
                b.store(v.constant(v.f32, 0.0), place)
            at_row = [b.add(row, number(r)) for r in row_count]
            num_x_groups = b.sdiv(k_size, group)
            x0 = [b.mul(place, k_size) for place in at_row]
            s0 = [b.mul(place, num_x_groups) for place in at_row]
            n = b.mul(tile, number(units * lanes))
            g0 = b.mul(n, num_groups)
            group_stride = [b.mul(b.mul(number(u), num_groups), number(lanes)) for u in unit_count]
            tile_stride = b.mul(num_groups, number(units * lanes))
            x_groups_each = b.sdiv(num_x_groups, num_groups)
            chunks_each = b.sdiv(group, number(CHUNK))
            chunk_bytes = units * CHUNK * lanes * bits // 8
            tile_bytes = b.mul(b.sdiv(k_size, number(CHUNK)), number(chunk_bytes))
            w0 = b.mul(tile, tile_bytes)
            fetched, fetched_step = next_tile_part(b, w0, tile_bytes, part, parts, LINE_BYTES)
            if bits == 8 or rows == isa.rows:  # fewer rows of 4 bits are as fast a tile ahead
                is_only_block = b.icmp_signed("==", parts, number(1))
                fetched = b.select(is_only_block, b.add(w0, number(AHEAD_OF_A_BLOCK)), fetched)

            def group_numbers(g: Any, u: int) -> Any:
                return b.add(b.add(g0, group_stride[u]), b.mul(g, number(lanes)))

            is_halved = isa.product is None and bits == 4

            def start_chunk(place: Any) -> Any:
                return v.constant(v.i16, 0) if is_halved else b.load(place)

            def end_chunk(total: Any, place: Any) -> Any:
                return b.add(b.load(place), v.sum_pairs(total)) if is_halved else total

            factor = [v.numbers(scale_data, group_numbers(number(0), u), scale_array.dtype) for u in unit_count]
            with cgutils.for_range(b, num_groups) as over_groups:
                g = over_groups.index
                # zero points are taken off by starting below zero
                negative = [b.neg(v.numbers(zero_data, group_numbers(g, u), zero_type)) for u in unit_count]
                if is_grouped and rows <= FEW_ROWS:
                    # A tile ahead: the processor does not see by itself how these two go on beside the weights.
                    for u in unit_count:
                        next_numbers = b.add(group_numbers(g, u), tile_stride)
                        prefetch_at(b, scale_data, next_numbers, is_near=True)
                        prefetch_at(b, zero_data, next_numbers, is_near=True)
                if is_grouped:
                    factors = [v.numbers(scale_data, group_numbers(g, u), scale_array.dtype) for u in unit_count]
                with cgutils.for_range(b, x_groups_each) as over_x_groups:
                    x_group = b.add(b.mul(g, x_groups_each), over_x_groups.index)
                    at = [b.add(s0[r], x_group) for r in row_count]
                    for r in row_count:
                        x_sum = v.splat(v.load(x_sum_data, at[r], I32))
                        for u in unit_count:
                            b.store(b.mul(negative[u], x_sum), totals[r, u, 0])
                            for c in range(1, chains):
                                b.store(v.constant(v.i32, 0), totals[r, u, c])
                    first = b.mul(x_group, group)
                    with cgutils.for_range(b, chunks_each) as over_chunks:
                        k = b.add(first, b.mul(over_chunks.index, number(CHUNK)))
                        chunk_index = b.sdiv(k, number(CHUNK))
                        at_chunk = b.add(w0, b.mul(chunk_index, number(chunk_bytes)))
                        at_units = [b.add(at_chunk, number(u * INPUTS * lanes)) for u in unit_count]
                        ahead = AHEAD_OF_FEW[bits] if rows <= FEW_ROWS else None
                        for line in range(chunk_bytes // LINE_BYTES if is_fetching and rows > FEW_ROWS else 0):
                            index = b.add(b.mul(chunk_index, number(chunk_bytes // LINE_BYTES)), number(line))
                            prefetch_at(b, w_data, b.add(fetched, b.mul(index, fetched_step)))
                        weights = [v.weights(w_data, place, bits, ahead) for place in at_units]
                        chunk = {key: start_chunk(place) for key, place in totals.items()}
                        places = [b.add(x0[r], k) for r in row_count]
                        for step in range(CHUNK // INPUTS):
                            for r in row_count:
                                x_step = v.splat(v.load(x_data, b.add(places[r], number(INPUTS * step)), I32))
                                for u in unit_count:
                                    key = r, u, step % chains
                                    chunk[key] = v.add_products(chunk[key], weights[u][step], x_step, bits)
                        for key, place in totals.items():
                            b.store(end_chunk(chunk[key], place), place)
                    for r in row_count:
                        x_scale = v.splat(v.load(x_scale_data, at[r], F32))
                        for u in unit_count:
                            total = b.load(totals[r, u, 0])
                            for c in range(1, chains):
                                total = b.add(total, b.load(totals[r, u, c]))
                            total = b.sitofp(total, v.f32)
                            if is_grouped:
                                total = v.fma(b.fmul(total, x_scale), factors[u], b.load(sums[r, u]))
                            else:
                                total = v.fma(total, x_scale, b.load(sums[r, u]))
                            b.store(total, sums[r, u])
            columns = output_columns(b, tile, gates, units, lanes)
            added = [v.load(bias_data, column, v.f32) for column in columns]
            results = [[b.load(sums[r, u]) for u in unit_count] for r in row_count]
            if is_grouped:
                results = [[b.fadd(values[u], added[u]) for u in unit_count] for values in results]
            else:
                results = [[v.fma(values[u], factor[u], added[u]) for u in unit_count] for values in results]
            write_tile(b, out_data, row, results, columns, gates, width)
            return context.get_dummy_value()

        at = types.intp
        signature = types.none(x, x_scales, x_sums, at, at, w, scales, zeros, at, bias, out, at, at, at, at, at, at)
        return signature, codegen

    return tile


def _tree(combine: Callable[[Any, Any], Any], values: Sequence[Any]) -> Any:
    """All values combined by pairs: few wait for others."""
    while len(values) > 1:
        values = [combine(*values[i : i + 2]) if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)]
    return values[0]


def make_round_group(lanes: int) -> Any:
    """The rounding of a group's activations, one of `GROUPS`, in vectors of so many, as a Numba intrinsic."""

    @intrinsic
    def round_group(typing_context, x, x0, size, rounded, place, next_line, x_scales, x_sums, s):  # type: ignore[no-untyped-def]
        """Round x[x0 : x0 + size] to int8: the first 64 at `place` of `rounded`, the others `next_line` further on.

        Its scale, and the sum of the integers, go to place `s` of the two others. A NaN or an infinity makes the scale
        NaN.
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            v = Builder(builder, Instructions("", lanes=lanes, rows=1, units=1))
            b = builder
            x_data, rounded_data, scale_data, sum_data = (
                array_data(context, builder, signature, args, index) for index in (0, 3, 6, 7)
            )
            x0, size, place, next_line, s = (args[index] for index in (1, 2, 4, 5, 8))
            rounder = v.constant(v.f32, ROUNDER)

            def make(num_vectors: int) -> None:
                offsets = [index * lanes for index in range(num_vectors)]
                values = [v.load(x_data, b.add(x0, ir.Constant(size.type, offset)), v.f32) for offset in offsets]
                # Magnitudes are ordered as their bits are, and infinity and NaN are above all numbers.
                magnitudes = [b.and_(b.bitcast(value, v.i32), v.constant(v.i32, 0x7FFFFFFF)) for value in values]
                highest = _tree(lambda x, y: b.select(b.icmp_signed(">", x, y), x, y), magnitudes)
                peak_bits = v.call(f"llvm.vector.reduce.smax.v{lanes}i32", I32, highest)
                peak, zero = b.bitcast(peak_bits, F32), ir.Constant(F32, 0.0)
                is_fault = b.icmp_signed(">=", peak_bits, ir.Constant(I32, 0x7F800000))
                scale = b.fmul(peak, ir.Constant(F32, float(np.float32(1 / 127))))
                b.store(b.select(is_fault, ir.Constant(F32, math.nan), scale), b.gep(scale_data, [s]))
                is_zero = b.fcmp_ordered("<", peak, ir.Constant(F32, float(np.float32(MIN_ROUNDED))))
                inverse = v.splat(b.select(is_zero, zero, b.fdiv(ir.Constant(F32, 127.0), peak)))
                integers = []
                for offset, value in zip(offsets, values, strict=True):
                    bits = b.bitcast(b.fadd(b.fmul(value, inverse), rounder), v.i32)
                    integers.append(b.sub(bits, b.bitcast(rounder, v.i32)))
                    line, within = (ir.Constant(size.type, part) for part in divmod(offset, LINE_BYTES))
                    target = b.add(b.add(place, b.mul(line, next_line)), within)
                    v.store(b.trunc(integers[-1], ir.VectorType(I8, lanes)), rounded_data, target)
                total = v.call(f"llvm.vector.reduce.add.v{lanes}i32", I32, _tree(b.add, integers))
                b.store(total, b.gep(sum_data, [s]))

            for group in GROUPS:
                with b.if_then(b.icmp_signed("==", size, ir.Constant(size.type, group))):
                    make(group // lanes)
            return context.get_dummy_value()

        at = types.intp
        signature = types.none(x, at, at, rounded, at, at, x_scales, x_sums, at)
        return signature, codegen

    return round_group
