"""From a configuration to an engine that can serve: device, weights, memory, limits, warm-up."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

import torch

from engine.block_manager import BlockManager
from engine.config import EngineConfig, EngineLimits, check_window, resolve_limits
from engine.core import EngineCore, Sample
from engine.device import Device, detect_device, resolve_dtype
from engine.errors import StartError
from engine.model_files import read_eos_token_ids, read_model_config, safetensors_files
from engine.models.base import CausalLM
from engine.runner import BLOCK_SIZE, ModelRunner, build_model, import_entry
from engine.sampler import SAMPLERS
from engine.scheduler import ScheduledBatch, Scheduler
from engine.sequence import Sequence
from engine.step_limit import StepLimit
from engine.types import EngineReady, GenerationRequest, SamplingParams

logger = logging.getLogger(__name__)

KV_MEMORY_SHARE = 0.8
"""Of the memory that is free once the weights are there."""
DEFAULT_KV_TOKENS = 32768
"""KV capacity on a CPU without --max-batch-total-tokens: one full window or this, whichever is more."""
WARM_UP_TOKENS = 64


def start_engine(config: EngineConfig) -> tuple[EngineCore, EngineReady]:
    """Load the model and make everything ready for the first step; also what the other side must know.

    Raises StartError in words.
    """
    device = detect_device()
    _set_threads(config.num_threads)
    folder = Path(config.model_path)
    model_config = read_model_config(folder)
    dtype = resolve_dtype(config.dtype, model_config.get("dtype") or model_config.get("torch_dtype"), device)
    started = time.monotonic()
    free_bytes = device.free_memory_bytes()
    model = build_model(model_config, folder, dtype, device)
    logger.info("Weights loaded in %.1f s", time.monotonic() - started)
    runner = ModelRunner(model, device)
    kv_dtype = device.kv_dtype(dtype)
    # Counted before loading: mapped weights are page cache, which the kernel calls available although we need it.
    free_bytes -= sum(path.stat().st_size for path in safetensors_files(folder))
    num_blocks = _num_blocks(config, model, runner.kv_bytes_per_block(kv_dtype), device, free_bytes)
    limits = resolve_limits(
        config, max_position_embeddings=model.max_position_embeddings, kv_tokens=num_blocks * BLOCK_SIZE
    )
    runner.allocate_kv_cache(num_blocks, kv_dtype)
    step_limit = StepLimit(device.step_limit_s, device.alone_step_limit_s)
    sample: Sample = import_entry(SAMPLERS, device.sampler, "sampler")
    _warm_up(runner, sample, step_limit, min(WARM_UP_TOKENS, limits.max_batch_prefill_tokens, num_blocks * BLOCK_SIZE))
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, is_prefix_caching=config.is_prefix_caching),
        max_batch_tokens=limits.max_batch_prefill_tokens,
        eos_token_ids=read_eos_token_ids(folder, model_config),
    )
    _log_summary(config, limits, dtype, kv_dtype, device)
    ready = EngineReady(**dataclasses.asdict(limits), vocab_size=model.vocab_size)
    return EngineCore(scheduler, runner, sample, step_limit), ready


def _set_threads(num_threads: int) -> None:
    """All heavy work on a CPU is in Numba's pool: a second busy pool on the same cores would only spin against it."""
    torch.set_num_threads(1)
    import numba

    try:
        numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    except ValueError as error:
        raise StartError(
            f"Numba has no OpenMP threading layer ({error}): install libgomp (Debian: libgomp1)"
        ) from error


def _num_blocks(config: EngineConfig, model: CausalLM, bytes_per_block: int, device: Device, free_bytes: int) -> int:
    """KV blocks that the flags ask for, or that fit the memory. Raises StartError when they don't."""
    check_window(config, model.max_position_embeddings)
    available = max(0, int(free_bytes * KV_MEMORY_SHARE))
    most = available // bytes_per_block
    if config.max_batch_total_tokens is not None:
        wanted = -(-config.max_batch_total_tokens // BLOCK_SIZE)
    elif device.is_widening:
        wanted = -(-max(config.max_total_tokens or model.max_position_embeddings, DEFAULT_KV_TOKENS) // BLOCK_SIZE)
        wanted = min(wanted, most) if config.max_total_tokens is None else wanted
    else:
        wanted = most
    if not 0 < wanted <= most:
        raise StartError(
            f"Not enough memory to handle `max_total_tokens={wanted * BLOCK_SIZE}`: the KV cache would take "
            f"{wanted * bytes_per_block / 1e9:.1f} GB of {available / 1e9:.1f} GB: lower --max-total-tokens or "
            f"--max-batch-total-tokens to {most * BLOCK_SIZE} or less"
        )
    return wanted


def _warm_up(runner: ModelRunner, sample: Sample, limit: StepLimit, num_tokens: int) -> None:
    """Run a prompt, one token, the prompt again: compiles the kernels (a first start only), learns a token's cost."""
    started = time.monotonic()
    logger.info("Warming up model (the first start on a machine compiles the kernels)")
    request = GenerationRequest(request_id="warm-up", prompt_token_ids=[0] * num_tokens, max_new_tokens=1)
    sequence = Sequence(request, arrival_time=started)
    sequence.block_table = list(range(-(-num_tokens // BLOCK_SIZE)))
    for count in (num_tokens, 1, num_tokens):
        sequence.num_computed_tokens = num_tokens - count
        step_started = time.monotonic()
        logits = runner.execute(ScheduledBatch([sequence], [count]))
        sample(logits, [SamplingParams(seed=0, top_p=0.9)], [0])
        seconds = time.monotonic() - step_started
    limit.observe(num_tokens, seconds)
    logger.info("Warm-up took %.1f s", time.monotonic() - started)


def _log_summary(
    config: EngineConfig, limits: EngineLimits, dtype: torch.dtype, kv_dtype: torch.dtype, device: Device
) -> None:
    concurrency = limits.max_batch_total_tokens / limits.max_total_tokens
    logger.info("Model %s, dtype %s on %s", config.model_path, _name(dtype), device.torch_device)
    logger.info(
        "KV cache of %d tokens in %s (%.1f requests of full length), prefix caching %s",
        limits.max_batch_total_tokens,
        _name(kv_dtype),
        concurrency,
        "on" if config.is_prefix_caching else "off",
    )
    logger.info(
        "Limits: %d input tokens, %d total tokens, %d tokens per step",
        limits.max_input_tokens,
        limits.max_total_tokens,
        limits.max_batch_prefill_tokens,
    )
    logger.info("Kernels: %s, %d threads", device.attention_backend, config.num_threads)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
