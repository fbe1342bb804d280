"""The blocks of GGUF's types: bytes of a file -> integers, scales and offsets. Pure functions, one row of `TYPES` each.

A block holds some consecutive inputs of one output. A weight is `scale * (q - zero_point)`, with the same zero point in
all blocks of a type, or, where a type stores minimums, `scale * q - offset`. Products of a stored scale (float16) and
those within a block (at most 6 bits) are exact in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

Unpacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""q int8 [blocks, inputs], scales [blocks, groups], offsets [blocks, groups] (None: the type has a zero point)."""

NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The integers behind the 4-bit codes of the IQ4 types."""


def _halves(blocks: torch.Tensor, first: int) -> torch.Tensor:
    """The float16 in two bytes, [blocks, 1]."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16)


def _fields(bytes_: torch.Tensor, width: int, run: int) -> torch.Tensor:
    """Unpack fields of `width` bits: of each `run` bytes first the lowest fields of all, then the next ones."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=bytes_.device)[:, None]
    runs = bytes_.reshape(bytes_.shape[0], -1, 1, run)
    return ((runs >> shifts) & ((1 << width) - 1)).flatten(1)


def _bits(blocks: torch.Tensor, first: int) -> torch.Tensor:
    """Four bytes as 32 bits, the lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return ((blocks[:, first : first + 4, None] >> shifts) & 1).flatten(1)


def _signed(q: torch.Tensor) -> torch.Tensor:
    return q.view(torch.int8)


def _q4_0(blocks: torch.Tensor) -> Unpacked:
    return _signed(_fields(blocks[:, 2:], 4, 16)), _halves(blocks, 0), None


def _q4_1(blocks: torch.Tensor) -> Unpacked:
    return _signed(_fields(blocks[:, 4:], 4, 16)), _halves(blocks, 0), -_halves(blocks, 2).float()


def _q5_0(blocks: torch.Tensor) -> Unpacked:
    return _signed(_fields(blocks[:, 6:], 4, 16) | (_bits(blocks, 2) << 4)), _halves(blocks, 0), None


def _q5_1(blocks: torch.Tensor) -> Unpacked:
    q = _fields(blocks[:, 8:], 4, 16) | (_bits(blocks, 4) << 4)
    return _signed(q), _halves(blocks, 0), -_halves(blocks, 2).float()


def _q8_0(blocks: torch.Tensor) -> Unpacked:
    return _signed(blocks[:, 2:].contiguous()), _halves(blocks, 0), None


def _q2_k(blocks: torch.Tensor) -> Unpacked:
    pairs, scale, minimum = blocks[:, :16], _halves(blocks, 80).float(), _halves(blocks, 82).float()
    return _signed(_fields(blocks[:, 16:80], 2, 32)), scale * (pairs & 15), minimum * (pairs >> 4)


def _q3_k(blocks: torch.Tensor) -> Unpacked:
    q = _fields(blocks[:, 32:96], 2, 32) | (_fields(blocks[:, :32], 1, 32) << 2)
    low, high = _fields(blocks[:, 96:104], 4, 8), _fields(blocks[:, 104:108], 2, 4)
    factors = _signed(low | (high << 4)) - 32
    return _signed(q), _halves(blocks, 108).float() * factors, None


def _factors_and_minimums(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve bytes -> eight factors and eight minimums of six bits each."""
    factors, minimums, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        torch.cat([factors & 63, (both & 15) | ((factors >> 2) & 48)], dim=1),
        torch.cat([minimums & 63, (both >> 4) | ((minimums >> 2) & 48)], dim=1),
    )


def _q4_k(blocks: torch.Tensor) -> Unpacked:
    factors, minimums = _factors_and_minimums(blocks[:, 4:16])
    q = _signed(_fields(blocks[:, 16:], 4, 32))
    return q, _halves(blocks, 0).float() * factors, _halves(blocks, 2).float() * minimums


def _q5_k(blocks: torch.Tensor) -> Unpacked:
    factors, minimums = _factors_and_minimums(blocks[:, 4:16])
    q = _fields(blocks[:, 48:], 4, 32) | (_fields(blocks[:, 16:48], 1, 32) << 4)
    return _signed(q), _halves(blocks, 0).float() * factors, _halves(blocks, 2).float() * minimums


def _q6_k(blocks: torch.Tensor) -> Unpacked:
    q = _fields(blocks[:, :128], 4, 64) | (_fields(blocks[:, 128:192], 2, 32) << 4)
    factors = _signed(blocks[:, 192:208].contiguous())
    return _signed(q), _halves(blocks, 208).float() * factors, None


def _nonlinear(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(NONLINEAR, dtype=torch.int8, device=codes.device)[codes.to(torch.int64)]


def _iq4_nl(blocks: torch.Tensor) -> Unpacked:
    return _nonlinear(_fields(blocks[:, 2:], 4, 16)), _halves(blocks, 0), None


def _iq4_xs(blocks: torch.Tensor) -> Unpacked:
    low, high = _fields(blocks[:, 4:8], 4, 1), _fields(blocks[:, 2:4], 2, 1)
    factors = _signed(low | (high << 4)) - 32
    return _nonlinear(_fields(blocks[:, 8:], 4, 16)), _halves(blocks, 0).float() * factors, None


@dataclasses.dataclass(frozen=True, slots=True)
class BlockType:
    """How a type stores its weights, and in how many bits they run."""

    inputs: int
    """Inputs in a block."""
    bytes: int
    """Bytes of a block."""
    group: int
    """Inputs that share a scale."""
    bits: int
    """4 or 8: the layout that takes q."""
    zero_point: int | None
    """The zero point of every block; None: blocks have offsets."""
    unpack: Callable[[torch.Tensor], Unpacked]
    """Blocks uint8 [blocks, bytes] -> what they hold."""

    @property
    def scale_bits(self) -> int:
        """Bits of a scale as it is unpacked: where a block has several, each is a product of two numbers."""
        return 16 if self.group == self.inputs else 32

    @property
    def file_bits(self) -> float:
        """Bits of a weight in the file."""
        return self.bytes * 8 / self.inputs

    @property
    def memory_bits(self) -> float:
        """Bits of a weight as it runs, with its part of a scale and of a zero point or an offset."""
        zero_bits = 8 if self.bits == 4 and self.zero_point is not None else 32
        return self.bits + (self.scale_bits + zero_bits) / self.group


TYPES: dict[str, BlockType] = {
    "Q4_0": BlockType(32, 18, 32, 4, 8, _q4_0),
    "Q4_1": BlockType(32, 20, 32, 4, None, _q4_1),
    "Q5_0": BlockType(32, 22, 32, 8, 16, _q5_0),
    "Q5_1": BlockType(32, 24, 32, 8, None, _q5_1),
    "Q8_0": BlockType(32, 34, 32, 8, 0, _q8_0),
    "Q2_K": BlockType(256, 84, 16, 4, None, _q2_k),
    "Q3_K": BlockType(256, 110, 16, 4, 4, _q3_k),
    "Q4_K": BlockType(256, 144, 32, 4, None, _q4_k),
    "Q5_K": BlockType(256, 176, 32, 8, None, _q5_k),
    "Q6_K": BlockType(256, 210, 16, 8, 32, _q6_k),
    "IQ4_NL": BlockType(32, 18, 32, 8, 0, _iq4_nl),
    "IQ4_XS": BlockType(256, 136, 32, 8, 0, _iq4_xs),
}
"""GGUF's name of a quantized type -> its blocks."""


def unpack_rows(rows: torch.Tensor, type_name: str) -> Unpacked:
    """Rows uint8 [n, bytes] -> q int8 [n, k], scales [n, groups], offsets [n, groups] or None."""
    kind = TYPES[type_name]
    q, scales, offsets = kind.unpack(rows.reshape(-1, kind.bytes))
    num_rows = rows.shape[0]
    return (
        q.reshape(num_rows, -1),
        scales.reshape(num_rows, -1),
        None if offsets is None else offsets.reshape(num_rows, -1),
    )


def widen_rows(rows: torch.Tensor, type_name: str) -> torch.Tensor:
    """Rows uint8 [n, bytes] -> the float32 weights [n, k]."""
    q, scales, offsets = unpack_rows(rows, type_name)
    return widen_groups(q, scales, offsets, TYPES[type_name].zero_point)


def widen_groups(
    q: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, zero_point: int | None
) -> torch.Tensor:
    """The float32 weights [n, k] of what `unpack_rows` gives."""
    grouped, scales = q.float().reshape(*scales.shape, -1), scales.float()[:, :, None]
    if offsets is None:
        assert zero_point is not None
        return (scales * (grouped - zero_point)).flatten(1)
    return (scales * grouped - offsets[:, :, None]).flatten(1)
