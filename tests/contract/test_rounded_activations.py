"""Where activations are rounded on a CPU, and where not: for quantised weights by default, for dense ones on request.

The numeric contract holds as without rounding: ids depend on no company.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from engine.attention.cpu import BLOCK_SIZE
from engine.build import build_model, choose_quantization
from engine.checkpoint.files import read_model_config
from engine.link.config import EngineConfig
from engine.runner import ModelRunner
from engine.sampling.sampler_cpu import sample
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.scheduler import Scheduler
from engine.start import start_engine
from quant.kernels.bfloat16_cpu import Bfloat16Cpu
from quant.kernels.integer_cpu import FOUND
from tests.contract.harness import KERNELS, all_logits, make_requests, random_ids, run_requests
from tests.tiny_model import EOS_TOKEN_IDS, write_tiny_qwen2
from tests.unit.engine.core_builders import assemble_core

pytestmark = pytest.mark.skipif(
    FOUND is None or Bfloat16Cpu.rounding is None, reason="the processor has none of the instruction sets"
)
METHODS = [None, "eetq", "int4"]
"""--quantize; None: dense, with --dtype bfloat16 where the dtype is that."""


def make_runner(folder: Path, dtype: torch.dtype, method: str | None) -> ModelRunner:
    config = read_model_config(folder)
    is_bfloat16 = method is None and dtype == torch.bfloat16
    quantization = choose_quantization(config, folder, dtype, KERNELS, method, None, is_bfloat16=is_bfloat16)
    runner = ModelRunner(build_model(config, folder, dtype, KERNELS, quantization), KERNELS)
    runner.allocate(64, KERNELS.kv_dtype(dtype), num_positions=64 * BLOCK_SIZE)
    return runner


@pytest.mark.parametrize("method", METHODS)
def test_the_error_is_that_of_rounding(method: str | None, tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, is_tied=False, dtype=torch.bfloat16)
    ids = random_ids(40)
    exact = all_logits(make_runner(tmp_path, torch.float32, method), ids, 30, [16])
    runner = make_runner(tmp_path, torch.bfloat16, method)
    rounded = all_logits(runner, ids, 30, [16])
    error = ((rounded - exact).norm() / exact.norm()).item()
    print(f"{method}: logits differ by {error:.4f} of their length")
    assert 1e-4 < error < (0.01 if method is None else 0.03), "rounding, an int8 head and a bfloat16 cache"


@pytest.mark.parametrize("method", METHODS)
def test_ids_do_not_depend_on_company_chunks_cache_or_preemption(method: str | None, tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, is_tied=False, dtype=torch.bfloat16)
    runner = make_runner(tmp_path, torch.bfloat16, method)
    prompts = [random_ids(size, seed=size) for size in (70, 33, 50, 9, 41)]

    def run(num_blocks: int, max_batch_tokens: int, prompts: list[list[int]]):  # type: ignore[no-untyped-def]
        blocks = BlockManager(num_blocks, BLOCK_SIZE)
        scheduler = Scheduler(blocks, max_batch_tokens=max_batch_tokens, eos_token_ids=EOS_TOKEN_IDS)
        core = assemble_core(scheduler, runner, sample=sample)
        return run_requests(core, make_requests(prompts, max_new_tokens=30), is_staggered=True)

    alone = [run(64, 512, [prompt]).token_ids[0] for prompt in prompts]
    assert run(64, 512, prompts).token_ids == alone
    assert run(64, 17, prompts).token_ids == alone
    squeezed = run(16, 512, prompts)
    assert squeezed.num_preemptions > 0
    assert squeezed.token_ids == alone
    repeated = run(64, 512, [prompts[0], prompts[0]])
    assert repeated.most_cached_tokens > 0
    assert repeated.token_ids == [alone[0], alone[0]]


@pytest.mark.parametrize(
    ("dtype", "method", "head", "rounded", "is_attention_rounded"),
    [
        ("auto", "eetq", None, ["8 bits"], True),
        ("auto", "eetq", "none", ["8 bits"], True),
        ("bfloat16", "eetq", "none", ["bfloat16", "8 bits"], True),
        ("float32", "eetq", None, [], False),
        ("auto", None, None, [], False),
        ("float32", None, None, [], False),
        ("bfloat16", None, None, ["bfloat16"], True),
        ("auto", None, "int8", ["8 bits"], False),
    ],
)
def test_the_start_says_what_is_rounded(
    dtype: str,
    method: str | None,
    head: str | None,
    rounded: list[str],
    is_attention_rounded: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_tiny_qwen2(tmp_path, dtype=torch.bfloat16)
    config = EngineConfig(
        model_path=str(tmp_path), dtype=dtype, max_batch_total_tokens=512, quantize=method, quantize_head=head
    )
    with caplog.at_level("INFO"):
        core, _ = start_engine(config)
    assert core.runner._model.attention_shape.is_rounded == is_attention_rounded
    assert re.findall(r"activations are rounded to (\w+(?: bits)?) \(", caplog.text) == rounded
    assert "Row-invariant" in caplog.text
