"""x @ weight.T for up to 64 rows of x, in Triton: one kernel over the layouts "dense", "int8" and "int4".

The weight is the left operand of the dot product, so that its many outputs fill the tile and the few rows of x are
padded to 16. Stored integers, less their zero point, are exact in 16 bits (at most 256 in absolute value); they are
multiplied with x as they are, and a group's scale is applied to the float32 sum of the group. So weights cost the
bytes that they are stored in and no rounding. Groups that are smaller than the smallest block of inputs are scaled
before they are multiplied, and rounded to the dtype of x.

A tile of outputs may split its inputs over several programs; a second kernel adds the partial sums in the order of the
inputs. No program adds to what another one wrote, sums are float32, and tiles depend on the weight alone: a row is
summed in the same order whatever rows are beside it.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from quant.base import PackedWeight
from quant.kernels.launch import IS_INTERPRETED, launch
from quant.kernels.tuning import Tile

BLOCK_ROWS = (16, 32, 64)
"""Rows to which those of x are padded; `tl.dot` wants at least 16. Each is a program of its own."""
MAX_ROWS = BLOCK_ROWS[-1]
SUM_BLOCK = 256
STAGED_BYTES, MAX_STAGED_BYTES = 60 * 1024, 64 * 1024
"""Shared memory that a program fills with weights and rows on their way, and what any card has for it."""
TILE_X_BYTES = 2
"""Bytes of a number of x that tiles are made for."""


@triton.jit
def dot(a, b, acc, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + a @ b in float32. The interpreter has no bfloat16 arithmetic: `WIDEN` multiplies in float32 there."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _convert(values, x_ptr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers in the dtype of x, or in float32 under the interpreter."""
    if WIDEN:
        return values.to(tl.float32)
    return values.to(x_ptr.dtype.element_ty)


@triton.jit
def _load_x(x_rows, order_ptr, inputs, is_input, is_row, HAS_ORDER: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """x transposed, [inputs, rows]; `order_ptr`: which input of the layer a column of the weight belongs to."""
    columns = inputs
    if HAS_ORDER:
        columns = tl.load(order_ptr + inputs, mask=is_input, other=0)
    x = tl.load(x_rows + columns[:, None], mask=is_input[:, None] & is_row[None, :], other=0.0)
    if WIDEN:
        return x.to(tl.float32)
    return x


@triton.jit
def load_group(  # type: ignore[no-untyped-def]
    scales_ptr,
    zeros_ptr,
    outputs,
    inputs,
    is_output,
    is_input,
    start,
    num_inputs,
    GROUP: tl.constexpr,
    IS_FINE: tl.constexpr,
):
    """Scales in float32 and zero points in int16: of each weight if `IS_FINE`, else [outputs, 1] of the one group.

    `GROUP` inputs have a scale; 0: all of them have the same.
    """
    if IS_FINE:
        where = outputs[:, None].to(tl.int64) * (num_inputs // GROUP) + (inputs // GROUP)[None, :]
        mask = is_output[:, None] & is_input[None, :]
        scale = tl.load(scales_ptr + where, mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + where, mask=mask, other=0).to(tl.int16)
    else:
        where = outputs.to(tl.int64)
        if GROUP:
            where = where * (num_inputs // GROUP) + start // GROUP
        scale = tl.load(scales_ptr + where, mask=is_output, other=0.0).to(tl.float32)[:, None]
        zero = tl.load(zeros_ptr + where, mask=is_output, other=0).to(tl.int16)[:, None]
    return scale, zero


@triton.jit
def _scaled(q, scale, zero, x_ptr, IS_FINE: tl.constexpr, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights to multiply with x: scaled if `IS_FINE`, else the integers, which no dtype of x rounds."""
    number = (q.to(tl.int16) - zero).to(tl.float32)
    if IS_FINE:
        number = number * scale
    return _convert(number, x_ptr, WIDEN)


@triton.jit
def _multiply_int4(  # type: ignore[no-untyped-def]
    x_rows,
    x_ptr,
    weights,  # pointers to the first byte of each output, [BLOCK_OUTPUTS, 1]
    scales_ptr,
    zeros_ptr,
    order_ptr,
    outputs,
    is_output,
    is_row,
    start,
    end,
    num_inputs,
    acc,
    GROUP: tl.constexpr,
    IS_FINE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """acc + the product of BLOCK_INPUTS inputs from `start` on, nothing if they begin at `end`."""
    # Eight bytes hold sixteen inputs: the first eight in the lower halves, the others in the upper ones.
    place = tl.arange(0, BLOCK_INPUTS // 2)
    low = start + place // 8 * 16 + place % 8
    is_input = tl.full(place.shape, start, tl.int32) < end
    is_output = is_output & (tl.full(outputs.shape, start, tl.int32) < end)
    if not IS_EVEN:
        is_input = is_input & (low + 8 < num_inputs)
    mask = is_output[:, None] & is_input[None, :]
    pairs = tl.load(weights + (start // 2 + place)[None, :], mask=mask, other=0).to(tl.int16)
    scale, zero = load_group(
        scales_ptr, zeros_ptr, outputs, low, is_output, is_input, start, num_inputs, GROUP, IS_FINE
    )
    low_x = _load_x(x_rows, order_ptr, low, is_input, is_row, HAS_ORDER, WIDEN)
    high_x = _load_x(x_rows, order_ptr, low + 8, is_input, is_row, HAS_ORDER, WIDEN)
    part = tl.zeros_like(acc)
    part = dot(_scaled(pairs & 15, scale, zero, x_ptr, IS_FINE, WIDEN), low_x, part, WIDEN)
    part = dot(_scaled(pairs >> 4, scale, zero, x_ptr, IS_FINE, WIDEN), high_x, part, WIDEN)
    if not IS_FINE:
        part = part * scale
    return acc + part


@triton.jit
def _multiply(  # type: ignore[no-untyped-def]
    x_rows,
    x_ptr,
    weights,  # pointers to the first number of each output, [BLOCK_OUTPUTS, 1]
    scales_ptr,
    zeros_ptr,
    order_ptr,
    outputs,
    is_output,
    is_row,
    start,
    end,
    num_inputs,
    acc,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    IS_FINE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """acc + the product of BLOCK_INPUTS inputs from `start` on, nothing if they begin at `end`."""
    place = tl.arange(0, BLOCK_INPUTS)
    inputs = start + place
    is_input = tl.full(place.shape, start, tl.int32) < end
    is_output = is_output & (tl.full(outputs.shape, start, tl.int32) < end)
    if not IS_EVEN:
        is_input = is_input & (inputs < num_inputs)
    x = _load_x(x_rows, order_ptr, inputs, is_input, is_row, HAS_ORDER, WIDEN)
    weight = tl.load(weights + inputs[None, :], mask=is_output[:, None] & is_input[None, :], other=0)
    if LAYOUT == "dense":
        return dot(_convert(weight, x_ptr, WIDEN), x, acc, WIDEN)
    scale, zero = load_group(
        scales_ptr, zeros_ptr, outputs, inputs, is_output, is_input, start, num_inputs, GROUP, IS_FINE
    )
    part = dot(_scaled(weight, scale, zero, x_ptr, IS_FINE, WIDEN), x, tl.zeros_like(acc), WIDEN)
    if not IS_FINE:
        part = part * scale
    return acc + part


@triton.jit(do_not_specialize=["num_rows"])
def skinny_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [num_rows, num_inputs]
    weight_ptr,  # [num_outputs, width]
    scales_ptr,  # [num_outputs, num_inputs / GROUP], GROUP 0: [num_outputs, 1]
    zeros_ptr,  # like scales
    order_ptr,  # [num_inputs] int32
    bias_ptr,  # [num_outputs]
    out_ptr,  # [num_rows, num_outputs], or [SPLITS, num_rows, num_outputs] float32
    num_rows,
    num_outputs,
    num_inputs,
    width,  # num_inputs, int4: half as many bytes
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    IS_FINE: tl.constexpr,
    IS_EVEN: tl.constexpr,  # whether blocks fill the inputs: then no mask is in the way of loads of 16 bytes
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of inputs whose loads are started together
    SPLITS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    outputs = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    rows = tl.arange(0, BLOCK_ROWS)
    is_output = outputs < num_outputs
    is_row = rows < num_rows
    split = tl.program_id(1)
    num_blocks = tl.cdiv(num_inputs, BLOCK_INPUTS)
    blocks_per_split = tl.cdiv(num_blocks, SPLITS)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, num_blocks)
    end = last * BLOCK_INPUTS
    x_rows = x_ptr + rows[None, :].to(tl.int64) * num_inputs
    weights = weight_ptr + outputs[:, None].to(tl.int64) * width
    acc = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), dtype=tl.float32)
    for first_block in range(first, last, BLOCKS):
        for number in tl.static_range(BLOCKS):
            start = (first_block + number) * BLOCK_INPUTS
            if LAYOUT == "int4":
                acc = _multiply_int4(
                    x_rows,
                    x_ptr,
                    weights,
                    scales_ptr,
                    zeros_ptr,
                    order_ptr,
                    outputs,
                    is_output,
                    is_row,
                    start,
                    end,
                    num_inputs,
                    acc,
                    GROUP,
                    IS_FINE,
                    IS_EVEN,
                    HAS_ORDER,
                    BLOCK_INPUTS,
                    WIDEN,
                )
            else:
                acc = _multiply(
                    x_rows,
                    x_ptr,
                    weights,
                    scales_ptr,
                    zeros_ptr,
                    order_ptr,
                    outputs,
                    is_output,
                    is_row,
                    start,
                    end,
                    num_inputs,
                    acc,
                    LAYOUT,
                    GROUP,
                    IS_FINE,
                    IS_EVEN,
                    HAS_ORDER,
                    BLOCK_INPUTS,
                    WIDEN,
                )
    if HAS_BIAS:
        if SPLITS == 1:
            acc += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[:, None]
    where = out_ptr + (split * num_rows + rows)[None, :].to(tl.int64) * num_outputs + outputs[:, None]
    tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def sum_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,  # [SPLITS, num_rows, num_outputs] float32
    bias_ptr,  # [num_outputs]
    out_ptr,  # [num_rows, num_outputs]
    num_rows,
    num_outputs,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The partial sums of `skinny_kernel`, added in the order of the inputs."""
    outputs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    is_output = outputs < num_outputs
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        where = (split * num_rows + row).to(tl.int64) * num_outputs + outputs
        acc += tl.load(partial_ptr + where, mask=is_output, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * num_outputs + outputs, acc.to(out_ptr.dtype.element_ty), mask=is_output)


def min_block_inputs(layout: str) -> int:
    """Inputs that a dot product needs at least; the two halves of nibbles are multiplied one after the other."""
    return 32 if layout == "int4" else 16


def loads_under_way(packed: PackedWeight, tile: Tile, block_rows: int, x_bytes: int) -> tuple[int, int]:
    """Blocks of inputs whose loads are started together, and the stages of the loop over them.

    A number of x has `x_bytes`. Few programs reach a card's bandwidth only with many bytes on their way. Neither
    result changes anything about the order of sums, so both may depend on the rows.
    """
    weight_bytes = tile.block_outputs * tile.block_inputs * packed.weight.shape[1] // packed.num_inputs
    stage_bytes = weight_bytes * packed.weight.itemsize + block_rows * tile.block_inputs * x_bytes
    if packed.input_order is not None:
        return 1, tile.num_stages
    if stage_bytes * (tile.num_stages - 1) > MAX_STAGED_BYTES:
        return 1, 2
    num_blocks = max(
        count for count in (1, 2, 4) if count == 1 or count * stage_bytes * tile.num_stages <= STAGED_BYTES
    )
    return num_blocks, tile.num_stages


def tile_for_bytes(tile: Tile, layout: str, x_bytes: int) -> Tile:
    """The tile for numbers of x of so many bytes: wider ones have room for half as many inputs at a time."""
    if x_bytes <= TILE_X_BYTES or tile.block_inputs <= min_block_inputs(layout):
        return tile
    return dataclasses.replace(tile, block_inputs=tile.block_inputs // 2)


def skinny_product(packed: PackedWeight, group_size: int, tile: Tile, x: torch.Tensor, out: torch.Tensor) -> None:
    """x [rows, num_inputs] @ weight.T + bias into `out` [rows, num_outputs], for at most `MAX_ROWS` rows.

    `group_size` inputs have a scale; 0: all of them have the same, or there is none.
    """
    (num_rows, num_outputs), is_split = out.shape, tile.splits > 1
    block_rows = next(count for count in BLOCK_ROWS if count >= num_rows)
    tile = tile_for_bytes(tile, packed.layout, x.itemsize)
    unused = packed.weight
    bias = unused if packed.bias is None else packed.bias
    target = x.new_empty(tile.splits, num_rows, num_outputs, dtype=torch.float32) if is_split else out
    num_blocks, num_stages = loads_under_way(packed, tile, block_rows, x.itemsize)
    launch(
        skinny_kernel,
        (-(-num_outputs // tile.block_outputs), tile.splits),
        x,
        packed.weight,
        unused if packed.scales is None else packed.scales,
        unused if packed.zero_points is None else packed.zero_points,
        unused if packed.input_order is None else packed.input_order,
        bias,
        target,
        num_rows,
        num_outputs,
        packed.num_inputs,
        packed.weight.shape[1],
        LAYOUT=packed.layout,
        GROUP=group_size,
        IS_FINE=group_size % tile.block_inputs > 0,
        IS_EVEN=packed.num_inputs % tile.block_inputs == 0,
        HAS_ORDER=packed.input_order is not None,
        HAS_BIAS=packed.bias is not None,
        BLOCK_OUTPUTS=tile.block_outputs,
        BLOCK_ROWS=block_rows,
        BLOCK_INPUTS=tile.block_inputs,
        BLOCKS=num_blocks,
        SPLITS=tile.splits,
        WIDEN=IS_INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=num_stages,
    )
    if is_split:
        _add_splits(target, bias, out, has_bias=packed.bias is not None)


def _add_splits(partial: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, *, has_bias: bool) -> None:
    num_rows, num_outputs = out.shape
    launch(
        sum_kernel,
        (-(-num_outputs // SUM_BLOCK), num_rows),
        partial,
        bias,
        out,
        num_rows,
        num_outputs,
        HAS_BIAS=has_bias,
        SPLITS=partial.shape[0],
        BLOCK=SUM_BLOCK,
    )
