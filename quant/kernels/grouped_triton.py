"""Grouped products in Triton: a program for some outputs of one row, by the row's matrix.

Which row has which matrix is data on the device: the launch depends on the number of rows alone, and reads nothing
back. Rows of one matrix read it each for itself, through the cache, and nothing uses tensor cores: that suits decoding,
and makes prompts take long. A row's sums are in one order whatever rows are beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from quant.base import PackedWeight, RowGroups
from quant.kernels.launch import launch
from quant.kernels.matrix_triton import MatrixTriton
from quant.kernels.skinny_triton import load_group

BLOCK_OUTPUTS, BLOCK_INPUTS = 32, 128


@triton.jit
def _integers(weight_ptr, stored, inputs, mask, num_inputs, LAYOUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stored numbers, [outputs, inputs] int16; of fp8 its bits."""
    if LAYOUT == "int4":
        byte = inputs // 16 * 8 + inputs % 8
        pairs = tl.load(weight_ptr + stored * (num_inputs // 2) + byte[None, :], mask=mask, other=0).to(tl.int16)
        return tl.where((inputs % 16 < 8)[None, :], pairs & 15, pairs >> 4)
    return tl.load(weight_ptr + stored * num_inputs + inputs[None, :], mask=mask, other=0).to(tl.int16)


@triton.jit
def _floats(bits):  # type: ignore[no-untyped-def]
    """8-bit floats (e4m3) in float32, from their bits."""
    wide = bits.to(tl.int32)
    exponent, fraction = wide >> 3 & 15, wide & 7
    normal = (((exponent + 120) << 23) | (fraction << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, fraction.to(tl.float32) / 512, normal)
    return tl.where(wide & 128 != 0, -size, size)


@triton.jit(do_not_specialize=["num_outputs"])
def grouped_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [rows, num_inputs]
    weight_ptr,  # [matrices * num_outputs, num_inputs], int4: half as many bytes
    scales_ptr,  # [matrices * num_outputs, num_inputs / GROUP], GROUP 0: [matrices * num_outputs, 1]
    zeros_ptr,  # like scales
    bias_ptr,  # [matrices * num_outputs] float32
    order_ptr,  # [matrices, num_inputs] int32: which input a column of the weight belongs to, where HAS_ORDER
    matrices_ptr,  # [rows] int32
    out_ptr,  # [rows, num_outputs]
    num_outputs,
    num_inputs,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    is_output = outputs < num_outputs
    matrix = tl.load(matrices_ptr + row).to(tl.int64)
    stored = matrix * num_outputs + outputs
    acc = tl.zeros((BLOCK_OUTPUTS,), tl.float32)
    for start in range(0, num_inputs, BLOCK_INPUTS):
        inputs = start + tl.arange(0, BLOCK_INPUTS)
        is_input = inputs < num_inputs
        mask = is_output[:, None] & is_input[None, :]
        columns = inputs
        if HAS_ORDER:
            columns = tl.load(order_ptr + matrix * num_inputs + inputs, mask=is_input, other=0)
        x = tl.load(x_ptr + row * num_inputs + columns, mask=is_input, other=0.0).to(tl.float32)
        if LAYOUT == "dense":
            weight = tl.load(weight_ptr + stored[:, None] * num_inputs + inputs[None, :], mask=mask, other=0.0)
            weight = weight.to(tl.float32)
        else:
            scale, zero = load_group(
                scales_ptr, zeros_ptr, stored, inputs, is_output, is_input, start, num_inputs, GROUP, GROUP > 0
            )
            q = _integers(weight_ptr, stored[:, None], inputs, mask, num_inputs, LAYOUT)
            weight = (_floats(q) if LAYOUT == "fp8" else (q - zero).to(tl.float32)) * scale
        acc += tl.sum(weight * x[None, :], 1)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + stored, mask=is_output, other=0.0)
    tl.store(out_ptr + row * num_outputs + outputs, acc.to(out_ptr.dtype.element_ty), mask=is_output)


class GroupedTriton:
    """All layouts, summed in float32."""

    rounding = None
    is_host_driven = False

    @staticmethod
    def why_not(matrices: Sequence[PackedWeight]) -> list[str]:
        return MatrixTriton.why_not(matrices[0])

    def __init__(self, matrices: Sequence[PackedWeight]) -> None:
        first = matrices[0]
        self._layout = first.layout
        self._num_outputs, self._num_inputs = first.weight.shape[0], first.num_inputs
        self._weight = torch.cat([packed.weight for packed in matrices]).contiguous()
        num_groups = 1 if first.scales is None else first.scales.shape[1]
        self._group_size = self._num_inputs // num_groups if num_groups > 1 else 0
        self._scales = _joined([packed.scales for packed in matrices])
        self._zero_points = _joined([packed.zero_points for packed in matrices])
        self._bias = _joined([packed.bias for packed in matrices])
        self._order = _joined([packed.input_order for packed in matrices])

    def __call__(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        out = x.new_empty(x.shape[0], self._num_outputs)
        optional = self._scales, self._zero_points, self._bias, self._order
        launch(
            grouped_kernel,
            (x.shape[0], -(-self._num_outputs // BLOCK_OUTPUTS)),
            x.contiguous(),
            self._weight,
            *(self._weight if tensor is None else tensor for tensor in optional),
            groups.matrices,
            out,
            self._num_outputs,
            self._num_inputs,
            LAYOUT=self._layout,
            GROUP=self._group_size,
            HAS_BIAS=self._bias is not None,
            HAS_ORDER=self._order is not None,
            BLOCK_OUTPUTS=BLOCK_OUTPUTS,
            BLOCK_INPUTS=BLOCK_INPUTS,
        )
        return out


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Numbers of all matrices one after the other, orders of inputs as int32; None: no matrix has any."""
    tensors = [part for part in parts if part is not None]
    if not tensors:
        return None
    joined = torch.cat(tensors).contiguous()
    return joined.to(torch.int32) if joined.dtype == torch.int64 else joined
