"""compressed-tensors "pack-quantized" checkpoints, W4A16, W8A16 and their like, as llm-compressor writes them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from quant.base import FormatError, MatrixShard, PackedWeight, ParamSpec
from quant.packing import BITS, WORD_BITS, are_groups_in_order, pack_groups, unpack_words
from quant.settings import compile_pattern, describe, read_group_size, read_integer, read_map, read_maps

Target = str | re.Pattern[str]


@dataclasses.dataclass(frozen=True, slots=True)
class CompressedTensorsMethod:
    """`weight_packed` along the inputs, `weight_scale` [n, groups], `weight_zero_point` along the outputs."""

    bits: int
    group_size: int
    is_symmetric: bool

    def param_specs(self, in_features: int, out_features: int, has_bias: bool) -> dict[str, ParamSpec]:
        group_size = in_features if self.group_size == -1 else self.group_size
        if in_features % group_size:
            raise FormatError(
                f"a matrix of {in_features} inputs can't have groups of {group_size}: config.json and the weights do "
                "not belong together"
            )
        num_groups = in_features // group_size
        packed = (out_features, self._num_words(in_features))
        specs = {
            "weight_packed": ParamSpec(packed, output_dim=0, input_dim=1, is_integer=True),
            "weight_scale": ParamSpec((out_features, num_groups), output_dim=0, input_dim=1, group_size=group_size),
            "weight_shape": ParamSpec((2,), output_dim=None, input_dim=None, is_integer=True),
            # Some versions of llm-compressor write it for act-order by group.
            "weight_g_idx": ParamSpec((in_features,), output_dim=None, input_dim=0, is_integer=True, is_optional=True),
            "bias": ParamSpec((out_features,), output_dim=0, input_dim=None, is_optional=not has_bias),
        }
        if not self.is_symmetric:
            shape = (self._num_words(out_features), num_groups)
            specs["weight_zero_point"] = ParamSpec(
                shape, output_dim=0, input_dim=1, is_integer=True, group_size=group_size
            )
        return specs

    def _num_words(self, num_fields: int) -> int:
        return -(-num_fields * self.bits // WORD_BITS)

    def is_copied(self, name: str, checkpoint_dtype: torch.dtype) -> bool:
        return True

    def decides_order(self, name: str) -> bool:
        return name == "weight_g_idx"

    def has_unordered_groups(self, name: str, tensor: torch.Tensor) -> bool:
        if name != "weight_g_idx" or int(tensor.min()) < 0:
            return False
        return not are_groups_in_order(tensor, self.group_size)

    def pack(self, params: Mapping[str, torch.Tensor], shard: MatrixShard | None = None) -> PackedWeight:
        num_outputs, num_inputs = (int(size) for size in params["weight_shape"])
        if shard is not None:
            num_outputs, num_inputs = shard.num_outputs, shard.num_inputs
        q = unpack_words(params["weight_packed"], self.bits, dim=1)[:, :num_inputs]
        scales = params["weight_scale"]
        if self.is_symmetric:
            zero_points = torch.full(scales.shape, 1 << (self.bits - 1))
        else:
            zero_points = unpack_words(params["weight_zero_point"], self.bits, dim=0)[:num_outputs]
        groups = params.get("weight_g_idx")
        if groups is not None and int(groups.min()) < 0:  # no calibration has set it
            groups = None
        if groups is not None and int(groups.max()) >= scales.shape[1]:
            raise FormatError(f"has a weight_g_idx outside of its {scales.shape[1]} groups: fetch the model again")
        bias = params.get("bias")
        return pack_groups(
            q,
            scales,
            zero_points,
            bits=self.bits,
            group_of_input=groups,
            bias=None if bias is None else bias.float(),
        )


class CompressedTensorsFormat:
    """Implements `quant.base.CheckpointFormat`. Each of `config_groups` names the modules that it is for."""

    MARKER = "weight_packed"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._groups: list[tuple[list[Target], CompressedTensorsMethod]] = [
            (_targets(group), _group_method(settings, group)) for group in read_maps(settings, "config_groups").values()
        ]
        if not self._groups:
            raise FormatError("the compressed-tensors configuration has no config_groups: fetch the model again")
        _, first = self._groups[0]
        self.description = describe("compressed-tensors", first.bits, first.group_size)

    @staticmethod
    def is_recognized(settings: Mapping[str, Any]) -> bool:
        return False

    def method_for(self, module: str) -> CompressedTensorsMethod | None:
        for targets, method in self._groups:
            if any(_is_target(target, module) for target in targets):
                return method
        return None


def _group_method(settings: Mapping[str, Any], group: Mapping[str, Any]) -> CompressedTensorsMethod:
    weights = read_map(group, "weights")
    form = group.get("format") or settings.get("format")
    strategy = weights.get("strategy")
    if form != "pack-quantized" or weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
        raise FormatError(
            f"the checkpoint is compressed-tensors in the form {form!r} with strategy {strategy!r}; only integers in "
            "pack-quantized form, by group or channel, can be loaded"
        )
    if group.get("input_activations"):
        raise FormatError("the checkpoint wants quantised activations, which are not supported: give a W4A16 or W8A16")
    return CompressedTensorsMethod(
        bits=read_integer(weights, "num_bits", BITS.__contains__),
        group_size=-1 if strategy == "channel" else read_group_size(weights),
        is_symmetric=bool(weights.get("symmetric", True)),
    )


def _targets(group: Mapping[str, Any]) -> list[Target]:
    """The modules that a group is for; expressions are compiled. Raises FormatError."""
    targets = group.get("targets") or ["Linear"]
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise FormatError("a config_group's targets are not a list of names: fetch the model again")
    return [compile_pattern(target.removeprefix("re:")) if target.startswith("re:") else target for target in targets]


def _is_target(target: Target, module: str) -> bool:
    """Whether `target` names the module: by its class, by an expression, or by its own name."""
    if isinstance(target, re.Pattern):
        return target.match(module) is not None
    return target in ("Linear", module) or module.endswith(f".{target}")
