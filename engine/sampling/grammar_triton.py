"""Masks in Triton: one copy to the device and one launch; what is allowed is neither read nor written."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from engine.sampling.grammar import WORD_BITS, IntArray
from quant.kernels.launch import launch
from quant.kernels.transfer import to_device

PART = 1024
WORD = tl.constexpr(WORD_BITS)


@triton.jit(do_not_specialize=["width"])
def mask_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [all rows, SIZE] float32
    masks_ptr,  # [masked, width] int32: the row, then the words of its mask, the lowest bit first
    width,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
):
    mask = masks_ptr + tl.program_id(0).to(tl.int64) * width
    row = tl.load(mask).to(tl.int64)
    columns = tl.program_id(1) * PART + tl.arange(0, PART)
    is_inside = columns < SIZE
    words = tl.load(mask + 1 + columns // WORD, mask=is_inside, other=-1)
    is_refused = ((words >> (columns % WORD)) & 1) == 0
    ruled_out = tl.full((PART,), float("-inf"), tl.float32)
    tl.store(logits_ptr + row * SIZE + columns, ruled_out, mask=is_inside & is_refused)


def apply_masks(logits: torch.Tensor, rows: IntArray, masks: IntArray) -> None:
    """As `engine.sampling.grammar.ApplyMasks` says."""
    table = to_device(np.column_stack([rows, masks]), logits.device)
    size = logits.shape[1]
    launch(mask_kernel, (len(table), -(-size // PART)), logits, table, table.shape[1], SIZE=size, PART=PART)
