"""Checkpoints that the real tools wrote: weights and greedy ids equal the independent dequantisation.

tests/oracles/checkpoints/README.md says where the files come from, tests/oracles/quant_expected.py how the expected
ids and logits were made (`transformers` in float32 on the weights of tests/oracles/dequantize.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.attention.cpu import BLOCK_SIZE
from engine.build import build_model
from engine.checkpoint.files import read_model_config, read_quantization_config
from engine.checkpoint.weights import open_weights
from engine.device import Device
from engine.runner import ModelRunner
from engine.sampling.sampler_cpu import sample
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from quant.config import resolve_quantization
from quant.dense import DenseMethod
from quant.packing import widen
from tests.contract.harness import KERNELS, make_requests, run_requests
from tests.oracles.dequantize import dequantize
from tests.unit.engine.core_builders import assemble_core

CHECKPOINTS = Path(__file__).parents[1] / "oracles" / "checkpoints"
FOLDERS = sorted(path for path in CHECKPOINTS.iterdir() if (path / "expected.npz").is_file())
NEAR_TIE = 1e-4
IDS = [
    pytest.param(folder, id=folder.name, marks=[pytest.mark.long] if "moe" in folder.name else []) for folder in FOLDERS
]
"""Folders with experts, each of which is some kernels more to compile, are left to the slow tests: `test_gguf_experts`
has their ids by the reference implementations."""


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_matrix_has_the_numbers_of_the_dequantization(folder: Path) -> None:
    config = read_model_config(folder)
    stored = read_quantization_config(folder, config)
    weights = open_weights(folder)
    tensors = {name: weights.read(name) for name in weights.names}
    dense = DenseMethod(torch.float32, computes_in_float32=True)
    quantization = resolve_quantization(None, None, stored, tensors, dense, matrices="cpu", is_exact=True)
    expected = dequantize(folder)
    modules = {name.rpartition(".")[0] for name in tensors if "layers" in name and "norm" not in name}
    modules |= {"lm_head"} & {name.rpartition(".")[0] for name in expected}  # what a tied model stores is a copy
    assert "lm_head" in modules or "lm-head" not in folder.name
    for module in sorted(modules):
        params = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.rpartition(".")[0] == module}
        packed = quantization.method_for(module).pack(params)
        np.testing.assert_array_equal(widen(packed).numpy(), expected[f"{module}.weight"], err_msg=module)


@pytest.mark.parametrize("folder", IDS)
def test_greedy_ids_equal_transformers_on_the_dequantized_weights(folder: Path) -> None:
    expected = np.load(folder / "expected.npz")
    prompts = [expected[f"prompt_{number}"].tolist() for number in range(2)]
    for number, ids in enumerate(greedy_ids(folder, KERNELS, prompts)):
        assert expected[f"gaps_{number}"].min() > NEAR_TIE, "a near-tie decides nothing"
        assert ids == expected[f"ids_{number}"].tolist()


def greedy_ids(folder: Path, device: Device, prompts: list[list[int]]) -> list[list[int]]:
    """16 ids after each prompt, in float32."""
    runner = ModelRunner(build_model(read_model_config(folder), folder, torch.float32, device), device)
    runner.allocate(16, torch.float32, num_positions=16 * BLOCK_SIZE)
    scheduler = Scheduler(BlockManager(16, BLOCK_SIZE), max_batch_tokens=64, eos_token_ids=[])
    core = assemble_core(scheduler, runner, sample=sample)
    return run_requests(core, make_requests(prompts, max_new_tokens=16)).token_ids


@pytest.mark.parametrize("name", ["transformers-fp8-tensor", "llmcompressor-fp8-static"])
def test_scales_of_attention_in_8_bits_are_not_used(name: str, tmp_path: Path) -> None:
    """AutoFP8 writes `kv_scale` and scales of outputs, llm-compressor and quark scales by names of their own."""
    folder = tmp_path / name
    shutil.copytree(CHECKPOINTS / name, folder)
    (path,) = folder.glob("*.safetensors")
    attention = "model.layers.0.self_attn"
    ends = [f"{part}_scale" for part in ("kv", "q", "k", "v", "prob_output")]
    names = [*ends, *(f"{part}_proj.output_scale" for part in "qkv")]
    scales = {f"{attention}.{end}": torch.full([], 0.03) for end in names}
    save_file({**load_file(path), **scales}, path, metadata={"format": "pt"})
    expected = np.load(folder / "expected.npz")
    assert greedy_ids(folder, KERNELS, [expected["prompt_0"].tolist()]) == [expected["ids_0"].tolist()]


def test_all_tools_are_there() -> None:
    provenance = json.loads((CHECKPOINTS / "provenance.json").read_text())
    tools = {folder.name.split("-")[0] for folder in FOLDERS}
    assert tools == {"auto", "autoawq", "autoround", "gptqmodel", "llama", "llmcompressor", "transformers"}
    assert provenance
