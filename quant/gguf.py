"""GGUF files: matrices of blocks, as llama.cpp writes them. `engine.checkpoint.gguf_weights` reads the blocks.

It hands them on as three tensors: `q` int8 [n, k], `scales` [n, groups], and `offsets` [n, groups] where the type has
some. Types differ from matrix to matrix, so the settings have one for each.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from quant.base import FormatError, LinearMethod, MatrixShard, PackedWeight, ParamSpec
from quant.gguf_blocks import TYPES, widen_groups
from quant.packing import BYTE_CHUNK, NIBBLE_CHUNK, pack_nibbles
from quant.settings import read_map

_EXPERT = re.compile(r"\.experts\.\d+\.")
Q, SCALES, OFFSETS = "q", "scales", "offsets"


@dataclasses.dataclass(frozen=True, slots=True)
class GgufMethod(LinearMethod):
    """Integers with groups as a type has them, without a detour through floats."""

    type_name: str

    def param_specs(self, in_features: int, out_features: int, has_bias: bool) -> dict[str, ParamSpec]:
        kind = TYPES[self.type_name]
        if in_features % kind.inputs:
            raise FormatError(
                f"a matrix of {in_features} inputs can't be in blocks of {kind.inputs}, as {self.type_name} has them: "
                "fetch the file again"
            )
        grouped = ParamSpec((out_features, in_features // kind.group), 0, 1, group_size=kind.group)
        specs = {
            Q: ParamSpec((out_features, in_features), output_dim=0, input_dim=1, is_integer=True),
            SCALES: grouped,
            "bias": ParamSpec((out_features,), output_dim=0, input_dim=None, is_optional=not has_bias),
        }
        return specs if kind.zero_point is not None else {**specs, OFFSETS: grouped}

    def pack(self, params: Mapping[str, torch.Tensor], shard: MatrixShard | None = None) -> PackedWeight:
        kind = TYPES[self.type_name]
        q, scales, zero_points, bias = params[Q], params[SCALES], params.get(OFFSETS), params.get("bias")
        group_size = q.shape[1] // scales.shape[1]
        if group_size % (NIBBLE_CHUNK if kind.bits == 4 else BYTE_CHUNK):  # a shard that ends within a group
            return PackedWeight("dense", widen_groups(q, scales, zero_points, kind.zero_point), bias)
        if zero_points is None:
            assert kind.zero_point is not None
            dtype = torch.int8 if kind.bits == 4 else torch.int32
            zero_points = torch.full(scales.shape, kind.zero_point, dtype=dtype, device=q.device)
        if kind.bits == 4:
            return PackedWeight("int4", pack_nibbles(q), bias, scales, zero_points)
        return PackedWeight("int8", q, bias, scales, zero_points)


class GgufFormat:
    """Implements `quant.base.CheckpointFormat`. `types` in the settings maps each quantized matrix to its type.

    The matrices of a layer's experts have one together, under a name without the expert's number.

    `bytes` and `table_bytes` map each type to what the files have of it, without and in the table of embeddings.
    """

    MARKER = Q

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._types = read_map(settings, "types")
        for type_name in self._types.values():
            if type_name not in TYPES:
                raise FormatError(f"the file has matrices of type {type_name}; only {', '.join(TYPES)} can be run")
        self._bytes, self._table_bytes = read_map(settings, "bytes"), read_map(settings, "table_bytes")
        counts = collections.Counter(self._types.values())
        self.description = "gguf, " + ", ".join(f"{count} x {name}" for name, count in counts.most_common())

    def size_factor(self, *, is_exact: bool) -> float:
        widened = dict.fromkeys(TYPES, 32 if is_exact else 16)
        packed = {name: kind.memory_bits for name, kind in TYPES.items()}
        memory = _memory_bytes(self._bytes, packed) + _memory_bytes(self._table_bytes, widened)
        total = sum(self._bytes.values()) + sum(self._table_bytes.values())
        return memory / total if total else 1.0

    @staticmethod
    def is_recognized(settings: Mapping[str, Any]) -> bool:
        return False

    def method_for(self, module: str) -> GgufMethod | None:
        type_name = self._types.get(_EXPERT.sub(".experts.", module))
        return None if type_name is None else GgufMethod(type_name)


def _memory_bytes(file_bytes: Mapping[str, int], bits: Mapping[str, float]) -> float:
    """Memory of what the files have in each type, whose weights take `bits` there; other types stay as they are."""
    return sum(
        size * bits[name] / TYPES[name].file_bits if name in TYPES else size for name, size in file_bytes.items()
    )
