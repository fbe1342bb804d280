"""Words and layouts: round trips, and every reading against plain integer arithmetic."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.packing import pack_groups, pack_nibbles, pack_words, unpack_nibbles, unpack_words, widen

BITS = st.sampled_from([2, 3, 4, 8])


def fields_of(draw: st.DataObject, rows: int, columns: int, bits: int) -> torch.Tensor:
    values = draw.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.uint8).reshape(rows, columns)


@given(data=st.data(), bits=BITS, dim=st.integers(0, 1), num_periods=st.integers(1, 2))
def test_words_round_trip_along_either_dimension(data: st.DataObject, bits: int, dim: int, num_periods: int) -> None:
    shape = (32 * num_periods, 3) if dim == 0 else (3, 32 * num_periods)
    fields = fields_of(data, *shape, bits)
    words = pack_words(fields, bits, dim)
    assert words.dtype == torch.int32
    assert words.shape[dim] == num_periods * bits
    assert torch.equal(unpack_words(words, bits, dim), fields)


@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3), bits=BITS)
def test_fields_are_counted_in_a_stream_of_bits(words: list[int], bits: int) -> None:
    stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
    fields = unpack_words(torch.tensor(words, dtype=torch.int32), bits, 0).tolist()
    assert fields == [stream >> (bits * index) & (2**bits - 1) for index in range(96 // bits)]


@given(data=st.data(), num_chunks=st.integers(1, 3))
def test_nibbles_round_trip(data: st.DataObject, num_chunks: int) -> None:
    q = fields_of(data, 2, 16 * num_chunks, 4)
    packed = pack_nibbles(q)
    assert packed.shape == (2, 8 * num_chunks)
    assert torch.equal(unpack_nibbles(packed), q)


@given(
    data=st.data(),
    bits=BITS,
    num_groups=st.integers(1, 3),
    group_size=st.sampled_from([3, 8, 16, 32]),
    order=st.sampled_from(["none", "plain", "scattered", "uneven"]),
)
def test_a_packed_weight_is_what_its_numbers_say(
    data: st.DataObject, bits: int, num_groups: int, group_size: int, order: str
) -> None:
    num_inputs = num_groups * group_size
    q = fields_of(data, 4, num_inputs, bits)
    generator = torch.Generator().manual_seed(0)
    scales = (torch.rand(4, num_groups, generator=generator) + 0.01).to(torch.float16)
    zero_points = torch.randint(0, 2**bits + 1, (4, num_groups), generator=generator)
    groups = torch.arange(num_inputs) // group_size
    if order == "scattered":
        groups = groups[torch.randperm(num_inputs, generator=generator)]
    elif order == "uneven":
        groups[0] = num_groups - 1
    expected = (q.double() - zero_points.double()[:, groups]) * scales.double()[:, groups]
    given_groups = None if order == "none" else groups.to(torch.int32)
    packed = pack_groups(q, scales, zero_points, bits=bits, group_of_input=given_groups)
    assert torch.equal(widen(packed).double(), expected), "16-bit scales times small integers are exact"
    has_unordered_groups = order == "scattered" and num_groups > 1 and not torch.equal(groups, groups.sort().values)
    if packed.layout != "dense":
        assert (packed.input_order is not None) == has_unordered_groups
        assert packed.layout == ("int4" if bits <= 4 else "int8")
    elif order in ("none", "plain"):
        assert group_size % (16 if bits <= 4 else 8)
