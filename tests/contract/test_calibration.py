"""A layer in stages computes what `transformers` does, and shows each matrix the inputs it gets there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import make_model
from engine.checkpoint.files import read_model_config
from engine.checkpoint.weights import open_weights
from engine.link.registry import import_entry
from engine.quantize.qwen2_stages import Qwen2Stages
from engine.quantize.stages import STAGES, LayerStages
from quant.config import resolve_quantization
from quant.dense import DenseMethod
from tests.contract.harness import KERNELS, oracle, random_ids
from tests.tiny_model import write_tiny_qwen2, write_tiny_qwen3

NUM_TOKENS = 40
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "own keys for every head": {"num_key_value_heads": 4},
    "windows": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
}


WRITERS = {"qwen2": write_tiny_qwen2, "qwen3": write_tiny_qwen3}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", STAGES)
def test_stages_compute_what_transformers_does(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.quantize.qwen2_stages.TOKENS_AT_A_TIME", 2 * NUM_TOKENS)  # three samples: two batches
    stages_class: type[LayerStages] = import_entry(STAGES, family, "model_type")
    WRITERS[family](tmp_path, **CONFIGS[name])
    config = read_model_config(tmp_path)
    dense = DenseMethod(torch.float32, computes_in_float32=True)
    quantization = resolve_quantization(None, None, None, (), dense, matrices="cpu", is_exact=True)
    model = make_model(config, quantization, torch.float32, KERNELS)
    stages = stages_class(config, model.attention_shape, model.rotary, NUM_TOKENS, torch.device("cpu"))
    reader = open_weights(tmp_path)
    ids = torch.tensor([random_ids(NUM_TOKENS, seed=seed) for seed in range(3)])
    hidden = reader.read("model.embed_tokens.weight")[ids]

    theirs, inputs = oracle(tmp_path), {}
    hooks = [
        module.register_forward_hook(lambda _, args, __, name=name: inputs.update({name: args[0].flatten(0, 1)}))
        for name, module in theirs.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.inference_mode():
        expected = theirs.model(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()

    seen: list[tuple[str, ...]] = []
    for index in range(2):
        prefix = f"model.layers.{index}."
        layer = {key.removeprefix(prefix): reader.read(key) for key in reader.names if key.startswith(prefix)}

        def on_inputs(modules: tuple[str, ...], batches: Iterator[torch.Tensor], prefix: str = prefix) -> None:
            x = torch.cat(list(batches))
            for module in modules:
                torch.testing.assert_close(x, inputs[prefix + module], rtol=1e-4, atol=1e-4)
            seen.append(modules)

        stages.run(index, layer, hidden, on_inputs)
        if index == 0:
            torch.testing.assert_close(hidden, expected[1], rtol=1e-4, atol=1e-4)
    assert tuple(seen) == 2 * stages_class.MATRICES
    normed = theirs.model.norm(hidden)
    torch.testing.assert_close(normed, expected[2], rtol=1e-4, atol=1e-4)


def test_a_matrix_that_is_changed_while_it_settles_is_run_as_changed(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path)
    config = read_model_config(tmp_path)
    dense = DenseMethod(torch.float32, computes_in_float32=True)
    model = make_model(
        config, resolve_quantization(None, None, None, (), dense, matrices="cpu", is_exact=True), torch.float32, KERNELS
    )
    stages = Qwen2Stages(config, model.attention_shape, model.rotary, NUM_TOKENS, torch.device("cpu"))
    reader = open_weights(tmp_path)
    prefix = "model.layers.0."
    layer = {name.removeprefix(prefix): reader.read(name) for name in reader.names if name.startswith(prefix)}
    before = reader.read("model.embed_tokens.weight")[torch.tensor([random_ids(NUM_TOKENS)])]
    hidden = before.clone()

    def on_inputs(modules: tuple[str, ...], batches: Iterator[torch.Tensor]) -> None:
        if modules in (("self_attn.o_proj",), ("mlp.down_proj",)):
            layer[f"{modules[0]}.weight"] = torch.zeros_like(layer[f"{modules[0]}.weight"])

    stages.run(0, layer, hidden, on_inputs)
    assert torch.equal(hidden, before)
