"""The model through ModelRunner against transformers: every kind of checkpoint, chunked prompts, then decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention.cpu import BLOCK_SIZE
from engine.device import Device
from tests.contract.harness import (
    KERNELS,
    REFERENCES,
    all_logits,
    make_runner,
    make_sequence,
    oracle_logits,
    random_ids,
    run_step,
)
from tests.tiny_model import write_tiny_qwen2, write_tiny_qwen3

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"is_tied": False},
    "sharded": {"is_tied": False, "num_shards": 3},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16, "is_tied": False},
    "one kv head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 4},
    "theta": {"rope_theta": 1e6},
    "eps": {"rms_norm_eps": 1e-1},
    "transformers 5": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "head_dim 8": {"num_attention_heads": 8},  # the CPU attention kernel can't: falls back to torch
}


@pytest.mark.parametrize("device", [KERNELS, REFERENCES], ids=["kernels", "references"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_logits_equal_transformers(checkpoint: str, device: Device, tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, **CHECKPOINTS[checkpoint])
    token_ids = random_ids(60)
    logits = all_logits(make_runner(tmp_path, device=device), token_ids, 40, [7, 16, 33])
    assert logits.dtype == torch.float32
    expected = oracle_logits(tmp_path, token_ids)[39:]
    assert expected.std() > 0.3, "the tiny model has something to say"
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


QWEN3_CHECKPOINTS: dict[str, dict[str, Any]] = {
    "untied, bfloat16": {"is_tied": False, "dtype": torch.bfloat16},
    "heads of 12": {"head_dim": 12},  # no kernel norms them, nor attends with them
    "biases": {"attention_bias": True},
    "windows": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}


@pytest.mark.parametrize("device", [KERNELS, REFERENCES], ids=["kernels", "references"])
@pytest.mark.parametrize("checkpoint", QWEN3_CHECKPOINTS)
def test_logits_of_every_qwen3_equal_transformers(checkpoint: str, device: Device, tmp_path: Path) -> None:
    changes = QWEN3_CHECKPOINTS[checkpoint]
    write_tiny_qwen3(tmp_path, **changes)
    token_ids = random_ids(60)
    logits = all_logits(make_runner(tmp_path, device=device), token_ids, 40, [7, 16, 33])
    torch.testing.assert_close(logits, oracle_logits(tmp_path, token_ids)[39:], atol=2e-5, rtol=1e-4)


def test_heads_of_a_qwen3_that_does_not_say_have_128_features(tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path, head_dim=128, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    logits = all_logits(make_runner(tmp_path), random_ids(20), 20, [])
    torch.testing.assert_close(logits, oracle_logits(tmp_path, random_ids(20))[19:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("change", ["biases", "norms"])
def test_the_oracle_would_notice(change: str, tmp_path: Path) -> None:
    """The tiny model's biases and norm weights reach the logits: leaving them out would fail the test above."""
    from safetensors.torch import load_file, save_file

    write_tiny_qwen2(tmp_path / "a")
    write_tiny_qwen2(tmp_path / "b")
    path = tmp_path / "b" / "model.safetensors"
    weights = load_file(path)
    for name, tensor in weights.items():
        if change == "biases" and name.endswith(".bias"):
            tensor.zero_()
        if change == "norms" and "norm" in name:
            tensor.fill_(1.0)
    save_file(weights, path, metadata={"format": "pt"})
    first, second = (make_runner(tmp_path / name) for name in "ab")
    token_ids = random_ids(20)
    difference = all_logits(first, token_ids, 19, []) - all_logits(second, token_ids, 19, [])
    assert difference.abs().max() > 0.05


def test_sequences_side_by_side_get_the_bits_they_get_alone(family_dir: Path) -> None:
    """Prompts, chunks and decodes in one step, over stale memory."""
    runner = make_runner(family_dir)
    texts = [random_ids(size, seed=size) for size in (1, 16, 33, 50)]
    alone = []
    for text in texts:
        alone.append(all_logits(runner, text, len(text), []))
    sequences, first_block = [], 20
    for text in texts:
        num_blocks = -(-len(text) // BLOCK_SIZE)
        sequences.append(make_sequence(text, list(range(first_block, first_block + num_blocks))))
        first_block += num_blocks
    run_step(runner, sequences[1:], [15, 20, 17])
    together = run_step(runner, sequences[::-1], [33, 13, 1, 1])
    assert torch.equal(together.flip(0), torch.cat(alone))


def test_chunks_give_the_bits_of_the_whole(family_dir: Path) -> None:
    runner = make_runner(family_dir)
    token_ids = random_ids(70)
    whole = all_logits(runner, token_ids, 65, [])
    for cuts in ([1], [16, 32, 48, 64], [5, 6, 7, 40], [63, 64]):
        assert torch.equal(all_logits(runner, token_ids, 65, cuts), whole)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_bfloat16_is_near(stored: torch.dtype, tmp_path: Path) -> None:
    """Weights and KV in bfloat16, everything else in float32."""
    write_tiny_qwen2(tmp_path, dtype=stored)
    token_ids = random_ids(60)
    expected = oracle_logits(tmp_path, token_ids)[39:]
    logits = all_logits(make_runner(tmp_path, dtype=torch.bfloat16), token_ids, 40, [16])
    torch.testing.assert_close(logits, expected, atol=0.1, rtol=0.0)
    assert not torch.equal(logits, all_logits(make_runner(tmp_path), token_ids, 40, [16]))


def test_bytes_of_a_block(family_dir: Path) -> None:
    runner = make_runner(family_dir)
    head_dim = json.loads((family_dir / "config.json").read_text()).get("head_dim", 16)
    # keys and values, 2 layers, 2 KV heads, 16 tokens
    assert runner.kv_bytes_per_block(torch.bfloat16) == 2 * 2 * 2 * head_dim * 16 * 2
    assert runner.kv_bytes_per_block(torch.float32) == 2 * runner.kv_bytes_per_block(torch.bfloat16)


def test_tensors_that_need_not_be_there_are_let_through(tmp_path: Path) -> None:
    """A stored copy of the tied head, and the rotary frequencies of old checkpoints."""
    from safetensors.torch import load_file, save_file

    write_tiny_qwen2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    token_ids = random_ids(10)
    before = all_logits(make_runner(tmp_path), token_ids, 10, [])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    weights |= {f"model.layers.1.self_attn.{name}_scale": torch.ones(1) for name in "kv"}
    save_file(weights, tmp_path / "model.safetensors")
    assert torch.equal(all_logits(make_runner(tmp_path), token_ids, 10, []), before)


def test_an_index_decides_which_files_are_read(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, num_shards=2)
    names = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(names) == 2
    (tmp_path / "consolidated.safetensors").write_bytes(b"not one of the model's")
    make_runner(tmp_path)
