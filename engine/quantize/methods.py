"""The table of methods of `text-generation-server quantize`. No torch: `--help` reads it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One value of --method."""

    quantizer: str
    """Lazy "module:Class" of an `engine.quantize.quantizer.Quantizer`."""
    help: str
    bits: tuple[int, ...]
    """What --bits may say, the default first."""
    group_size: int
    """The default; -1: one group for each output."""
    needs_data: bool = False
    """Whether it looks at what a text makes the model compute."""
    has_act_order: bool = False
    """Whether groups may go by the importance of the inputs."""


METHODS: dict[str, Method] = {
    "gptq": Method(
        quantizer="engine.quantize.gptq:GptqQuantizer",
        help="AutoGPTQ's format, symmetric, --bits 2, 3, 4 or 8; TGI's method. For any engine.",
        bits=(4, 2, 3, 8),
        group_size=128,
        needs_data=True,
        has_act_order=True,
    ),
    "awq": Method(
        quantizer="engine.quantize.awq:AwqQuantizer",
        help="AutoAWQ's format (gemm), 4 bits. For any engine.",
        bits=(4,),
        group_size=128,
        needs_data=True,
    ),
    "int8": Method(
        quantizer="engine.quantize.nearest:Int8Quantizer",
        help="GPTQ's format with 8 bits and a scale for each output: nearly nothing is lost.",
        bits=(8,),
        group_size=-1,
    ),
    "int4": Method(
        quantizer="engine.quantize.nearest:Int4Quantizer",
        help="AWQ's format with groups of 64, each weight rounded by itself.",
        bits=(4,),
        group_size=64,
    ),
}
