"""Pure functions between stored words, small integers and the packed layouts of `quant.base.PackedWeight`."""

from __future__ import annotations

import torch

from quant.base import PackedWeight

WORD_BITS = 32
BITS = (2, 3, 4, 8)
"""Widths of the fields in stored words."""
NIBBLE_CHUNK = 16
"""Inputs in eight bytes of the "int4" layout; a group must be a multiple of it."""
BYTE_CHUNK = 8
OUTPUTS_AT_A_TIME = 8192
"""Outputs that are widened together: more would need several times the memory of the packed head."""


def unpack_words(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Unpack int32 words to the unsigned fields in them, uint8; `dim` becomes 32 / bits times as long.

    Fields are counted from the least significant bits of a stream of words, so that 3-bit fields cross word borders
    as AutoGPTQ writes them.
    """
    words = words.movedim(dim, 0).contiguous()
    num_words = words.shape[0]
    num_fields = num_words * WORD_BITS // bits
    period_words = bits if WORD_BITS % bits else 1  # words after which the pattern repeats
    period_fields = period_words * WORD_BITS // bits
    fields = torch.empty((num_fields, *words.shape[1:]), dtype=torch.uint8)
    for index in range(period_fields):
        word, shift = divmod(index * bits, WORD_BITS)
        # shifting an int32 right keeps its sign: the mask cuts that off
        value = words[word::period_words] >> shift
        if shift + bits > WORD_BITS:
            low_bits = WORD_BITS - shift
            value = (value & ((1 << low_bits) - 1)) | (words[word + 1 :: period_words] << low_bits)
        fields[index::period_fields] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return fields.movedim(0, dim).contiguous()


def pack_words(fields: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Pack fields to words, the inverse of `unpack_words`; the fields along `dim` must fill whole words."""
    fields = fields.movedim(dim, 0).to(torch.int64)
    num_words = fields.shape[0] * bits // WORD_BITS
    words = torch.zeros((num_words, *fields.shape[1:]), dtype=torch.int64)
    period_words = bits if WORD_BITS % bits else 1
    period_fields = period_words * WORD_BITS // bits
    for index in range(period_fields):
        word, shift = divmod(index * bits, WORD_BITS)
        value = fields[index::period_fields]
        words[word::period_words] |= (value << shift) & 0xFFFFFFFF
        if shift + bits > WORD_BITS:
            words[word + 1 :: period_words] |= value >> (WORD_BITS - shift)
    return as_words(words).movedim(0, dim).contiguous()


def as_words(numbers: torch.Tensor) -> torch.Tensor:
    """The int32 with the same bits as unsigned 32-bit numbers in int64."""
    return torch.where(numbers >= 1 << 31, numbers - (1 << 32), numbers).to(torch.int32)


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """Pack q [n, k] of 0 to 15 to uint8 [n, k / 2]; k is a multiple of 16."""
    chunks = q.to(torch.uint8).reshape(q.shape[0], -1, 2, 8)
    return (chunks[:, :, 0] | (chunks[:, :, 1] << 4)).flatten(1)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Unpack uint8 [n, k / 2] to q [n, k], the inverse of `pack_nibbles`."""
    chunks = packed.reshape(packed.shape[0], -1, 8)
    return torch.stack([chunks & 15, chunks >> 4], dim=2).flatten(1)


def pack_groups(
    q: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    *,
    bits: int,
    group_of_input: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> PackedWeight:
    """Choose the layout for `scales * (q - zero_points)`: q [n, k] unsigned, scales and zero_points [n, groups].

    `group_of_input` [k] is the group of each input; None: k / groups inputs each, in order. Groups whose inputs are
    unordered are gathered by `input_order`. Groups that no kernel can read, of unequal or odd size, become dense.
    """
    num_inputs, num_groups = q.shape[1], scales.shape[1]
    order = None
    if group_of_input is not None and not _is_plain(group_of_input, num_groups):
        order = torch.argsort(group_of_input, stable=True)
    group_size, remainder = divmod(num_inputs, num_groups)
    is_even = not remainder
    if order is not None:
        counts = torch.bincount(group_of_input.to(torch.int64), minlength=num_groups)  # type: ignore[union-attr]
        is_even = is_even and bool((counts == group_size).all())
    chunk = NIBBLE_CHUNK if bits <= 4 else BYTE_CHUNK
    if not is_even or group_size % chunk:
        return _dense(q, scales, zero_points, group_of_input, bias)
    if order is not None:
        q = q[:, order]
    zero_points = zero_points.to(torch.int32)
    if bits <= 4:
        return PackedWeight("int4", pack_nibbles(q), bias, scales, zero_points.to(torch.int8), order)
    signed = (q.to(torch.int16) - 128).to(torch.int8)
    return PackedWeight("int8", signed, bias, scales, zero_points - 128, order)


def are_groups_in_order(group_of_input: torch.Tensor, group_size: int) -> bool:
    """Whether inputs [k] lie group after group, `group_size` (-1: all) in each, the last one perhaps short."""
    if group_size == -1:
        return not group_of_input.any()
    return torch.equal(group_of_input.to(torch.int64), torch.arange(group_of_input.shape[0]) // group_size)


def _is_plain(group_of_input: torch.Tensor, num_groups: int) -> bool:
    """Whether the groups lie one after the other, in order, with equally many inputs."""
    num_inputs = group_of_input.shape[0]
    if num_inputs % num_groups:
        return False
    plain = torch.arange(num_inputs, device=group_of_input.device) // (num_inputs // num_groups)
    return torch.equal(group_of_input.to(torch.int64), plain)


def _dense(
    q: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    group_of_input: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> PackedWeight:
    if group_of_input is None:
        group_size = -(-q.shape[1] // scales.shape[1])
        group_of_input = torch.arange(q.shape[1]) // group_size
    columns = group_of_input.to(torch.int64)
    weight = (q.to(torch.float32) - zero_points.to(torch.float32)[:, columns]) * scales.to(torch.float32)[:, columns]
    return PackedWeight("dense", weight, bias)


def widen(packed: PackedWeight) -> torch.Tensor:
    """The float32 weight [n, k] in the order of the inputs as the layer gets them."""
    if packed.layout == "dense":
        return packed.weight.to(torch.float32)
    assert packed.scales is not None and packed.zero_points is not None
    if packed.layout == "fp8":
        q = packed.weight.view(torch.float8_e4m3fn)
    else:
        q = unpack_nibbles(packed.weight) if packed.layout == "int4" else packed.weight
    grouped, scales = q.to(torch.float32).reshape(*packed.scales.shape, -1), packed.scales.to(torch.float32)[:, :, None]
    zero_points = packed.zero_points.to(torch.float32)[:, :, None]
    has_offsets = packed.zero_points.is_floating_point()
    weight = (grouped * scales - zero_points if has_offsets else (grouped - zero_points) * scales).flatten(1)
    if packed.input_order is None:
        return weight
    in_order = torch.empty_like(weight)
    in_order[:, packed.input_order] = weight
    return in_order
