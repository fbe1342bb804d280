"""compressed-tensors checkpoints as llm-compressor writes them.

The forms are "pack-quantized" (W4A16, W8A16 and their like), "int-quantized" (W8A8), "float-quantized" (FP8), and
"naive-quantized", which is the same as one of these two. What they say about activations stays unread.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from quant.base import FormatError, LinearMethod, MatrixShard, PackedWeight, ParamSpec
from quant.matching_time import MatchingTime
from quant.packing import BITS, WORD_BITS, are_groups_in_order, pack_groups, unpack_words
from quant.scaled import WHOLE, ScaledMethod
from quant.settings import (
    compile_pattern,
    describe,
    read_block,
    read_group_size,
    read_integer,
    read_map,
    read_maps,
    unusable,
)

Target = str | re.Pattern[str]


@dataclasses.dataclass(frozen=True, slots=True)
class CompressedTensorsMethod(LinearMethod):
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

    MARKER = "weight_scale"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        if _has_transforms(settings):
            raise FormatError(
                "the checkpoint's matrices are rotated (transform_config), and what they are multiplied with would "
                "have to be, too: give one that was quantised without QuIP or SpinQuant's R3 and R4"
            )
        groups = read_maps(settings, "config_groups").values()
        if not groups:
            raise FormatError("the compressed-tensors configuration has no config_groups: fetch the model again")
        self._groups: list[tuple[list[Target], LinearMethod]] = []
        descriptions = []
        for group in groups:
            form = group.get("format") or settings.get("format")
            if not isinstance(form, str) or form not in FORMS:
                raise FormatError(
                    f"the checkpoint is compressed-tensors in the form {form!r}; only {', '.join(FORMS)} can be loaded"
                )
            method, description = FORMS[form](read_map(group, "weights"))
            self._groups.append((_targets(group), method))
            descriptions.append(description)
        self.description = descriptions[0]
        self._matching_time = MatchingTime(unusable)

    @staticmethod
    def is_recognized(settings: Mapping[str, Any]) -> bool:
        return False

    def size_factor(self, *, is_exact: bool) -> float:
        return 1.0

    def method_for(self, module: str) -> LinearMethod | None:
        with self._matching_time:
            for targets, method in self._groups:
                if any(_is_target(target, module) for target in targets):
                    return method
        return None


def _packed_integers(weights: Mapping[str, Any]) -> tuple[LinearMethod, str]:
    """The method of "pack-quantized" weights, and its words. Raises FormatError."""
    strategy = _read_choice(weights, "strategy", ("group", "channel"))
    _read_choice(weights, "type", ("int",))
    bits = read_integer(weights, "num_bits", BITS.__contains__)
    group_size = -1 if strategy == "channel" else read_group_size(weights)
    method = CompressedTensorsMethod(bits, group_size, is_symmetric=bool(weights.get("symmetric", True)))
    return method, describe("compressed-tensors", bits, group_size)


def _bytes(weights: Mapping[str, Any]) -> tuple[LinearMethod, str]:
    """The method of weights that are stored as integers or floats of 8 bits, and its words. Raises FormatError."""
    strategy = _read_choice(weights, "strategy", ("tensor", "channel", "group", "block"))
    is_float = _read_choice(weights, "type", ("int", "float")) == "float"
    read_integer(weights, "num_bits", lambda bits: bits == 8)
    block, words = (WHOLE, WHOLE), "one scale a matrix"
    if strategy == "channel":
        block, words = (1, WHOLE), "a scale for each output"
    elif strategy == "group":
        block = (1, read_integer(weights, "group_size", lambda size: size > 0))
        words = f"groups of {block[1]}"
    elif strategy == "block":
        block = read_block(weights, "block_structure")
        words = f"blocks of {block[0]} x {block[1]}"
    has_zero_points = not is_float and not weights.get("symmetric", True)
    method = ScaledMethod(
        block,
        is_float,
        ignored_names=("input_scale", "input_zero_point"),
        ignored_zero_point_name=None if has_zero_points else "weight_zero_point",
        zero_point_name="weight_zero_point" if has_zero_points else None,
    )
    return method, f"compressed-tensors, {'fp8' if is_float else '8 bits'}, {words}, weights only"


def _read_choice(weights: Mapping[str, Any], key: str, choices: Collection[str]) -> str:
    """The value at `key`, the first choice where it is missing and is the only one. Raises FormatError."""
    value = weights.get(key, next(iter(choices)) if len(choices) == 1 else None)
    if value not in choices:
        raise FormatError(
            f"the quantisation's {key} is {value!r}; only {', '.join(choices)} can be loaded in this form"
        )
    return str(value)


FORMS: dict[str, Callable[[Mapping[str, Any]], tuple[LinearMethod, str]]] = {
    "pack-quantized": _packed_integers,
    "int-quantized": _bytes,
    "float-quantized": _bytes,
    "naive-quantized": _bytes,
}
"""How the weights of a group are stored -> its method, read from what the group says about weights."""


STORED_TRANSFORMS = ("weight_input", "weight_output")
"""Places of transforms that a checkpoint's weights have gone through already."""


def _has_transforms(settings: Mapping[str, Any]) -> bool:
    """Whether activations would have to be transformed while the model runs. Raises FormatError."""
    schemes = read_maps(read_map(settings, "transform_config"), "config_groups").values()
    places = [place for scheme in schemes for place in _as_list(scheme.get("apply"))]
    return not all(isinstance(place, Mapping) and place.get("location") in STORED_TRANSFORMS for place in places)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


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
