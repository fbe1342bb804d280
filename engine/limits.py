"""The limits of a start: the flags, the model's window and the KV memory, each value resolved."""

from __future__ import annotations

import dataclasses
import logging

from engine.link.config import EngineConfig
from engine.link.errors import StartError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """`EngineConfig`'s limits with every value settled."""

    max_input_tokens: int
    max_total_tokens: int
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int


DEFAULT_MAX_BATCH_PREFILL_TOKENS = 4096


def check_window(config: EngineConfig, *, max_position_embeddings: int, max_window: int) -> None:
    """Raises StartError when the user wants a longer window than the model has.

    `max_window` is more than `max_position_embeddings` where rope scaling stretches beyond it: only who asks gets it.
    """
    total = config.max_total_tokens
    if total is not None and total > max_window:
        reason = (
            f"the model's max_position_embeddings ({max_position_embeddings})"
            if max_window == max_position_embeddings
            else f"what rope scaling stretches the model's window to ({max_window})"
        )
        raise StartError(
            f"`max_total_tokens` ({total}) is more than {reason}: lower --max-total-tokens to {max_window}"
        )


def resolve_limits(
    config: EngineConfig, *, max_position_embeddings: int, max_window: int, kv_tokens: int
) -> EngineLimits:
    """Settle the limits (reference `tgi-cli.md` 3.1-3.3).

    `kv_tokens` is the KV capacity that was settled on. Raises StartError with TGI's sentences where they contradict.
    """
    check_window(config, max_position_embeddings=max_position_embeddings, max_window=max_window)
    total = config.max_total_tokens
    if total is None:
        total = min(kv_tokens, max_position_embeddings)
        logger.info("Maximum total tokens defaulted to %d", total)
    if total > kv_tokens:
        raise StartError(
            f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {kv_tokens}: "
            f"lower --max-total-tokens to {kv_tokens} or raise --max-batch-total-tokens"
        )
    input_tokens = config.max_input_tokens
    if input_tokens is None:
        input_tokens = total - 1
        logger.info("Maximum input tokens defaulted to %d", input_tokens)
    if not 0 < input_tokens < total:
        raise StartError(
            f"`max_input_tokens`({input_tokens}) must be < `max_total_tokens`({total}): "
            f"lower --max-input-tokens or raise --max-total-tokens"
        )
    prefill = config.max_batch_prefill_tokens
    if prefill is None:
        prefill = min(DEFAULT_MAX_BATCH_PREFILL_TOKENS, max_position_embeddings, kv_tokens)
        logger.info("Default `max_batch_prefill_tokens` to %d", prefill)
    if prefill > kv_tokens:
        raise StartError(
            f"`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: {prefill} and {kv_tokens}: "
            f"lower --max-batch-prefill-tokens to {kv_tokens}"
        )
    return EngineLimits(
        max_input_tokens=input_tokens,
        max_total_tokens=total,
        max_batch_prefill_tokens=prefill,
        max_batch_total_tokens=kv_tokens,
    )
