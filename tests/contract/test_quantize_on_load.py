"""`--quantize eetq`, `int8` and `int4`: ids equal `transformers` on the weights that the method made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.start import start_engine
from quant.config import ON_LOAD
from quant.packing import widen
from quant.registry import load_entry
from tests.contract.harness import make_requests, oracle_greedy, random_ids, run_requests
from tests.tiny_model import write_tiny_qwen2

NEAR_TIE = 1e-4


def start(folder: Path, dtype: str = "float32", **options: str | None):  # type: ignore[no-untyped-def]
    return start_engine(EngineConfig(model_path=str(folder), dtype=dtype, max_batch_total_tokens=512, **options))


def write_widened(source: Path, folder: Path, method: str) -> None:
    """The model that the method makes of `source`, as a plain checkpoint."""
    write_tiny_qwen2(folder, is_tied=False)
    weights = load_file(source / "model.safetensors")
    for name, tensor in weights.items():
        if "_proj.weight" in name:
            weights[name] = widen(load_entry(ON_LOAD[method])().pack({"weight": tensor})).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", [*ON_LOAD])
def test_ids_equal_transformers_on_the_weights_that_were_made(method: str, tmp_path: Path) -> None:
    plain, widened = tmp_path / "plain", tmp_path / "widened"
    write_tiny_qwen2(plain, is_tied=False)
    write_widened(plain, widened, method)
    prompts = [random_ids(size, seed=size) for size in (3, 17, 40)]
    core, _ = start(plain, quantize=method)
    together = run_requests(core, make_requests(prompts, max_new_tokens=24), is_staggered=True)
    alone = [run_requests(core, make_requests([prompt], max_new_tokens=24)).token_ids[0] for prompt in prompts]
    assert together.token_ids == alone
    for prompt, ids in zip(prompts, alone, strict=True):
        expected, smallest_gap = oracle_greedy(widened, prompt, 24)
        assert smallest_gap > NEAR_TIE, "a near-tie decides nothing: take another prompt"
        assert ids == expected


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("head", [None, "none", "int8", "int4"])
def test_heads(head: str | None, is_tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_qwen2(tmp_path, is_tied=is_tied, dtype=torch.bfloat16)
    with caplog.at_level("INFO"):
        core, _ = start(tmp_path, "auto", quantize="eetq", quantize_head=head)
    assert f"dtype bfloat16, eetq, head {({'none': 'dense', None: 'int8'}).get(head, head)}" in caplog.text
    assert "Row-invariant" in caplog.text
    outcome = run_requests(core, make_requests([random_ids(9)], max_new_tokens=8))
    assert outcome.last_events[0].error is None


def test_flags_against_checkpoints(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path)
    with pytest.raises(StartError, match="--quantize awq needs a checkpoint in that format, this one is dense"):
        start(tmp_path, quantize="awq")
    with pytest.raises(StartError, match="--quantize gguf needs .* give the path of one as --model-id"):
        start(tmp_path, quantize="gguf")
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    write_tiny_qwen2(tmp_path, quantization_config=stored)
    with pytest.raises(StartError, match="--quantize eetq, but the checkpoint is gptq: leave --quantize out"):
        start(tmp_path, quantize="eetq")
