"""AutoRound checkpoints (the package `auto-round`): GPTQ's or AWQ's tensors under settings of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quant.awq import AwqFormat
from quant.base import FormatError, LinearMethod
from quant.gptq import GptqFormat
from quant.matching_time import MatchingTime
from quant.settings import compile_pattern, read_maps, unusable

PACKINGS: dict[str, tuple[type[GptqFormat | AwqFormat], str]] = {
    "auto_round:auto_gptq": (GptqFormat, "gptq"),
    "auto_round:gptq": (GptqFormat, "gptq"),
    "auto_round": (GptqFormat, "gptq_v2"),
    "auto_round:gptqmodel": (GptqFormat, "gptq_v2"),
    "auto_round:auto_awq": (AwqFormat, "gemm"),
    "auto_round:awq": (AwqFormat, "gemm"),
}
"""`packing_format` -> the format that packs so, and its form."""
DEFAULT_PACKING = "auto_round:auto_gptq"
MAX_QUANTIZED_BITS = 8
_NAME = re.compile(r"[\w.]+")
"""A key of `extra_config` that names one module; all others are patterns."""


class AutoRoundFormat:
    """Implements `quant.base.CheckpointFormat`. `extra_config` has other settings for modules, by name or by pattern.

    The name counts before patterns, and of these the first that is found anywhere in the module's name.
    """

    MARKER = "qweight"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        packing = settings.get("packing_format") or DEFAULT_PACKING
        if not isinstance(packing, str) or packing not in PACKINGS:
            raise FormatError(
                f"the checkpoint is AutoRound in the form {packing!r:.100}; {', '.join(PACKINGS)} can be loaded"
            )
        self._format, self._form = PACKINGS[packing]
        self._settings = settings
        extra = read_maps(settings, "extra_config")
        for stated in (settings, *extra.values()):
            _refuse_other_kinds(stated)
        self._by_name = {name: changes for name, changes in extra.items() if _NAME.fullmatch(name)}
        self._patterns = [
            (compile_pattern(pattern), changes) for pattern, changes in extra.items() if pattern not in self._by_name
        ]
        self._matching_time = MatchingTime(unusable)
        self._default = self._with({})
        self.description = f"auto-round as {self._default.description}"

    @staticmethod
    def is_recognized(settings: Mapping[str, Any]) -> bool:
        return "autoround_version" in settings and "packing_format" in settings

    def size_factor(self, *, is_exact: bool) -> float:
        return 1.0

    def method_for(self, module: str) -> LinearMethod:
        changes = self._by_name.get(module)
        if changes is None:
            with self._matching_time:
                changes = next((changes for pattern, changes in self._patterns if pattern.search(module)), None)
        return (self._default if changes is None else self._with(changes)).method_for(module)

    def _with(self, changes: Mapping[str, Any]) -> GptqFormat | AwqFormat:
        settings = {**self._settings, **changes}
        bits, group_size = settings.get("bits"), settings.get("group_size")
        return self._format({"bits": bits, "group_size": group_size, "checkpoint_format": self._form})


def _refuse_other_kinds(settings: Mapping[str, Any]) -> None:
    """Raise FormatError for weights that are no integers, and for more than weights."""
    bits = settings.get("bits")
    if isinstance(bits, int) and bits > MAX_QUANTIZED_BITS:  # a module that is not quantized
        return
    kind, activation_bits = settings.get("data_type", "int"), settings.get("act_bits")
    if "int" not in str(kind) or "mx" in str(kind):
        raise FormatError(f"the checkpoint is AutoRound of the type {kind!r:.100}; only int can be loaded")
    if isinstance(activation_bits, int) and activation_bits <= MAX_QUANTIZED_BITS:
        raise FormatError(
            f"the checkpoint is AutoRound with activations of {activation_bits} bits; only those of weights alone can "
            "be loaded"
        )
    if settings.get("rotation_config"):
        raise FormatError("the checkpoint is AutoRound with rotated activations, which can't be loaded")
