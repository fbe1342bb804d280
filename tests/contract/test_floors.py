"""The floors count what is really there: bytes of packed weights and of the KV cache, and the documents' tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import quant.config
from benchmarks import floors
from benchmarks.floors import Form, ModelShape, step_bytes, step_flops
from engine.build import build_model, choose_quantization
from engine.checkpoint.files import read_model_config
from engine.runner import ModelRunner
from quant.base import MatrixKernel, PackedWeight
from tests.contract.harness import KERNELS
from tests.tiny_model import write_tiny_gptq, write_tiny_qwen2

DEVICE = dataclasses.replace(
    KERNELS, attention="torch", ops="torch", matrices="torch", sampler="torch", masks="torch", computes_in_float32=False
)
"""Weights in the dtype of the activations, as on GPUs."""
GROUP_SIZE = 32
GPTQ = dataclasses.replace(floors.INT4, group_size=GROUP_SIZE)
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "is_tied": False}


def packed_weights(
    folder: Path, flag: str | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[ModelRunner, list[PackedWeight]]:
    """A runner of the folder's model in bfloat16, and every weight that a kernel was made of."""
    packed: list[PackedWeight] = []
    choose = quant.config.choose_kernel

    def record(backend: str, weight: PackedWeight, **options: bool) -> MatrixKernel:
        packed.append(weight)
        return choose(backend, weight, **options)

    monkeypatch.setattr(quant.config, "choose_kernel", record)
    config = read_model_config(folder)
    quantization = choose_quantization(config, folder, torch.bfloat16, DEVICE, flag, None)
    return ModelRunner(build_model(config, folder, torch.bfloat16, DEVICE, quantization), DEVICE), packed


def num_bytes(packed: PackedWeight) -> int:
    tensors = (getattr(packed, field.name) for field in dataclasses.fields(packed))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize(
    ("flag", "form", "head"),
    [
        (None, floors.DENSE, floors.DENSE),
        ("int8", floors.INT8, floors.INT8),
        ("int4", floors.INT4_64, floors.INT8),
        ("gptq", GPTQ, floors.INT8),
    ],
    ids=["16 bits", "int8", "int4", "gptq"],
)
def test_weights_and_cache_have_the_counted_bytes(
    flag: str | None, form: Form, head: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_gptq = flag == "gptq"
    if is_gptq:
        write_tiny_gptq(tmp_path, group_size=GROUP_SIZE, **SIZES)
    else:
        write_tiny_qwen2(tmp_path, dtype=torch.bfloat16, **SIZES)
    runner, packed = packed_weights(tmp_path, flag, monkeypatch)
    shape = ModelShape.of(read_model_config(tmp_path))
    counted = step_bytes(shape, form, head, context=16, batch=1, bias_bytes=4 if is_gptq else 2)
    is_head = [weight.weight.shape[0] == shape.vocabulary for weight in packed]
    assert sum(is_head) == 1
    assert len(packed) == 1 + shape.num_layers * len(shape.layer_matrices)
    sizes = list(map(num_bytes, packed))
    assert sizes[is_head.index(True)] == counted.head
    assert sum(sizes) - sizes[is_head.index(True)] == counted.linears
    per_token = runner.kv_bytes_per_block(torch.bfloat16) // runner.block_size
    assert counted.kv == 17 * per_token, "sixteen tokens are read and one is written"


def test_an_order_of_the_inputs_is_counted() -> None:
    shape = ModelShape.of(
        {**SIZES, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 9}
    )
    plain, ordered = (
        step_bytes(shape, form, floors.DENSE, context=1, batch=1).linears for form in (floors.INT4, floors.ACT_ORDER)
    )
    assert ordered - plain == sum(inputs for _, inputs in shape.layer_matrices) * torch.int32.itemsize


def test_a_batch_reads_weights_once_and_caches_for_each() -> None:
    one, eight = (step_bytes(floors.QWEN2_7B, floors.INT8, floors.INT8, context=100, batch=batch) for batch in (1, 8))
    assert (one.linears, one.head, one.norms) == (eight.linears, eight.head, eight.norms)
    assert (8 * one.kv, 8 * one.logits, 8 * one.embedding) == (eight.kv, eight.logits, eight.embedding)
    assert one.total == sum(dataclasses.asdict(one).values())


def test_operations_are_two_for_each_weight_and_four_for_each_key() -> None:
    shape = ModelShape(hidden=8, inner=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, vocabulary=10)
    weights = 16 * 8 + 8 * 8 + 32 * 8 + 8 * 16
    assert shape.linear_weights == weights
    decode = step_flops(shape, context=5, queries=1, num_rows=1)
    assert decode == 2 * weights + 2 * 80 + 4 * 5 * 8
    prompt = step_flops(shape, context=3, queries=3, num_rows=1)
    of_all, of_last = 16 * 8, 8 * 8 + 32 * 8 + 8 * 16  # behind attention the last layer has the last token alone
    assert prompt == 3 * 2 * of_all + 2 * of_last + 2 * 80 + 4 * (1 + 2 + 3) * 8
    deeper = step_flops(dataclasses.replace(shape, num_layers=2), context=3, queries=3, num_rows=1)
    assert deeper - prompt == 3 * 2 * weights + 4 * (1 + 2 + 3) * 8


def test_the_sizes_are_those_of_qwen2_7b() -> None:
    assert floors.QWEN2_7B.linear_weights == 6_525_288_448
    config = {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_hidden_layers": 28,
        "vocab_size": 152_064,
    }
    assert ModelShape.of(config) == floors.QWEN2_7B


def test_the_tables_in_the_documents_are_those_that_are_calculated() -> None:
    """After a change, `python benchmarks/floors.py --write`."""
    document = floors.DOCUMENT.read_text()
    assert floors.with_tables(document) == document
    assert floors.tables() in document
