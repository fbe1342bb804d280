"""The floor of a step: the bytes that it must move and the arithmetic that it must do, and what that takes on a card.

    python benchmarks/floors.py [--write]

Everything is calculated from the sizes of the model, the form of its weights, and the bandwidth on the card's data
sheet; nothing is measured. A step reads every weight once, whatever the batch, and every cached key and value once.
Prints the tables of docs/gpu-results/README.md; --write puts them there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks.documents import with_part  # noqa: E402

DOCUMENT = REPOSITORY / "docs" / "gpu-results" / "README.md"
BEGIN = "<!-- made by benchmarks/floors.py -->"
END = "<!-- until here -->"

HALF_BYTES, FLOAT32_BYTES = 2, 4
ORDER_BYTES = 4
"""An entry of the order in which a weight takes its inputs, as kernels read it."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder of Qwen2's kind."""

    hidden: int
    inner: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape:
        """The sizes in a config.json."""
        num_heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            inner=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            vocabulary=config["vocab_size"],
        )

    @property
    def qkv_outputs(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def layer_matrices(self) -> list[tuple[int, int]]:
        """Outputs and inputs of a layer's four matrices, as they are merged."""
        return [
            (self.qkv_outputs, self.hidden),
            (self.hidden, self.num_heads * self.head_dim),
            (2 * self.inner, self.hidden),
            (self.hidden, self.inner),
        ]

    @property
    def linear_weights(self) -> int:
        """Weights in the matrices of all layers."""
        return self.num_layers * sum(outputs * inputs for outputs, inputs in self.layer_matrices)


QWEN2_7B = ModelShape(3584, 18_944, 28, 28, 4, 128, 152_064)


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """The form in which a matrix is stored."""

    weight_bits: int = 16
    group_size: int = 0
    """Inputs that share a scale; 0: all inputs of an output."""
    scale_bytes: int = 0
    """Bytes of a scale with its zero point."""
    has_order: bool = False

    def matrix_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Bytes of weights, scales, zero points and order."""
        num_scales = num_outputs * (num_inputs // self.group_size if self.group_size else 1)
        order = num_inputs * ORDER_BYTES if self.has_order else 0
        return num_outputs * num_inputs * self.weight_bits // 8 + num_scales * self.scale_bytes + order


DENSE = Form()
INT8 = Form(weight_bits=8, scale_bytes=8)
"""A float32 scale and an int32 zero point for each output."""
INT4 = Form(weight_bits=4, group_size=128, scale_bytes=3)
"""A float16 scale and an int8 zero point for each group."""
INT4_64 = dataclasses.replace(INT4, group_size=64)
ACT_ORDER = dataclasses.replace(INT4, has_order=True)


@dataclasses.dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that a step must read and write in device memory, by what they are."""

    linears: int
    """Matrices of the layers, with their biases."""
    norms: int
    head: int
    embedding: int
    """Rows of the table, one for each token."""
    kv: int
    """Keys and values: those cached are read, those of the new tokens are written."""
    logits: int
    """Written by the head in float32, read by the sampler."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def step_bytes(
    shape: ModelShape,
    form: Form,
    head: Form,
    *,
    context: int,
    batch: int,
    bias_bytes: int = 2,
) -> StepBytes:
    """A decode step of `batch` sequences that know `context` tokens each, with the one that is computed."""
    linears = sum(form.matrix_bytes(outputs, inputs) for outputs, inputs in shape.layer_matrices)
    kv_per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * HALF_BYTES
    return StepBytes(
        linears=shape.num_layers * (linears + shape.qkv_outputs * bias_bytes),
        norms=(2 * shape.num_layers + 1) * shape.hidden * HALF_BYTES,
        head=head.matrix_bytes(shape.vocabulary, shape.hidden),
        embedding=batch * shape.hidden * HALF_BYTES,
        kv=batch * (context + 1) * kv_per_token,
        logits=2 * batch * shape.vocabulary * FLOAT32_BYTES,
    )


def step_flops(shape: ModelShape, *, context: int, queries: int, num_rows: int) -> int:
    """Operations of a step with `queries` new tokens, the last of `context` known ones, and `num_rows` of logits."""
    matrices = sum(matrix_flops(shape, queries=queries, num_rows=num_rows))
    head = 2 * num_rows * shape.vocabulary * shape.hidden
    return matrices + head + attention_flops(shape, context=context, queries=queries)


def matrix_flops(shape: ModelShape, *, queries: int, num_rows: int) -> list[int]:
    """Operations of each of `layer_matrices` in all layers; what follows the last attention has rows of logits only."""
    num_inputs = [shape.num_layers * queries, *[(shape.num_layers - 1) * queries + num_rows] * 3]
    return [2 * count * math.prod(sizes) for count, sizes in zip(num_inputs, shape.layer_matrices, strict=True)]


def attention_flops(shape: ModelShape, *, context: int, queries: int) -> int:
    """Operations of attention in all layers: two products of two operations for each dimension of each key seen."""
    seen = queries * context - queries * (queries - 1) // 2  # a token sees itself and those before it
    return 4 * seen * shape.num_layers * shape.num_heads * shape.head_dim


@dataclasses.dataclass(frozen=True, slots=True)
class Card:
    """A card as its data sheet describes it."""

    bandwidth_gbps: float
    """GB/s of device memory."""
    tflops: float
    """TFLOP/s of dense matrices in bfloat16, summed in float32."""


CARDS = {
    "RTX 4090": Card(1008, 165.2),
    "A100 80G": Card(2039, 312.0),
    "H100": Card(3350, 989.4),
}

FORMS: dict[str, tuple[Form, Form, str]] = {
    "16 bits": (DENSE, DENSE, "17.4"),
    "8 bits, head in 8": (INT8, INT8, "9.7 (EETQ)"),
    "4 bits in groups of 128, head in 8": (INT4, INT8, "6.8 (GPTQ), 7.9 (AWQ)"),
}
"""Name -> form of the layers, form of the head, milliseconds a token on the page about TGI in Qwen's documentation."""

CONTEXT = 1024
PROMPTS = (512, 4096)


def tables() -> str:
    """The floors in milliseconds, in Markdown."""
    lines = [f"| one sequence, {CONTEXT} tokens | GB a token | " + " | ".join(CARDS) + " | Qwen's page, RTX 4090 |"]
    lines.append("|---" * (3 + len(CARDS)) + "|")
    for name, (form, head, page) in FORMS.items():
        num_bytes = step_bytes(QWEN2_7B, form, head, context=CONTEXT, batch=1).total
        times = [f"{num_bytes / card.bandwidth_gbps / 1e6:.1f} ms" for card in CARDS.values()]
        lines.append(f"| {name} | {num_bytes / 1e9:.2f} | {' | '.join(times)} | {page} ms |")
    lines += ["", "| a prompt | TFLOP | " + " | ".join(CARDS) + " |", "|---" * (2 + len(CARDS)) + "|"]
    for queries in PROMPTS:
        flops = step_flops(QWEN2_7B, context=queries, queries=queries, num_rows=1)
        times = [f"{flops / card.tflops / 1e9:.0f} ms" for card in CARDS.values()]
        lines.append(f"| {queries} tokens | {flops / 1e12:.1f} | {' | '.join(times)} |")
    return "\n".join(lines)


def with_tables(document: str) -> str:
    """The document with the tables between its two marks."""
    return with_part(document, BEGIN, END, tables())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/gpu-results/README.md")
    arguments = parser.parse_args()
    print(tables())
    if arguments.write:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
