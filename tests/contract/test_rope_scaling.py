"""Every type of rope scaling, in every spelling of config.json and by flags, against transformers in float32."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.start
from engine.core import EngineCore
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.messages import EngineReady
from engine.start import start_engine
from tests.contract.harness import (
    KERNELS,
    REFERENCES,
    all_logits,
    make_core,
    make_requests,
    make_runner,
    oracle_greedy,
    oracle_steps,
    random_ids,
    run_requests,
)
from tests.tiny_model import write_tiny_qwen2

TRAINED_WINDOW = 32
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED_WINDOW,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED_WINDOW, "beta_fast": 8.0},
}
SPELLINGS = ["type", "rope_type", "rope_parameters"]
SIZES = [1, 20, 31, 32, 33, 40, 70]
MAX_NEW_TOKENS = 20
NEAR_TIE = 1e-4
"""No comparison goes beyond logits that are closer than this."""


def spelled(spelling: str, kind: str, theta: float = 700.0) -> dict[str, Any]:
    """What config.json says."""
    window = {"max_position_embeddings": TRAINED_WINDOW}
    if spelling == "rope_parameters":
        parameters = {"rope_type": kind, "rope_theta": theta, **SCALINGS[kind]}
        return {**window, "rope_theta": None, "rope_parameters": parameters}
    return {**window, "rope_theta": theta, "rope_scaling": {spelling: kind, **SCALINGS[kind]}}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", SCALINGS)
def test_logits_equal_transformers(kind: str, spelling: str, tmp_path: Path) -> None:
    """A prompt that grows beyond the original window, and one that is longer from the start."""
    write_tiny_qwen2(tmp_path, **spelled(spelling, kind))
    token_ids = random_ids(48)
    runners = [make_runner(tmp_path, device=device) for device in (KERNELS, REFERENCES)]
    for num_prompt_tokens, cuts in ((27, [7]), (42, [7, 16, 35])):
        expected = oracle_steps(tmp_path, token_ids, num_prompt_tokens)
        for runner in runners:
            logits = all_logits(runner, token_ids, num_prompt_tokens, cuts)
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in SCALINGS if kind != "default"])
def test_the_oracle_would_notice(kind: str, tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path / "plain", **spelled("type", "default"))
    write_tiny_qwen2(tmp_path / "scaled", **spelled("type", kind))
    plain, scaled = (oracle_steps(tmp_path / name, random_ids(41), 40) for name in ("plain", "scaled"))
    assert (plain - scaled).abs().max() > 0.05


@pytest.mark.parametrize("kind", SCALINGS)
def test_greedy_ids_equal_transformers_in_mixed_batches(kind: str, tmp_path: Path) -> None:
    """Prompts shorter and longer than the original window, together, in small steps, and preempted."""
    write_tiny_qwen2(tmp_path, **spelled("rope_parameters", kind))
    prompts = [random_ids(size, seed=size) for size in SIZES]
    expected = []
    for prompt in prompts:
        token_ids, smallest_gap = oracle_greedy(tmp_path, prompt, MAX_NEW_TOKENS)
        assert smallest_gap > NEAR_TIE
        expected.append(token_ids)
    requests = make_requests(prompts, max_new_tokens=MAX_NEW_TOKENS)
    together, in_small_steps, preempted = (
        run_requests(make_core(tmp_path, is_prefix_caching=False, **sizes), requests)
        for sizes in ({}, {"max_batch_tokens": 11}, {"num_blocks": 7})
    )
    assert together.most_running == len(SIZES)
    assert preempted.num_preemptions > 0
    assert together.token_ids == in_small_steps.token_ids == preempted.token_ids == expected
    assert together.logprobs == in_small_steps.logprobs == preempted.logprobs


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.start, "detect_device", lambda local_rank, name: KERNELS)


def start(folder: Path, **flags: Any) -> tuple[EngineCore, EngineReady]:
    return start_engine(EngineConfig(model_path=str(folder), dtype="float32", num_threads=1, **flags))


@pytest.mark.parametrize(
    ("flags", "scaling"),
    [
        ({"rope_factor": 3.0}, {"type": "linear", "factor": 3.0}),
        ({"rope_scaling": "linear"}, {"type": "default"}),
        ({"rope_scaling": "dynamic", "rope_factor": 4.0}, {"type": "dynamic", "factor": 4.0}),
        ({"rope_scaling": "yarn", "rope_factor": 4.0}, {"type": "yarn", "factor": 4.0}),
        ({"rope_scaling": "default"}, {"type": "default"}),
    ],
)
@pytest.mark.usefixtures("on_the_cpu")
def test_flags_serve_as_the_same_words_in_the_configuration(
    flags: dict[str, Any], scaling: dict[str, Any], tmp_path: Path
) -> None:
    other = {"type": "linear", "factor": 7.0}
    write_tiny_qwen2(tmp_path / "given", **spelled("type", "default") | {"rope_scaling": other})
    write_tiny_qwen2(tmp_path / "wanted", **spelled("type", "default") | {"rope_scaling": scaling})
    core, _ = start(tmp_path / "given", max_total_tokens=TRAINED_WINDOW, **flags)
    prompt = random_ids(20)
    expected, smallest_gap = oracle_greedy(tmp_path / "wanted", prompt, 12)
    assert smallest_gap > NEAR_TIE
    assert run_requests(core, make_requests([prompt], max_new_tokens=12)).token_ids == [expected]


@pytest.mark.usefixtures("on_the_cpu")
def test_a_stretched_window_is_served_to_who_asks_for_it(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, **spelled("type", "yarn"))
    core, limits = start(tmp_path)
    assert limits.max_total_tokens == TRAINED_WINDOW
    core, limits = start(tmp_path, max_total_tokens=4 * TRAINED_WINDOW)
    assert limits.max_total_tokens == 4 * TRAINED_WINDOW
    assert len(core.runner._model.rotary.table.cos) == 4 * TRAINED_WINDOW  # type: ignore[attr-defined]
    prompt = random_ids(100)
    expected, smallest_gap = oracle_greedy(tmp_path, prompt, 28)
    assert smallest_gap > NEAR_TIE
    assert run_requests(core, make_requests([prompt], max_new_tokens=28)).token_ids == [expected]
    with pytest.raises(StartError) as caught:
        start(tmp_path, max_total_tokens=4 * TRAINED_WINDOW + 1)
    assert str(caught.value) == (
        "`max_total_tokens` (129) is more than what rope scaling stretches the model's window to (128): "
        "lower --max-total-tokens to 128"
    )


@pytest.mark.usefixtures("on_the_cpu")
def test_dynamic_turns_prefix_caching_off_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_qwen2(tmp_path, **spelled("type", "dynamic"))
    with caplog.at_level(logging.INFO):
        core, _ = start(tmp_path, max_total_tokens=100)
    lines = [line for line in caplog.messages if "refix caching" in line]
    assert len(lines) == 2
    assert lines[0] == "Prefix caching is turned off: with dynamic rope scaling keys depend on the prompt's length"
    assert lines[1].endswith("prefix caching off")
    run_requests(core, make_requests([random_ids(60)], max_new_tokens=2))
    assert core.scheduler.stats().num_cached_blocks == 0
