"""Which method loads which matrix: from --quantize and from what the checkpoint says about itself.

The checkpoint's word is `quantization_config` (or `compression_config`) in config.json, else quantize_config.json or
quant_config.json. One table per direction: formats that are read, and methods that quantise while loading.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from quant.awq import AwqMethod
from quant.base import FormatError, LinearMethod, MatrixKernel, PackedWeight
from quant.compressed_tensors import CompressedTensorsMethod
from quant.gptq import BITS, GptqMethod
from quant.kernels import rounding_instructions, running_weight
from quant.on_load import Int4Method, Int8Method

ModuleRule = Callable[[str], LinearMethod | None]
"""A module's name -> its method; None: it is stored dense."""

MARKERS = ("qweight", "weight_packed")
"""Tensors that only a quantised matrix has."""


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """A method for every matrix of one model."""

    description: str
    """For the start-up summary."""
    dense: LinearMethod
    head: LinearMethod
    """How an output head runs that the checkpoint stores dense."""
    rule: ModuleRule
    is_exact: bool = True
    """Whether the activations that meet quantised weights stay float32; they are rounded to 8 bits otherwise."""
    size_factor: float = 1.0
    """Memory of the weights over the size of the files, roughly."""

    def run(self, packed: PackedWeight) -> MatrixKernel:
        """`quant.base.KernelChooser` for this model."""
        return running_weight(packed, is_exact=self.is_exact)

    def is_rounding(self, device_type: str) -> bool:
        """Whether some kernels of the model round the activations that they meet."""
        return not self.is_exact and rounding_instructions(device_type) is not None

    def method_for(self, module: str) -> LinearMethod:
        """`module` is the checkpoint's name, `model.layers.0.mlp.up_proj`."""
        method = self.rule(module)
        if method is not None:
            return method
        return self.head if module == "lm_head" else self.dense


ON_LOAD: dict[str, type[Int8Method | Int4Method]] = {"eetq": Int8Method, "int8": Int8Method, "int4": Int4Method}
"""--quantize values for dense checkpoints, and what --quantize-head takes."""

SIZE_FACTORS = {"eetq": 0.6, "int8": 0.6, "int4": 0.4}
"""Of a 16-bit checkpoint; scales and a table of embeddings that stays dense included."""


def resolve_quantization(
    flag: str | None,
    head_flag: str | None,
    stored: Mapping[str, Any] | None,
    tensor_names: Collection[str],
    dense: LinearMethod,
    *,
    is_exact: bool,
) -> Quantization:
    """`stored` is the checkpoint's own configuration; `is_exact` (--dtype float32) leaves the head dense
    and activations as they are.

    Whether a single matrix is quantised is told by its tensors, not by the lists that the tools write: autoawq matches
    its own against shorter names than transformers does. Raises FormatError, in a sentence.
    """
    stored = _in_new_words(stored)
    method = _stored_method(stored)
    if flag is not None and method is not None and flag != method:
        raise FormatError(f"--quantize {flag}, but the checkpoint is {method}: leave --quantize out")
    if flag is not None and method is None and flag not in ON_LOAD:
        raise FormatError(
            f"--quantize {flag} needs a checkpoint in that format, this one is dense: give a checkpoint quantised "
            f"with {flag}, or --quantize one of {', '.join(ON_LOAD)}"
        )
    rule: ModuleRule
    name = method or flag
    if head_flag is None:
        head_flag = "none" if name is None or is_exact else "int8"
    head = dense if head_flag == "none" else ON_LOAD[head_flag]()
    if name is None:
        description, rule = "not quantised", _nothing
    elif method is not None:
        assert stored is not None
        description, stored_rule = FORMATS[method](stored)
        rule = _where_quantized(stored_rule, tensor_names)
    else:
        description, rule = name, _linears(ON_LOAD[name]())
    head_description = "dense" if head_flag == "none" else head_flag
    factor = SIZE_FACTORS[name] if name in ON_LOAD else 1.0
    is_exact = is_exact or (name is None and head is dense)
    return Quantization(f"{description}, head {head_description}", dense, head, rule, is_exact, factor)


def _nothing(module: str) -> LinearMethod | None:
    return None


def _linears(method: LinearMethod) -> ModuleRule:
    """Every matrix but the head and the embedding."""
    return lambda module: None if module == "lm_head" else method


def _where_quantized(rule: ModuleRule, tensor_names: Collection[str]) -> ModuleRule:
    """`rule` for the modules that have a quantised tensor."""
    endings = tuple(f".{marker}" for marker in MARKERS)
    quantized = {name.rpartition(".")[0] for name in tensor_names if name.endswith(endings)}
    return lambda module: rule(module) if module in quantized else None


OLD_WORDS = {"w_bit": "bits", "q_group_size": "group_size"}
"""In the quant_config.json of AutoAWQ before its settings went into config.json, which names no method."""


def _in_new_words(stored: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if not stored or "w_bit" not in stored:
        return stored
    return {"quant_method": "awq", **{OLD_WORDS.get(key, key): value for key, value in stored.items()}}


def _stored_method(stored: Mapping[str, Any] | None) -> str | None:
    if not stored:
        return None
    name = stored.get("quant_method") or stored.get("method") or ("gptq" if "bits" in stored else None)
    if name not in FORMATS:
        raise FormatError(
            f"the checkpoint is quantised with {name!r}, which can't be loaded; {', '.join(FORMATS)} can, and dense "
            f"checkpoints with --quantize {', '.join(ON_LOAD)}"
        )
    return str(name)


def _integer(stored: Mapping[str, Any], key: str, allowed: Callable[[int], bool]) -> int:
    value = stored.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not allowed(value):
        raise FormatError(f"the quantisation's {key} is {value!r}, which can't be loaded: fetch the model again")
    return value


def _is_group_size(value: int) -> bool:
    return value == -1 or value > 0


def _gptq(stored: Mapping[str, Any]) -> tuple[str, ModuleRule]:
    version = stored.get("checkpoint_format") or stored.get("format")
    if version not in (None, "gptq", "gptq_v2"):
        raise FormatError(f"the checkpoint is GPTQ in the form {version!r}; gptq and gptq_v2 can be loaded")

    def make(changes: Mapping[str, Any]) -> GptqMethod:
        merged = {**stored, **changes}
        return GptqMethod(
            bits=_integer(merged, "bits", BITS.__contains__),
            group_size=_integer({"group_size": merged.get("group_size", -1)}, "group_size", _is_group_size),
            has_stored_minus_one=version != "gptq_v2",
        )

    default = make({})
    dynamic: Mapping[str, Any] = stored.get("dynamic") or {}

    def rule(module: str) -> LinearMethod:
        for pattern, changes in dynamic.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
                return make(changes)
        return default

    return f"gptq, {default.bits} bits, {_groups(default.group_size)}", rule


def _awq(stored: Mapping[str, Any]) -> tuple[str, ModuleRule]:
    version = str(stored.get("version") or stored.get("checkpoint_format") or "gemm").lower()
    if version != "gemm":
        raise FormatError(f"the checkpoint is AWQ in the form {version!r}; only gemm can be loaded")
    _integer(stored, "bits", lambda bits: bits == 4)
    method = AwqMethod(_integer(stored, "group_size", _is_group_size))

    return f"awq, 4 bits, {_groups(method.group_size)}", lambda module: method


def _compressed_tensors(stored: Mapping[str, Any]) -> tuple[str, ModuleRule]:
    groups: Mapping[str, Any] = stored.get("config_groups") or {}
    made = [(group.get("targets") or ["Linear"], _compressed_group(stored, group)) for group in groups.values()]
    if not made:
        raise FormatError("the compressed-tensors configuration has no config_groups: fetch the model again")

    def rule(module: str) -> LinearMethod | None:
        return next((method for targets, method in made if any(_names(target, module) for target in targets)), None)

    first = made[0][1]
    return f"compressed-tensors, {first.bits} bits, {_groups(first.group_size)}", rule


def _compressed_group(stored: Mapping[str, Any], group: Mapping[str, Any]) -> CompressedTensorsMethod:
    weights: Mapping[str, Any] = group.get("weights") or {}
    kind = group.get("format") or stored.get("format")
    strategy = weights.get("strategy")
    if kind != "pack-quantized" or weights.get("type", "int") != "int" or strategy not in ("group", "channel"):
        raise FormatError(
            f"the checkpoint is compressed-tensors in the form {kind!r} with strategy {strategy!r}; only integers in "
            "pack-quantized form, by group or channel, can be loaded"
        )
    if group.get("input_activations"):
        raise FormatError("the checkpoint wants quantised activations, which are not supported: give a W4A16 or W8A16")
    return CompressedTensorsMethod(
        bits=_integer(weights, "num_bits", BITS.__contains__),
        group_size=-1 if strategy == "channel" else _integer(weights, "group_size", _is_group_size),
        is_symmetric=bool(weights.get("symmetric", True)),
    )


def _names(pattern: str, module: str) -> bool:
    """compressed-tensors' targets: a class, `re:` and an expression, or a name."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern in ("Linear", module) or module.endswith(f".{pattern}")


def _groups(group_size: int) -> str:
    return "one group" if group_size == -1 else f"groups of {group_size}"


FORMATS: dict[str, Callable[[Mapping[str, Any]], tuple[str, ModuleRule]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
}
"""`quant_method` of a checkpoint -> its description and rule."""
