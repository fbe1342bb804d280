"""From a configuration to an engine that can serve: device, weights, memory, limits, warm-up."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path

import torch

from engine.build import LoadedModel, load_model
from engine.checkpoint.files import read_eos_token_ids
from engine.core import EngineCore
from engine.device import Device, detect_device
from engine.limits import EngineLimits, check_window, resolve_limits
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.messages import EngineReady
from engine.link.registry import import_entry
from engine.memory import MemoryNeeds, plan_kv_blocks, plan_prefill_tokens
from engine.ranks import Follower, Leader, Ranks
from engine.runner import BLOCK_SIZE, ModelRunner
from engine.sampling.batch_sampler import BatchSampler
from engine.sampling.grammar import MASKS, Grammars
from engine.sampling.penalties import Penalties
from engine.sampling.sampler import SAMPLERS, Sample
from engine.scheduling.block_manager import BlockManager
from engine.scheduling.ngram import propose_ngram
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculate import Speculator
from engine.scheduling.step_costs import UnusedCosts
from engine.scheduling.step_limit import StepLimit
from engine.warm_up import WARM_UP_TOKENS, measure_steps, warm_up
from quant.kernels import rounding_instructions

logger = logging.getLogger(__name__)


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
    is_row_invariant = warm_up(runner, sample, step_limit, num_tokens)
    # A step of one token has no place for a draft.
    costs = measure_steps(runner, sample, num_tokens) if config.max_draft_tokens and num_tokens > 1 else None
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
    sampler = BatchSampler(sample, [penalties, grammars])
    return EngineCore(scheduler, runner, sampler, grammars, step_limit, costs or UnusedCosts()), ready


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
    num_blocks = plan_kv_blocks(
        config,
        needs,
        free_bytes=free_bytes,
        window=model.max_position_embeddings,
        has_default_cap=device.computes_in_float32,
    )
    limits = resolve_limits(config, **window, kv_tokens=num_blocks * BLOCK_SIZE)
    prefill = plan_prefill_tokens(
        limits.max_batch_prefill_tokens,
        needs,
        free_bytes=free_bytes,
        num_blocks=num_blocks,
        is_asked=config.max_batch_prefill_tokens is not None,
    )
    limits = dataclasses.replace(limits, max_batch_prefill_tokens=prefill)
    runner.allocate(num_blocks, kv_dtype, num_positions=limits.max_total_tokens)
    return _Prepared(config, device, loaded, runner, limits, num_blocks, kv_dtype)


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
