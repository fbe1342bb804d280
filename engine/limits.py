"""The plan of a start: what of the free memory the KV cache and a step take, and the limits that follow from it.

Plain numbers: the module knows no torch and measures nothing.
"""

from __future__ import annotations

import dataclasses
import logging

from engine.link.config import EngineConfig
from engine.link.errors import StartError

logger = logging.getLogger(__name__)

DEFAULT_KV_SHARE = 0.8
"""Part of the memory beside the weights that the KV cache may take without TGI_WIGGLE_ROOM; the rest is for a step."""
DEFAULT_MEASURED_KV_SHARE = 0.95
"""The same part where a step was measured, of what is left beside it: a reserve for what no step showed."""
DEFAULT_KV_TOKENS = 32768
"""KV capacity on a CPU without --max-batch-total-tokens: one full window or this, whichever is more."""
DEFAULT_MAX_BATCH_PREFILL_TOKENS = 4096
SUGGESTED_SHARE = 0.95
"""A refusal suggests this share of what fits at the moment: free memory moves from one start to the next."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryNeeds:
    """Memory that a model takes, in bytes."""

    weights: int
    per_block: int
    per_step_token: int
    """Activations, for every token that one step computes, as estimated."""
    block_size: int
    measured_step: int = 0
    """All that the largest step takes beside weights and KV cache; 0: it was not measured, the estimate counts."""
    graphs: int = 0
    """Captured graphs, as estimated."""
    programs: int = 0
    """Activations and logits of the steps that are programs, as estimated: a larger step has its own beside them."""
    grammars: int = 0
    """The vocabulary that grammars need, where the host's memory is the device's."""

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def fixed(self) -> int:
        """What is there whatever the size of the KV cache."""
        return self.weights + self.measured_step + self.graphs + self.programs + self.grammars


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelWindow:
    """Tokens that a sequence of the model may have at most."""

    max_position_embeddings: int
    max_window: int
    """More than `max_position_embeddings` where rope scaling stretches beyond it: only a user who asks gets it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """`EngineConfig`'s limits with every value resolved."""

    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The blocks that an engine allocates, and the limits within which it serves."""

    num_blocks: int
    limits: EngineLimits


class NotEnoughMemoryError(StartError):
    """More is asked for than there is; the text names a value that would fit."""


def plan_memory(
    config: EngineConfig,
    window: ModelWindow,
    needs: MemoryNeeds,
    *,
    free_bytes: int,
    has_default_cap: bool,
    default_prefill_tokens: int = DEFAULT_MAX_BATCH_PREFILL_TOKENS,
) -> MemoryPlan:
    """Resolve the flags, the model's window and the memory into one plan; each step uses only the results above it.

    `free_bytes` is counted before the weights are there. `has_default_cap` is as in `plan_kv_blocks`. A measured step
    has the tokens of the flag, or `default_prefill_tokens`. Raises StartError where the flags contradict each other,
    NotEnoughMemoryError where more is asked for than there is.
    """
    check_window(config, window)
    num_blocks = plan_kv_blocks(
        config,
        needs,
        free_bytes=free_bytes,
        window=window.max_position_embeddings,
        has_default_cap=has_default_cap,
    )
    kv_tokens = num_blocks * needs.block_size
    limits = _resolve_limits(config, window.max_position_embeddings, kv_tokens, default_prefill_tokens)
    if needs.measured_step:
        return MemoryPlan(num_blocks, limits)
    num_prefill_tokens = plan_prefill_tokens(
        limits.max_batch_prefill_tokens,
        needs,
        free_bytes=free_bytes,
        num_blocks=num_blocks,
        is_explicit=config.max_batch_prefill_tokens is not None,
    )
    return MemoryPlan(num_blocks, dataclasses.replace(limits, max_batch_prefill_tokens=num_prefill_tokens))


def check_weights_fit(weight_bytes: int, free_bytes: int, memory_fraction: float) -> None:
    """`free_bytes` are what `memory_fraction` leaves. Raises StartError."""
    if weight_bytes > free_bytes:
        raise StartError(weights_refusal(weight_bytes, free_bytes, memory_fraction))


def weights_refusal(weight_bytes: int | None, free_bytes: int, memory_fraction: float) -> str:
    """The sentence for weights that don't fit; `weight_bytes` None: they were found to take more than there is."""
    taken = "more than there is" if weight_bytes is None else _size(weight_bytes)
    return (
        f"Not enough memory for the model: its weights take {taken}, {_size(free_bytes)} are free: "
        f"serve a smaller model, or {_more_memory(memory_fraction)}"
    )


def check_window(config: EngineConfig, window: ModelWindow) -> None:
    """Raises StartError when the user wants a longer window than the model has."""
    total, max_window = config.max_total_tokens, window.max_window
    if total is not None and total > max_window:
        reason = (
            f"the model's max_position_embeddings ({max_window})"
            if max_window == window.max_position_embeddings
            else f"what rope scaling stretches the model's window to ({max_window})"
        )
        raise StartError(
            f"`max_total_tokens` ({total}) is more than {reason}: lower --max-total-tokens to {max_window}"
        )


def plan_kv_blocks(
    config: EngineConfig, needs: MemoryNeeds, *, free_bytes: int, window: int, has_default_cap: bool
) -> int:
    """KV blocks that the flags ask for, or that fit. Raises NotEnoughMemoryError with a value that would fit.

    `free_bytes` is counted before the weights are there. With `has_default_cap` no more than one window or
    `DEFAULT_KV_TOKENS` is taken unless a flag asks for more, as other programs use this memory too.
    """
    left = free_bytes - needs.fixed
    share = _kv_share(config, needs)
    available = int(left * share)
    max_blocks = available // needs.per_block
    num_tokens = config.max_batch_total_tokens or config.max_total_tokens or needs.block_size
    if needs.blocks(num_tokens) > max_blocks:
        is_share_too_small = needs.blocks(num_tokens) <= left // needs.per_block
        raise NotEnoughMemoryError(_kv_refusal(config, needs, available, is_share_too_small=is_share_too_small))
    if config.max_batch_total_tokens is not None:
        return needs.blocks(num_tokens)
    if not has_default_cap:
        return max_blocks
    return min(max_blocks, needs.blocks(max(config.max_total_tokens or window, DEFAULT_KV_TOKENS)))


def _kv_share(config: EngineConfig, needs: MemoryNeeds) -> float:
    default = DEFAULT_MEASURED_KV_SHARE if needs.measured_step else DEFAULT_KV_SHARE
    return default if config.kv_memory_share is None else config.kv_memory_share


def _kv_refusal(config: EngineConfig, needs: MemoryNeeds, available: int, *, is_share_too_small: bool) -> str:
    name = "max_total_tokens" if config.max_batch_total_tokens is None else "max_batch_total_tokens"
    num_tokens = config.max_batch_total_tokens or config.max_total_tokens
    suggested = _suggested(available // needs.per_block * needs.block_size, needs)
    if num_tokens and suggested:
        fix = f"lower --{name.replace('_', '-')} to {suggested}"
    elif needs.graphs and needs.blocks(num_tokens or needs.block_size) * needs.per_block <= available + needs.graphs:
        fix = "name fewer or smaller sizes with --cuda-graphs, or 0 for none"
    elif is_share_too_small:
        fix = f"raise TGI_WIGGLE_ROOM ({_kv_share(config, needs):g})"
    else:
        fix = _more_memory(config.memory_fraction)
    purpose = (
        f"to handle `{name}={num_tokens}`" if num_tokens else f"for the smallest KV cache, {needs.block_size} tokens"
    )
    taken = needs.blocks(num_tokens or needs.block_size) * needs.per_block
    return (
        f"Not enough memory {purpose}: the KV cache would take {_size(taken)} of {_size(available)} that are free for "
        f"it: {fix}"
    )


def kv_allocation_refusal(num_tokens: int) -> str:
    """The sentence for a planned KV cache whose memory was gone when it was asked for."""
    return (
        f"Not enough memory for a KV cache of {num_tokens} tokens, although it was free before: another program has "
        "taken it. Start again, or lower --max-batch-total-tokens or --cuda-memory-fraction"
    )


def _resolve_limits(
    config: EngineConfig, max_position_embeddings: int, kv_tokens: int, default_prefill_tokens: int
) -> EngineLimits:
    """Fill in the limits that the user left open, in TGI's order.

    `kv_tokens` is the planned KV capacity. Raises StartError with TGI's sentences where the limits contradict.
    """
    total = _resolve_total_tokens(config, max_position_embeddings, kv_tokens)
    input_tokens = config.max_input_tokens
    if input_tokens is None:
        input_tokens = total - 1
        logger.info("Maximum input tokens defaulted to %d", input_tokens)
    if not 0 < input_tokens < total:
        raise StartError(
            f"`max_input_tokens`({input_tokens}) must be < `max_total_tokens`({total}): "
            f"lower --max-input-tokens or raise --max-total-tokens"
        )
    return EngineLimits(
        max_input_tokens=input_tokens,
        max_total_tokens=total,
        max_batch_prefill_tokens=_resolve_prefill_tokens(
            config, min(default_prefill_tokens, max_position_embeddings), kv_tokens
        ),
        max_batch_total_tokens=kv_tokens,
    )


def _resolve_total_tokens(config: EngineConfig, max_position_embeddings: int, kv_tokens: int) -> int:
    total = config.max_total_tokens
    if total is None:
        total = min(kv_tokens, max_position_embeddings)
        logger.info("Maximum total tokens defaulted to %d", total)
    if total > kv_tokens:
        raise StartError(
            f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {kv_tokens}: "
            f"lower --max-total-tokens to {kv_tokens} or raise --max-batch-total-tokens"
        )
    return total


def _resolve_prefill_tokens(config: EngineConfig, default: int, kv_tokens: int) -> int:
    prefill = config.max_batch_prefill_tokens
    if prefill is None:
        prefill = min(default, kv_tokens)
        logger.info("Default `max_batch_prefill_tokens` to %d", prefill)
    if prefill > kv_tokens:
        raise StartError(
            f"`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: {prefill} and {kv_tokens}: "
            f"lower --max-batch-prefill-tokens to {kv_tokens}"
        )
    return prefill


def plan_prefill_tokens(
    num_tokens: int, needs: MemoryNeeds, *, free_bytes: int, num_blocks: int, is_explicit: bool
) -> int:
    """Tokens of a step whose activations fit beside weights and KV cache, at most `num_tokens`.

    Raises StartError when the user asked for more (`is_explicit`); otherwise fewer are taken, with a warning.
    """
    max_tokens = (free_bytes - needs.weights - needs.programs - num_blocks * needs.per_block) // needs.per_step_token
    if num_tokens <= max_tokens:
        return num_tokens
    suggested = _suggested(max_tokens, needs)
    if not suggested:
        raise StartError(
            "Not enough memory for a step beside the weights and a KV cache of "
            f"{num_blocks * needs.block_size} tokens: lower --max-batch-total-tokens, or give the process more memory"
        )
    return reduce_prefill_tokens(num_tokens, max_tokens, suggested, is_explicit=is_explicit)


def reduce_prefill_tokens(num_tokens: int, max_tokens: int, suggested: int, *, is_explicit: bool) -> int:
    """`max_tokens` in place of more, with a warning; raises StartError with a suggestion for what the user asked."""
    if is_explicit:
        raise StartError(prefill_refusal(num_tokens, suggested))
    logger.warning(
        "Reducing the max batch prefill from %d to %d because there is not enough memory to support it.",
        num_tokens,
        max_tokens,
    )
    return max_tokens


def prefill_refusal(num_tokens: int, suggested: int) -> str:
    """TGI's sentence for a step that is too large, with a value that fits."""
    return (
        f"Not enough memory to handle {num_tokens} prefill tokens. You need to decrease "
        f"`--max-batch-prefill-tokens` to {suggested}"
    )


def _suggested(num_tokens: int, needs: MemoryNeeds) -> int:
    """A little less than `num_tokens`, in whole blocks; 0: there is nothing to suggest."""
    return max(0, int(num_tokens * SUGGESTED_SHARE) // needs.block_size * needs.block_size)


def _more_memory(memory_fraction: float) -> str:
    if memory_fraction < 1:
        return f"raise --cuda-memory-fraction {memory_fraction:g}"
    return "give the process more memory"


def _size(num_bytes: int) -> str:
    if num_bytes < 100_000_000:
        return f"{max(0, num_bytes) / 1e6:.3g} MB"
    return f"{num_bytes / 1e9:.1f} GB"
