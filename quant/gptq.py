"""GPTQ checkpoints as AutoGPTQ and gptqmodel write them: 2, 3, 4 and 8 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from quant.base import FormatError, LinearMethod, MatrixShard, PackedWeight, ParamSpec
from quant.matching_time import MatchingTime
from quant.packing import BITS, WORD_BITS, are_groups_in_order, as_words, pack_groups, pack_words, unpack_words
from quant.rounding import RoundedMatrix
from quant.settings import compile_pattern, describe, read_group_size, read_integer, read_maps, unusable


@dataclasses.dataclass(frozen=True, slots=True)
class GptqMethod(LinearMethod):
    """`qweight` packed along the inputs, `qzeros` along the outputs, `scales` [groups, n], `g_idx` [k].

    `has_stored_minus_one` is true for version 1, which stores zero points less one. gptqmodel subtracts from whole
    words, so adding to whole words restores a 0 as well. AutoGPTQ spoils the rest of the word if a zero point is 0. No
    reading gets it back; this one comes closest (tests/oracles/checkpoints/README.md). Both tools read fields of 3 bits
    one by one.
    """

    bits: int
    group_size: int
    has_stored_minus_one: bool

    def param_specs(self, in_features: int, out_features: int, has_bias: bool) -> dict[str, ParamSpec]:
        if in_features * self.bits % WORD_BITS or out_features * self.bits % WORD_BITS:
            raise FormatError(
                f"a matrix of {in_features} inputs and {out_features} outputs can't be packed in {self.bits} bits: "
                "config.json and the weights do not belong together"
            )
        group_size = in_features if self.group_size == -1 else self.group_size
        num_groups = -(-in_features // group_size)
        by_group: dict[str, Any] = {"output_dim": 1, "input_dim": 0, "group_size": group_size}
        packed_in, packed_out = in_features * self.bits // WORD_BITS, out_features * self.bits // WORD_BITS
        return {
            "qweight": ParamSpec((packed_in, out_features), output_dim=1, input_dim=0, is_integer=True),
            "qzeros": ParamSpec((num_groups, packed_out), **by_group, is_integer=True),
            "scales": ParamSpec((num_groups, out_features), **by_group),
            "g_idx": ParamSpec((in_features,), output_dim=None, input_dim=0, is_integer=True, is_optional=True),
            # AutoGPTQ writes one for every matrix, of zeros if the model has none.
            "bias": ParamSpec((out_features,), output_dim=0, input_dim=None, is_optional=not has_bias),
        }

    def decides_order(self, name: str) -> bool:
        return name == "g_idx"

    def has_unordered_groups(self, name: str, tensor: torch.Tensor) -> bool:
        return name == "g_idx" and not are_groups_in_order(tensor, self.group_size)

    def pack(self, params: Mapping[str, torch.Tensor], shard: MatrixShard | None = None) -> PackedWeight:
        q = unpack_words(params["qweight"], self.bits, dim=0).T.contiguous()
        scales = params["scales"].T.contiguous()
        groups = params.get("g_idx")
        if groups is not None and not 0 <= int(groups.min()) <= int(groups.max()) < scales.shape[1]:
            raise FormatError(f"has a g_idx outside of its {scales.shape[1]} groups: fetch the model again")
        bias = params.get("bias")
        zero_points = self._zero_points(params["qzeros"]).T
        return pack_groups(
            q, scales, zero_points, bits=self.bits, group_of_input=groups, bias=None if bias is None else bias.float()
        )

    def _zero_points(self, qzeros: torch.Tensor) -> torch.Tensor:
        """The zero points [groups, n] int32."""
        if not self.has_stored_minus_one:
            return unpack_words(qzeros, self.bits, dim=1).to(torch.int32)
        if WORD_BITS % self.bits == 0:
            ones = sum(1 << shift for shift in range(0, WORD_BITS, self.bits))
            restored = as_words((qzeros.to(torch.int64) + ones) & 0xFFFFFFFF)
            return unpack_words(restored, self.bits, dim=1).to(torch.int32)
        return (unpack_words(qzeros, self.bits, dim=1).to(torch.int32) + 1) & ((1 << self.bits) - 1)


class GptqFormat:
    """Implements `quant.base.CheckpointFormat`. `dynamic` has other settings for modules that match a pattern."""

    MARKER = "qweight"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._version = settings.get("checkpoint_format") or settings.get("format")
        if self._version not in (None, "gptq", "gptq_v2"):
            raise FormatError(f"the checkpoint is GPTQ in the form {self._version!r}; gptq and gptq_v2 can be loaded")
        self._dynamic = [
            (compile_pattern(pattern.removeprefix("+:")), changes)
            for pattern, changes in read_maps(settings, "dynamic").items()
            if not pattern.startswith("-:")
        ]
        self._matching_time = MatchingTime(unusable)
        self._default = self._method({})
        self.description = describe("gptq", self._default.bits, self._default.group_size)

    @staticmethod
    def is_recognized(settings: Mapping[str, Any]) -> bool:
        return "bits" in settings

    def size_factor(self, *, is_exact: bool) -> float:
        return 1.0

    def method_for(self, module: str) -> GptqMethod:
        with self._matching_time:
            changes = next((changes for pattern, changes in self._dynamic if pattern.match(module)), None)
        return self._default if changes is None else self._method(changes)

    def _method(self, changes: Mapping[str, Any]) -> GptqMethod:
        settings = {"group_size": -1, **self._settings, **changes}
        return GptqMethod(
            bits=read_integer(settings, "bits", BITS.__contains__),
            group_size=read_group_size(settings),
            has_stored_minus_one=self._version != "gptq_v2",
        )


def stored_tensors(matrix: RoundedMatrix) -> dict[str, torch.Tensor]:
    """The tensors of version 1, without a bias. No zero point may be 0: less one it would spoil its neighbours.

    `scales` stay float16 beside bfloat16 tensors, too, as gptqmodel writes them.
    """
    assert int(matrix.zero_points.min()) > 0
    return {
        "qweight": pack_words(matrix.q.T, matrix.bits, dim=0),
        "qzeros": pack_words(matrix.zero_points.T - 1, matrix.bits, dim=1),
        "scales": matrix.scales.T.contiguous(),
        "g_idx": matrix.group_of_input.to(torch.int32),
    }
