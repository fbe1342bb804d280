"""x @ weight.T for many rows of x: the weight is widened to the dtype of x, and the device's own library multiplies.

Some outputs at a time, so that the widened weight needs little memory. With many rows the arithmetic takes longer than
reading and writing the weight once more. The library chooses its kernels by the number of rows, so unlike in
`skinny_triton` the bits of a row may depend on how many rows there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quant.base import PackedWeight
from quant.kernels.launch import launch
from quant.kernels.skinny_triton import load_group
from quant.packing import OUTPUTS_AT_A_TIME

BLOCK_OUTPUTS, BLOCK_INPUTS = 16, 256


@triton.jit(do_not_specialize=["first_output", "num_outputs"])
def widen_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,  # [all outputs, num_inputs], int4: half as many bytes
    scales_ptr,  # [all outputs, num_inputs / GROUP], GROUP 0: [all outputs, 1]
    zeros_ptr,  # like scales
    out_ptr,  # [num_outputs, num_inputs]
    first_output,
    num_outputs,
    num_inputs,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """scale * (q - zero) for `num_outputs` outputs from `first_output` on."""
    rows = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    inputs = tl.program_id(1) * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
    outputs = first_output + rows
    is_output = rows < num_outputs
    is_input = inputs < num_inputs
    mask = is_output[:, None] & is_input[None, :]
    scale, zero = load_group(
        scales_ptr, zeros_ptr, outputs, inputs, is_output, is_input, 0, num_inputs, GROUP, GROUP > 0
    )
    weight_rows = outputs[:, None].to(tl.int64)
    if LAYOUT == "int4":
        byte = inputs // 16 * 8 + inputs % 8
        pairs = tl.load(weight_ptr + weight_rows * (num_inputs // 2) + byte[None, :], mask=mask, other=0).to(tl.int16)
        q = tl.where((inputs % 16 < 8)[None, :], pairs & 15, pairs >> 4)
    else:
        q = tl.load(weight_ptr + weight_rows * num_inputs + inputs[None, :], mask=mask, other=0).to(tl.int16)
    wide = (q - zero).to(tl.float32) * scale
    where = out_ptr + rows[:, None].to(tl.int64) * num_inputs + inputs[None, :]
    tl.store(where, wide.to(out_ptr.dtype.element_ty), mask=mask)


def widened_product(packed: PackedWeight, group_size: int, x: torch.Tensor, out: torch.Tensor) -> None:
    """x [rows, num_inputs] @ weight.T + bias into `out` [rows, num_outputs]."""
    if packed.input_order is not None:
        x = x.index_select(1, packed.input_order)
    num_outputs = out.shape[1]
    for first in range(0, num_outputs, OUTPUTS_AT_A_TIME):
        part = slice(first, min(first + OUTPUTS_AT_A_TIME, num_outputs))
        if packed.layout == "dense":
            weight = packed.weight[part].to(x.dtype)
        else:
            weight = _widened(packed, group_size, part, x.dtype)
        product = _product(x, weight, out.dtype)
        out[:, part] = product if packed.bias is None else product.add_(packed.bias[part])


def _widened(packed: PackedWeight, group_size: int, part: slice, dtype: torch.dtype) -> torch.Tensor:
    num_outputs, num_inputs = part.stop - part.start, packed.num_inputs
    wide = packed.weight.new_empty(num_outputs, num_inputs, dtype=dtype)
    launch(
        widen_kernel,
        (-(-num_outputs // BLOCK_OUTPUTS), -(-num_inputs // BLOCK_INPUTS)),
        packed.weight,
        packed.scales,
        packed.zero_points,
        wide,
        part.start,
        num_outputs,
        num_inputs,
        LAYOUT=packed.layout,
        GROUP=group_size,
        BLOCK_OUTPUTS=BLOCK_OUTPUTS,
        BLOCK_INPUTS=BLOCK_INPUTS,
    )
    return wide


def _product(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """x @ weight.T; sums are float32, and only GPUs give them out unrounded."""
    if out_dtype != x.dtype and x.device.type != "cpu":
        return torch.mm(x, weight.T, out_dtype=out_dtype)
    return torch.mm(x, weight.T).to(out_dtype)
