"""The operations between matrices in Triton: one launch for each, a program for each row or part of one.

A row is reduced by one program over a tile of its whole width, so its sums do not depend on the other rows. Numbers are
float32 in between, and rounded where the torch reference rounds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.layers.base import Rotation
from engine.layers.experts_torch import TorchExpertOps
from quant.kernels.launch import launch

PRODUCT_BLOCK = 1024


@triton.jit
def norm_kernel(  # type: ignore[no-untyped-def]
    residual_ptr,  # [rows, SIZE]
    x_ptr,  # [rows, SIZE], added to the residual where HAS_X
    weight_ptr,  # [SIZE]
    out_ptr,  # [rows, SIZE]
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_X: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, BLOCK)
    is_inside = columns < SIZE
    value = tl.load(residual_ptr + row + columns, mask=is_inside, other=0.0)
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    if HAS_X:
        x = tl.load(x_ptr + row + columns, mask=is_inside, other=0.0)
        value = (value.to(tl.float32) + x.to(tl.float32)).to(dtype)
        tl.store(residual_ptr + row + columns, value, mask=is_inside)
    wide = value.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + columns, (normed * weight).to(dtype), mask=is_inside)


@triton.jit(do_not_specialize=["width"])
def head_norm_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [tokens, width], the first heads are normed in place
    weight_ptr,  # [heads, SIZE]
    width,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(1)
    place = tl.arange(0, BLOCK)
    is_inside = place < SIZE
    first = qkv_ptr + tl.program_id(0).to(tl.int64) * width + head * SIZE + place
    wide = tl.load(first, mask=is_inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    normed = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + head * SIZE + place, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(first, (normed * weight).to(dtype), mask=is_inside)


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr,  # [rows, 2 * SIZE]
    out_ptr,  # [rows, SIZE]
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < SIZE
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + columns, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + columns, mask=is_inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * SIZE + columns, (silu * up).to(dtype), mask=is_inside)


@triton.jit(do_not_specialize=["width"])
def rotate_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [tokens, width], the first heads are rotated in place
    cos_ptr,  # [positions, HALF] float32
    sin_ptr,
    rows_ptr,  # [tokens] int64: the row of cos and sin
    width,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    is_inside = place < HALF
    table_row = tl.load(rows_ptr + token) * HALF + place
    cos = tl.load(cos_ptr + table_row, mask=is_inside, other=0.0)
    sin = tl.load(sin_ptr + table_row, mask=is_inside, other=0.0)
    first = qkv_ptr + token * width + tl.program_id(1) * 2 * HALF + place
    low = tl.load(first, mask=is_inside, other=0.0).to(tl.float32)
    high = tl.load(first + HALF, mask=is_inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    tl.store(first, (low * cos - high * sin).to(dtype), mask=is_inside)
    tl.store(first + HALF, (high * cos + low * sin).to(dtype), mask=is_inside)


class TritonOps(TorchExpertOps):
    """`base.Ops` in Triton; the operations of experts in torch."""

    def look_up(self, table: torch.Tensor, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return table[token_ids].to(dtype)

    def take_rows(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x[rows]

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual.add_(x)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return _norm(x, None, weight, eps)

    def add_rms_norm(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return _norm(residual, x, weight, eps)

    def norm_heads(self, qkv: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        num_heads, size = weight.shape
        grid = qkv.shape[0], num_heads
        arguments = qkv, weight, qkv.shape[1], eps
        launch(head_norm_kernel, grid, *arguments, SIZE=size, BLOCK=_power_of_two(size), num_warps=1)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        launch(product_kernel, (rows, -(-size // PRODUCT_BLOCK)), gate_up, out, SIZE=size, BLOCK=PRODUCT_BLOCK)
        return out

    def rotate(self, qkv: torch.Tensor, rotation: Rotation, num_heads: int) -> None:
        table = rotation.table
        half = table.cos.shape[1]
        arguments = qkv, table.cos, table.sin, rotation.rows, qkv.shape[1]
        launch(rotate_kernel, (qkv.shape[0], num_heads), *arguments, HALF=half, BLOCK=_power_of_two(half))


def _norm(residual: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows, size = residual.shape
    out = torch.empty_like(residual)
    launch(
        norm_kernel,
        (rows,),
        residual,
        residual if x is None else x,
        weight,
        out,
        eps,
        SIZE=size,
        BLOCK=_power_of_two(size),
        HAS_X=x is not None,
        num_warps=8,
    )
    return out


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
