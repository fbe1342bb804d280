"""Penalties, biases and green lists in Triton: one copy to the device and one launch, one more for a watermark."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from engine.sampling.grammar import WORD_BITS
from engine.sampling.penalties import Adjustments, GreenList, Places, filled
from quant.kernels.launch import launch
from quant.kernels.transfer import to_device

PLACES = 256
"""Places that a program changes."""
PART = 1024
"""Tokens of a row in which a program finds the green ones."""
WORD = tl.constexpr(WORD_BITS)
NUM_COLUMNS = 5
"""Numbers of a place: row, token, penalty, what is subtracted, bias."""


@triton.jit(do_not_specialize=["num_places"])
def adjust_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [all rows, SIZE] float32
    words_ptr,  # [5, num_places] int32: rows, tokens; as bits of float32 penalties, what is subtracted, biases
    num_places,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
):
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    is_there = place < num_places
    words = words_ptr + place
    row = tl.load(words, mask=is_there, other=0).to(tl.int64)
    token = tl.load(words + num_places, mask=is_there, other=0)
    penalty = tl.load(words + 2 * num_places, mask=is_there, other=0).to(tl.float32, bitcast=True)
    subtracted = tl.load(words + 3 * num_places, mask=is_there, other=0).to(tl.float32, bitcast=True)
    bias = tl.load(words + 4 * num_places, mask=is_there, other=0).to(tl.float32, bitcast=True)
    logits = logits_ptr + row * SIZE + token
    value = tl.load(logits, mask=is_there, other=0.0)
    value = tl.where(value < 0.0, value * penalty, tl.div_rn(value, penalty))
    tl.store(logits, value - subtracted + bias, mask=is_there)


@triton.jit(do_not_specialize=["first", "width"])
def green_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [all rows, SIZE] float32
    words_ptr,  # from word `first` on [green lists, width] int32: the row, then a bit for each token, the lowest first
    first,
    width,
    gain,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
):
    words = words_ptr + first + tl.program_id(0).to(tl.int64) * width
    row = tl.load(words).to(tl.int64)
    columns = tl.program_id(1) * PART + tl.arange(0, PART)
    is_inside = columns < SIZE
    bits = tl.load(words + 1 + columns // WORD, mask=is_inside, other=0) >> (columns % WORD)
    is_green = is_inside & ((bits & 1) != 0)
    logits = logits_ptr + row * SIZE + columns
    tl.store(logits, tl.load(logits, mask=is_green, other=0.0) + gain, mask=is_green)


def adjust_logits(logits: torch.Tensor, adjustments: Adjustments) -> None:
    """As `engine.sampling.penalties.AdjustLogits` says."""
    size = logits.shape[1]
    columns = _columns(adjustments.places)
    num_places = len(columns) // NUM_COLUMNS
    green_words = [_green_words(green, size) for green in adjustments.green_lists]
    words = to_device(np.concatenate([columns, *green_words]), logits.device)
    if green_words:
        gain, width = adjustments.green_gain, len(green_words[0])
        grid = len(green_words), -(-size // PART)
        launch(green_kernel, grid, logits, words, len(columns), width, gain, SIZE=size, PART=PART)
    launch(adjust_kernel, (-(-num_places // PLACES),), logits, words, num_places, SIZE=size, PLACES=PLACES)


def _columns(places: Places | None) -> npt.NDArray[np.int32]:
    """The numbers of all places, one kind after the other."""
    if places is None:
        return np.empty(0, np.int32)
    penalties, subtracted, biases = (
        filled(numbers, len(places.rows), neutral)
        for numbers, neutral in ((places.penalties, 1.0), (places.subtracted, 0.0), (places.biases, 0.0))
    )
    integers = places.rows.astype(np.int32), places.token_ids.astype(np.int32)
    return np.concatenate([*integers, *(numbers.view(np.int32) for numbers in (penalties, subtracted, biases))])


def _green_words(green: GreenList, vocab_size: int) -> npt.NDArray[np.int32]:
    """The row, then a bit for each token."""
    is_green = np.zeros(-(-vocab_size // WORD_BITS) * WORD_BITS, np.bool_)
    is_green[green.token_ids] = True
    return np.concatenate([np.array([green.row], np.int32), np.packbits(is_green, bitorder="little").view(np.int32)])
