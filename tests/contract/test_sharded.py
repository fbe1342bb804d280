"""Models cut for several ranks give the logits of one rank, in every layout and for the numbers of every Qwen2."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from safetensors.torch import save_file

from engine.errors import StartError
from engine.model_files import read_model_config
from engine.runner import BLOCK_SIZE, ModelRunner, build_model, make_model, settle_quantization
from parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel.partition import deal_heads
from parallel.state import ParallelState
from quant import awq, gptq
from quant.kernels.integer_cpu import FOUND
from quant.packing import pack_words
from quant.rounding import RoundedMatrix
from tests.contract.harness import KERNELS, make_sequence, run_step
from tests.tiny_model import CONFIG
from tests.unit.parallel.threads import run_ranks

HIDDEN = 256
VOCAB_SIZE = 523
"""Divides by nothing."""
SIZES = (2, 3, 4, 7, 8)
PROMPT_LENGTHS = (5, 18, 11)

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2's numbers of heads and groups."""

    num_heads: int
    num_kv_heads: int
    num_groups: int
    """Of intermediate features."""
    group_size: int = 64
    head_dim: int = 64
    is_tied: bool = False

    @property
    def intermediate_size(self) -> int:
        return self.num_groups * self.group_size


SHAPES = {
    "0.5B": Shape(14, 2, 38, group_size=128, is_tied=True),  # seven heads are three groups and a half
    "1.5B": Shape(12, 2, 70, is_tied=True),
    "7B": Shape(28, 4, 148),
    "72B": Shape(64, 8, 231),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How the matrices of a checkpoint are stored and run."""

    stored: Callable[[int, int, int, torch.Generator], Tensors]
    """Outputs, inputs, group size -> tensors of one matrix, without a bias."""
    config: Callable[[int], dict[str, Any] | None] = lambda group_size: None
    """Group size -> quantization_config."""
    dtype: torch.dtype = torch.float16
    quantize: str | None = None
    is_scattered: bool = False
    """Whether the inputs of each group lie anywhere."""


def dense(dtype: torch.dtype, quantize: str | None = None) -> Layout:
    def stored(num_outputs: int, num_inputs: int, group_size: int, generator: torch.Generator) -> Tensors:
        weight = torch.randn(num_outputs, num_inputs, generator=generator).div_(num_inputs**0.5)
        return {"weight": weight.to(dtype)}

    return Layout(stored, dtype=dtype, quantize=quantize)


def random_matrix(
    bits: int,
    num_outputs: int,
    num_inputs: int,
    group_size: int,
    generator: torch.Generator,
    *,
    is_symmetric: bool = False,
    is_scattered: bool = False,
) -> RoundedMatrix:
    """Any numbers; the weights are as large as those of a dense model."""
    half, groups = 1 << (bits - 1), (num_outputs, num_inputs // group_size)
    spread = 0 if is_symmetric else half // 4
    zero_points = torch.randint(half - spread, half + spread + 1, groups, generator=generator)
    scales = torch.rand(groups, generator=generator).add_(0.5).div_(half * num_inputs**0.5 / 3**0.5)
    q = torch.randint(0, 2 * half, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8)
    order = torch.randperm(num_inputs, generator=generator) if is_scattered else torch.arange(num_inputs)
    return RoundedMatrix(bits, q, scales.to(torch.float16), zero_points.to(torch.int32), order // group_size)


def gptq_layout(bits: int, *, is_scattered: bool = False) -> Layout:
    def stored(num_outputs: int, num_inputs: int, group_size: int, generator: torch.Generator) -> Tensors:
        matrix = random_matrix(bits, num_outputs, num_inputs, group_size, generator, is_scattered=is_scattered)
        return gptq.stored_tensors(matrix)

    def config(group_size: int) -> dict[str, Any]:
        return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": is_scattered}

    return Layout(stored, config, is_scattered=is_scattered)


def awq_layout() -> Layout:
    def stored(num_outputs: int, num_inputs: int, group_size: int, generator: torch.Generator) -> Tensors:
        return awq.stored_tensors(random_matrix(4, num_outputs, num_inputs, group_size, generator))

    def config(group_size: int) -> dict[str, Any]:
        return {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}

    return Layout(stored, config)


def compressed_tensors_layout(*, is_symmetric: bool) -> Layout:
    def stored(num_outputs: int, num_inputs: int, group_size: int, generator: torch.Generator) -> Tensors:
        matrix = random_matrix(4, num_outputs, num_inputs, group_size, generator, is_symmetric=is_symmetric)
        tensors = {
            "weight_packed": pack_words(matrix.q, 4, dim=1),
            "weight_scale": matrix.scales,
            "weight_shape": torch.tensor([num_outputs, num_inputs]),
        }
        if not is_symmetric:
            tensors["weight_zero_point"] = pack_words(matrix.zero_points, 4, dim=0)
        return tensors

    def config(group_size: int) -> dict[str, Any]:
        weights = {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": group_size,
            "symmetric": is_symmetric,
        }
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}

    return Layout(stored, config)


LAYOUTS = {
    "float32": dense(torch.float32),
    "bfloat16": dense(torch.bfloat16),
    "int8 on load": dense(torch.bfloat16, "int8"),
    "int4 on load": dense(torch.bfloat16, "int4"),
    "gptq 4 bits": gptq_layout(4),
    "gptq 4 bits, scattered": gptq_layout(4, is_scattered=True),
    "gptq 3 bits": gptq_layout(3),
    "gptq 8 bits": gptq_layout(8),
    "awq": awq_layout(),
    "compressed-tensors": compressed_tensors_layout(is_symmetric=False),
    "compressed-tensors, symmetric": compressed_tensors_layout(is_symmetric=True),
}
QUANTISED = [name for name in LAYOUTS if name not in ("float32", "bfloat16")]


def write_model(folder: Path, shape: Shape, layout: Layout, *, has_row_bias: bool | None = None) -> None:
    """One layer. Matrices of quantised checkpoints have biases where Qwen2 has none, as AutoGPTQ writes them."""
    quantization = layout.config(shape.group_size)
    if has_row_bias is None:
        has_row_bias = quantization is not None
    config = {
        **CONFIG,
        "hidden_size": HIDDEN,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": 1,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": shape.is_tied,
        "torch_dtype": str(layout.dtype).removeprefix("torch."),
        **({"quantization_config": quantization} if quantization else {}),
    }
    generator = torch.Generator().manual_seed(0)

    def vector(size: int, mean: float) -> torch.Tensor:
        return torch.randn(size, generator=generator).mul_(0.3).add_(mean).to(layout.dtype)

    def table() -> torch.Tensor:
        return torch.randn(VOCAB_SIZE, HIDDEN, generator=generator).div_(HIDDEN**0.5).to(layout.dtype)

    tensors = {"model.embed_tokens.weight": table(), "model.norm.weight": vector(HIDDEN, 1)}
    if not shape.is_tied:
        tensors["lm_head.weight"] = table()
    prefix = "model.layers.0"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = vector(HIDDEN, 1)
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    for name, num_outputs, num_inputs in (
        ("self_attn.q_proj", heads, HIDDEN),
        ("self_attn.k_proj", kv_heads, HIDDEN),
        ("self_attn.v_proj", kv_heads, HIDDEN),
        ("self_attn.o_proj", HIDDEN, heads),
        ("mlp.gate_proj", shape.intermediate_size, HIDDEN),
        ("mlp.up_proj", shape.intermediate_size, HIDDEN),
        ("mlp.down_proj", HIDDEN, shape.intermediate_size),
    ):
        matrix = layout.stored(num_outputs, num_inputs, shape.group_size, generator)
        if num_inputs == HIDDEN and name.startswith("self_attn") or num_outputs == HIDDEN and has_row_bias:
            matrix["bias"] = vector(num_outputs, 0)
        tensors |= {f"{prefix}.{name}.{leaf}": tensor.contiguous() for leaf, tensor in matrix.items()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Shape and layout -> the model's folder, which is written once."""
    root = tmp_path_factory.mktemp("sharded")

    def write(shape: str, layout: str) -> Path:
        folder = root / f"{shape} {layout}"
        if not folder.exists():
            write_model(folder, SHAPES[shape], LAYOUTS[layout])
        return folder

    return write


def make_runner(folder: Path, dtype: torch.dtype, quantize: str | None, parallel: ParallelState) -> ModelRunner:
    config = read_model_config(folder)
    quantization = settle_quantization(config, folder, dtype, KERNELS, quantize, None)
    runner = ModelRunner(build_model(config, folder, dtype, KERNELS, quantization, parallel), KERNELS)
    runner.allocate(16, KERNELS.kv_dtype(dtype), num_positions=16 * BLOCK_SIZE)
    return runner


def run_batches(runner: ModelRunner) -> torch.Tensor:
    """Logits of batches of one, two and three prompts of different lengths: the prompts in one step, then two more."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for batch_size in (1, 2, 3):
        ids = [torch.randint(VOCAB_SIZE, (size + 2,), generator=generator).tolist() for size in PROMPT_LENGTHS]
        sequences = [
            make_sequence(ids[number][:size], [3 * number, 3 * number + 1])
            for number, size in enumerate(PROMPT_LENGTHS[:batch_size])
        ]
        rows.append(run_step(runner, sequences, [len(sequence.token_ids) for sequence in sequences]))
        for step in range(2):
            for sequence, all_ids, size in zip(sequences, ids, PROMPT_LENGTHS, strict=False):
                sequence.token_ids.append(all_ids[size + step])
            rows.append(run_step(runner, sequences, [1] * batch_size))
    return torch.cat(rows)


def logits_of(folder: Path, dtype: torch.dtype, quantize: str | None, size: int) -> torch.Tensor:
    """What rank 0 of `size` computes; the others have no rows."""

    def run(parallel: ParallelState) -> torch.Tensor:
        numba.set_num_threads(1)
        return run_batches(make_runner(folder, dtype, quantize, parallel))

    first, *others = run_ranks(size, run)
    assert first.shape == (3 * (1 + 2 + 3), VOCAB_SIZE)
    assert all(rows.shape == (0, VOCAB_SIZE) for rows in others)
    return first


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, over the spread of the logits."""
    return ((logits - expected).abs().max() / (expected.max() - expected.min())).item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32(shape: str, layout: str, folder_of: Callable[[str, str], Path]) -> None:
    folder, quantize = folder_of(shape, layout), LAYOUTS[layout].quantize
    whole = logits_of(folder, torch.float32, quantize, 1)
    for size in SIZES:
        logits = logits_of(folder, torch.float32, quantize, size)
        print(shape, layout, size, distance(logits, whole))
        if LAYOUTS[layout].is_scattered:
            assert torch.equal(logits, whole), "all inputs are gathered, and each output is the sum of one rank"
        assert distance(logits, whole) < 1e-5


@pytest.mark.parametrize("layout", ["bfloat16", *QUANTISED])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_stored(shape: str, layout: str, folder_of: Callable[[str, str], Path]) -> None:
    folder, quantize, dtype = folder_of(shape, layout), LAYOUTS[layout].quantize, LAYOUTS[layout].dtype
    whole = logits_of(folder, dtype, quantize, 1)
    for size in SIZES:
        logits = logits_of(folder, dtype, quantize, size)
        print(shape, layout, size, distance(logits, whole))
        if layout != "bfloat16" and FOUND is not None:
            assert torch.equal(logits, whole), "where activations are rounded all inputs are gathered"
        assert distance(logits, whole) < 1e-5
