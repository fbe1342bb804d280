"""The oracles: for each row of a table the class or function of someone else that says what is right.

Contract tests run over the tables of the packages and look here. A row without an oracle fails in `test_oracles.py`.
Attention, ops, samplers and matrix kernels have one oracle for all rows, plain torch beside their tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from tests.oracles import dequantize
from tests.tiny_model import write_tiny_qwen2, write_tiny_qwen2_moe, write_tiny_qwen3, write_tiny_qwen3_moe


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """The proof of one row of `MODELS`."""

    oracle: str
    """The name of the model's class in `transformers`."""
    write: Callable[..., None]
    """Writes a folder with a tiny random model of the family; takes changes of config.json by name."""


FAMILIES: dict[str, Family] = {
    "qwen2": Family("Qwen2ForCausalLM", write_tiny_qwen2),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", write_tiny_qwen2_moe),
    "qwen3": Family("Qwen3ForCausalLM", write_tiny_qwen3),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", write_tiny_qwen3_moe),
}
"""Key of `MODELS` -> its proof."""

DEQUANTIZERS: dict[str, Callable[..., Any]] = {
    "gptq": dequantize.gptq_weight,
    "awq": dequantize.awq_weight,
    "auto-round": dequantize.gptq_weight,
    "compressed-tensors": dequantize.compressed_weight,
    "fp8": dequantize.scaled_weight,
    "gguf": dequantize.gguf_weights,
}
"""Key of `FORMATS` -> the independent reading of a matrix in NumPy, for checkpoints of the format's own tools."""

WRITTEN: dict[str, str] = {"gptq": "gptq", "awq": "awq", "int8": "gptq", "int4": "awq"}
"""Key of `METHODS` -> key of the format that it writes, whose oracle reads it."""

INTERPRETED = "triton"
"""The backend that a CPU runs in Triton's interpreter alone; tests/interpreted compares it with the same oracles."""


def backends_here(table: Iterable[str]) -> list[str]:
    """The backends of a table that contract tests run, in this process and on the CPU."""
    return [name for name in table if name != INTERPRETED]
