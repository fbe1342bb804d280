"""Scored tokens and perplexity against `transformers`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine.link.config import EngineConfig
from engine.quantize.perplexity import perplexity
from quant.config import ON_LOAD
from tests.contract.harness import oracle_logits, random_ids
from tests.contract.test_quantize_on_load import write_widened
from tests.tiny_model import write_tiny_qwen2


def expected_logprobs(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids) - 1]: of every token but the first."""
    chosen = oracle_logits(folder, token_ids)[:-1].log_softmax(dim=1)
    return chosen.gather(1, torch.tensor(token_ids[1:]).unsqueeze(1)).squeeze(1)


def expected_perplexity(folder: Path, token_ids: list[int], window: int) -> float:
    starts = range(0, len(token_ids), window)
    logprobs = torch.cat([expected_logprobs(folder, token_ids[start : start + window]) for start in starts])
    return math.exp(-float(logprobs.double().mean()))


@pytest.mark.parametrize("size", [2, 90, 96, 97, 300])
def test_float32_equals_transformers(size: int, tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, is_tied=False)
    token_ids = random_ids(size)
    measured = perplexity(EngineConfig(model_path=str(tmp_path), dtype="float32"), token_ids, window=96)
    assert measured == pytest.approx(expected_perplexity(tmp_path, token_ids, 96), rel=1e-4)


@pytest.mark.parametrize("method", [*ON_LOAD])
def test_quantized_weights_are_what_is_measured(method: str, tmp_path: Path) -> None:
    plain, widened = tmp_path / "plain", tmp_path / "widened"
    write_tiny_qwen2(plain, is_tied=False)
    write_widened(plain, widened, method)
    token_ids = random_ids(200)
    config = EngineConfig(model_path=str(plain), dtype="float32", quantize=method)
    measured = perplexity(config, token_ids, window=128)
    assert measured == pytest.approx(expected_perplexity(widened, token_ids, 128), rel=1e-4)
    assert measured != pytest.approx(expected_perplexity(plain, token_ids, 128), rel=1e-4)


@pytest.mark.parametrize(("token_ids", "window"), [([], 8), ([1], 8), ([1, 2, 3], 1)])
def test_nothing_to_score_is_an_error(token_ids: list[int], window: int, tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path)
    with pytest.raises(ValueError, match="needs two tokens of a window"):
        perplexity(EngineConfig(model_path=str(tmp_path)), token_ids, window)
