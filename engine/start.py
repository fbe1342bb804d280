"""From a configuration to an engine that can serve: device, weights, memory, limits, warm-up."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from pathlib import Path
from typing import Any

import torch

from engine.block_manager import BlockManager
from engine.config import EngineConfig, EngineLimits, check_window, resolve_limits
from engine.core import EngineCore, Runner, Sample
from engine.device import Device, detect_device, resolve_dtype
from engine.errors import StartError
from engine.grammar import MASKS, Grammars
from engine.memory import MemoryNeeds, check_weights_fit, settle_kv_blocks, settle_prefill_tokens
from engine.model_files import read_eos_token_ids, read_model_config, safetensors_files
from engine.models.base import CausalLM
from engine.ngram import propose_ngram
from engine.penalties import Penalties
from engine.ranks import Follower, Leader, Ranks
from engine.rope import replace_rope_scaling
from engine.runner import ALONE, BLOCK_SIZE, ModelRunner, build_model, import_entry, settle_quantization
from engine.sampler import SAMPLERS
from engine.scheduler import ScheduledBatch, Scheduler
from engine.sequence import Sequence
from engine.speculate import Speculator
from engine.step_costs import StepCosts
from engine.step_limit import StepLimit
from engine.types import EngineReady, GenerationRequest, SamplingParams
from quant.config import Quantization
from quant.kernels import rounding_instructions

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 64
MEASURED_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32)
MEASUREMENTS = 3


def start_engine(config: EngineConfig, ranks: Ranks | None = None) -> tuple[EngineCore, EngineReady]:
    """Load the model and make everything ready for the first step; also what the other side must know.

    With `ranks` this is rank 0, and the others call `start_follower` at the same time. Raises StartError in words.
    """
    prepared = _prepare(config, ranks)
    limits, device, loaded = prepared.limits, prepared.device, prepared.loaded
    runner = prepared.runner if ranks is None else Leader(prepared.runner, ranks)
    step_limit = StepLimit(device.step_limit_s, device.alone_step_limit_s)
    sample: Sample = import_entry(SAMPLERS, device.sampler, "sampler")
    num_tokens = min(WARM_UP_TOKENS, limits.max_batch_prefill_tokens, limits.max_total_tokens)
    is_row_invariant = _warm_up(runner, sample, step_limit, num_tokens)
    # A step of one token has no place for a draft.
    costs = _measure_steps(runner, sample, num_tokens) if config.max_draft_tokens and num_tokens > 1 else None
    if costs is not None:
        logger.info("Using speculation n-gram with %d input ids", config.max_draft_tokens)
    if ranks is not None:
        ranks.start_serving()
    is_prefix_caching = prepared.config.is_prefix_caching
    folder, vocab_size = Path(config.model_path), loaded.model.vocab_size
    eos_token_ids = read_eos_token_ids(folder, loaded.config)
    scheduler = Scheduler(
        BlockManager(prepared.num_blocks, BLOCK_SIZE, is_prefix_caching=is_prefix_caching),
        max_batch_tokens=limits.max_batch_prefill_tokens,
        eos_token_ids=eos_token_ids,
        max_running=config.max_batch_size,
        speculator=None if costs is None else Speculator(propose_ngram, costs, config.max_draft_tokens),
    )
    apply_masks = functools.partial(import_entry, MASKS, device.sampler, "mask")
    grammars = Grammars(folder / "tokenizer.json", vocab_size, eos_token_ids, config.num_threads, apply_masks)
    _log_summary(prepared, ranks, is_row_invariant=is_row_invariant)
    ready = EngineReady(**dataclasses.asdict(limits), vocab_size=vocab_size)
    penalties = Penalties(config.watermark_gamma, config.watermark_delta)
    return EngineCore(scheduler, runner, sample, step_limit, costs, penalties, grammars), ready


def start_follower(config: EngineConfig, ranks: Ranks) -> Follower:
    """The part of the start that every rank makes, for ranks other than 0. Raises StartError in words."""
    return Follower(_prepare(config, ranks).runner, ranks)


@dataclasses.dataclass(frozen=True, slots=True)
class _Prepared:
    """A runner with weights and memory, and what was settled on the way: the same on every rank."""

    config: EngineConfig
    device: Device
    loaded: LoadedModel
    runner: ModelRunner
    limits: EngineLimits
    num_blocks: int
    kv_dtype: torch.dtype


def _prepare(config: EngineConfig, ranks: Ranks | None) -> _Prepared:
    set_threads(config.num_threads)
    device = detect_device(0 if ranks is None else ranks.world.local_rank)
    if ranks is not None:
        ranks.connect(device.torch_device, config)
    loaded = load_model(config, device, ranks)
    model, dtype = loaded.model, loaded.dtype
    if config.is_prefix_caching and model.rotary.is_prompt_dependent:
        logger.info("Prefix caching is turned off: with dynamic rope scaling keys depend on the prompt's length")
        config = dataclasses.replace(config, is_prefix_caching=False)
    runner = ModelRunner(model, device)
    kv_dtype = device.kv_dtype(dtype)
    needs = MemoryNeeds(
        weights=loaded.weight_bytes,
        per_block=runner.kv_bytes_per_block(kv_dtype),
        per_step_token=model.activations_per_token * device.activation_dtype(dtype).itemsize,
        block_size=BLOCK_SIZE,
    )
    free_bytes = loaded.free_bytes
    if ranks is not None:
        needs, free_bytes = ranks.tightest(needs, free_bytes)
    window = {
        "max_position_embeddings": model.max_position_embeddings,
        "max_window": model.rotary.rope.max_window,
    }
    check_window(config, **window)
    num_blocks = settle_kv_blocks(
        config,
        needs,
        free_bytes=free_bytes,
        window=model.max_position_embeddings,
        is_modest=device.is_widening,
    )
    limits = resolve_limits(config, **window, kv_tokens=num_blocks * BLOCK_SIZE)
    prefill = settle_prefill_tokens(
        limits.max_batch_prefill_tokens,
        needs,
        free_bytes=free_bytes,
        num_blocks=num_blocks,
        is_asked=config.max_batch_prefill_tokens is not None,
    )
    limits = dataclasses.replace(limits, max_batch_prefill_tokens=prefill)
    runner.allocate(num_blocks, kv_dtype, num_positions=limits.max_total_tokens)
    return _Prepared(config, device, loaded, runner, limits, num_blocks, kv_dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedModel:
    """A folder's model with its weights, and what was settled on the way."""

    model: CausalLM
    config: dict[str, Any]
    """Of config.json, with the rope scaling that was asked for."""
    dtype: torch.dtype
    quantization: Quantization
    weight_bytes: int
    """Of memory, roughly."""
    free_bytes: int
    """What could be used before the weights were there."""


def load_model(config: EngineConfig, device: Device, ranks: Ranks | None = None) -> LoadedModel:
    """The rank's part of the model as `config` wants it run. Raises StartError in words."""
    parallel, local_size = (ALONE, 1) if ranks is None else (ranks.state, ranks.world.local_size)
    folder = Path(config.model_path)
    model_config = replace_rope_scaling(read_model_config(folder), config.rope_scaling, config.rope_factor)
    dtype = resolve_dtype(config.dtype, model_config.get("dtype") or model_config.get("torch_dtype"), device)
    # Counted before loading: mapped weights are page cache, which the kernel calls available although we need it.
    # On a CPU all ranks of the host share it, and none has taken anything before all have counted.
    num_sharing = local_size if device.is_memory_shared else 1
    free_bytes = int(device.free_memory_bytes() * config.memory_fraction) // num_sharing
    if ranks is not None:
        ranks.wait_for_all()
    quantization = settle_quantization(model_config, folder, dtype, device, config.quantize, config.quantize_head)
    file_bytes = sum(path.stat().st_size for path in safetensors_files(folder))
    weight_bytes = int(file_bytes * quantization.size_factor) // parallel.size
    check_weights_fit(weight_bytes, free_bytes, config.memory_fraction)
    started = time.monotonic()
    model = build_model(model_config, folder, dtype, device, quantization, parallel)
    logger.info("Weights loaded in %.1f s", time.monotonic() - started)
    return LoadedModel(model, model_config, dtype, quantization, weight_bytes, free_bytes)


def set_threads(num_threads: int) -> None:
    """All heavy work on a CPU is in Numba's pool: a second busy pool on the same cores would only spin against it."""
    torch.set_num_threads(1)
    import numba

    try:
        numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    except ValueError as error:
        raise StartError(
            f"Numba has no OpenMP threading layer ({error}): install libgomp (Debian: libgomp1)"
        ) from error


def _warm_up(runner: Runner, sample: Sample, limit: StepLimit, num_tokens: int) -> bool:
    """Run a prompt, its last token alone, the prompt again; whether that token's logits had the same bits each time.

    Compiles the kernels (a first start only) and teaches `limit` a token's cost. Raises StartError out of memory.
    """
    started = time.monotonic()
    logger.info("Warming up model (the first start on a machine compiles the kernels)")
    prompt = [index % 16 for index in range(num_tokens)]
    request = GenerationRequest(request_id="warm-up", prompt_token_ids=prompt, max_new_tokens=1)
    sequence = Sequence(request, arrival_time=started)
    sequence.block_table = list(range(-(-num_tokens // BLOCK_SIZE)))
    results = []
    for count in (num_tokens, 1, num_tokens):
        sequence.num_computed_tokens = num_tokens - count
        step_started = time.monotonic()
        try:
            logits = runner.execute(ScheduledBatch([sequence], [count])).logits
        except torch.OutOfMemoryError as error:
            raise StartError(
                f"Not enough memory to handle {num_tokens} prefill tokens. You need to decrease "
                "`--max-batch-prefill-tokens`, or --cuda-memory-fraction"
            ) from error
        results.append(logits.clone())
        sample(logits, [SamplingParams(seed=0, top_p=0.9, num_top_tokens=1)], [0])
        seconds = time.monotonic() - step_started
    limit.observe(num_tokens, seconds)
    logger.info("Warm-up took %.1f s", time.monotonic() - started)
    return all(torch.equal(results[0], other) for other in results[1:])


def _measure_steps(runner: Runner, sample: Sample, most: int) -> StepCosts:
    """Seconds of steps of a few rows each, `most` at most: the quickest of some, as others only disturb."""
    started = time.monotonic()
    request = GenerationRequest(request_id="costs", prompt_token_ids=[0], max_new_tokens=most)
    sequence = Sequence(request, arrival_time=started)
    sequence.block_table = list(range(-(-most // BLOCK_SIZE)))
    seconds: dict[int, list[float]] = {rows: [] for rows in MEASURED_ROWS if rows <= most}
    for _ in range(MEASUREMENTS):
        for rows, measured in seconds.items():
            batch = ScheduledBatch([sequence], [1], [[0] * (rows - 1)])
            step_started = time.monotonic()
            sample(runner.execute(batch).logits, [SamplingParams()] * rows, list(range(rows)))
            measured.append(time.monotonic() - step_started)
    # No count is dearer than a larger one: what looks so was disturbed each time.
    quickest = {rows: min(min(seconds[more]) for more in seconds if more >= rows) for rows in seconds}
    logger.info(
        "Steps by rows: %s (measured in %.1f s)",
        ", ".join(f"{rows}: {value * 1000:.1f} ms" for rows, value in quickest.items()),
        time.monotonic() - started,
    )
    return StepCosts(quickest)


def _log_summary(prepared: _Prepared, ranks: Ranks | None, *, is_row_invariant: bool) -> None:
    config, limits, device, loaded = prepared.config, prepared.limits, prepared.device, prepared.loaded
    kv_dtype = prepared.kv_dtype
    logger.info(
        "Model %s on %s: dtype %s, %s",
        config.model_path,
        device.torch_device,
        _name(loaded.dtype),
        loaded.quantization.description,
    )
    if ranks is not None:
        logger.info("%s", ranks.describe())
    logger.info("Setting max batch total tokens to %d", limits.max_batch_total_tokens)
    logger.info(
        "KV cache of %d tokens in %s (%.1f requests of full length), prefix caching %s",
        limits.max_batch_total_tokens,
        _name(kv_dtype),
        limits.max_batch_total_tokens / limits.max_total_tokens,
        "on" if config.is_prefix_caching else "off",
    )
    logger.info(
        "Limits: %d input tokens, %d total tokens, %d tokens per step",
        limits.max_input_tokens,
        limits.max_total_tokens,
        limits.max_batch_prefill_tokens,
    )
    logger.info("Kernels: %s, %d threads", device.attention_backend, config.num_threads)
    rounding = None if loaded.quantization.is_exact else rounding_instructions(device.torch_device.type)
    if rounding is not None:
        logger.info("Quantised matrices: activations are rounded to 8 bits (%s); --dtype float32 keeps them", rounding)
    if is_row_invariant:
        logger.info("Row-invariant: the bits of a token's logits do not depend on what else is computed in its step")
    else:
        logger.info("Not row-invariant: a token's logits may differ in their last bits with what else is in its step")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
