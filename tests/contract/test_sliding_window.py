"""Layers that see only the last tokens, against transformers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.link.errors import StartError
from engine.models.config import attention_windows
from tests.contract.harness import (
    KERNELS,
    REFERENCES,
    all_logits,
    make_core,
    make_requests,
    make_runner,
    oracle_greedy,
    oracle_logits,
    random_ids,
    run_requests,
)
from tests.tiny_model import write_tiny_qwen2

FULL, SLIDING = "full_attention", "sliding_attention"
NEAR_TIE = 1e-4
"""No comparison goes beyond logits that are closer than this."""


def sliding(window: int, **changes: Any) -> dict[str, Any]:
    """What config.json says: of three layers the last two slide."""
    return {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": 1,
        **changes,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "of 1": sliding(1),
    "of 5": sliding(5),
    "of 16": sliding(16),
    "of 20": sliding(20),
    "longer than the text": sliding(100),
    "in every layer": sliding(9, max_window_layers=0),
    "by layer types": sliding(9, layer_types=[SLIDING, FULL, SLIDING]),
    "with yarn": sliding(9, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, **CONFIGS[name])
    token_ids = random_ids(60)
    expected = oracle_logits(tmp_path, token_ids)[39:]
    for device in (KERNELS, REFERENCES):
        logits = all_logits(make_runner(tmp_path, device=device), token_ids, 40, [7, 16, 33])
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [{"max_window_layers": 1}, {"layer_types": [FULL, SLIDING, FULL]}])
def test_the_oracle_would_notice(layers: dict[str, Any], tmp_path: Path) -> None:
    logits = []
    for name, config in {"full": {"num_hidden_layers": 3}, "sliding": sliding(20, **layers)}.items():
        write_tiny_qwen2(tmp_path / name, **config)
        logits.append(oracle_logits(tmp_path / name, random_ids(40))[-1])
    assert (logits[0] - logits[1]).abs().max() > 0.05


@pytest.mark.parametrize("window", [5, 16, 20])
def test_greedy_ids_equal_transformers(window: int, tmp_path: Path) -> None:
    """In one batch, with a prefix that is found in the cache."""
    write_tiny_qwen2(tmp_path, **sliding(window))
    shared = random_ids(40)
    prompts = [shared + random_ids(size, seed=size) for size in (1, 30)] + [random_ids(7)]
    core = make_core(tmp_path, max_batch_tokens=23)
    run_requests(core, make_requests([shared], max_new_tokens=2))
    outcome = run_requests(core, make_requests(prompts, max_new_tokens=16))
    assert outcome.most_cached_tokens == 40
    for prompt, token_ids in zip(prompts, outcome.token_ids, strict=True):
        expected, smallest_gap = oracle_greedy(tmp_path, prompt, 16)
        assert smallest_gap > NEAR_TIE
        assert token_ids == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [None, None, None]),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, [None, None, None]),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None, None, None]),
        ({"use_sliding_window": True}, [None, None, None]),  # the first 28 layers see everything by default
        ({"use_sliding_window": True, "max_window_layers": 2}, [None, None, 4096]),
        (sliding(8), [None, 8, 8]),
        (sliding(8, max_window_layers=3), [None, None, None]),
        (sliding(8, layer_types=[SLIDING, FULL, SLIDING]), [8, None, 8]),
        ({"layer_types": [FULL] * 3}, [None, None, None]),
    ],
)
def test_which_layers_slide(config: dict[str, Any], expected: list[int | None]) -> None:
    assert attention_windows({"num_hidden_layers": 3, **config}) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (sliding(0), "sliding_window 0 in config.json is not a number of tokens: correct it or remove it"),
        (
            sliding(8, sliding_window="8"),
            "sliding_window '8' in config.json is not a number of tokens: correct it or remove it",
        ),
        (
            sliding(8, layer_types=[FULL, SLIDING]),
            "layer_types in config.json must say full_attention or sliding_attention for each of 3 layers",
        ),
        (
            sliding(8, layer_types=[FULL, SLIDING, "chunked_attention"]),
            "layer_types in config.json must say full_attention or sliding_attention for each of 3 layers",
        ),
        (
            {"layer_types": [FULL, SLIDING, FULL]},
            "layer_types in config.json has sliding layers: it must say use_sliding_window and sliding_window, too",
        ),
    ],
)
def test_what_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(StartError) as caught:
        attention_windows({"num_hidden_layers": 3, **config})
    assert str(caught.value) == message
