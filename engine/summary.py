"""The lines of a finished start: what was resolved, in the order that TGI's users look for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from engine.build import LoadedModel
from engine.device import Device
from engine.limits import EngineLimits
from engine.link.config import EngineConfig

logger = logging.getLogger(__name__)


def log_summary(
    config: EngineConfig,
    device: Device,
    loaded: LoadedModel,
    limits: EngineLimits,
    *,
    places: Sequence[str | None],
    graphs: str | None,
    overlap: str | None,
    steps: str | None,
) -> None:
    """Log model, memory, limits and kernels, and the lines that are not None; `places` is about shards and nodes."""
    logger.info(
        "Model %s on %s: dtype %s, %s",
        config.model_path,
        device.torch_device,
        _name(loaded.dtype),
        loaded.quantization.description,
    )
    for line in filter(None, places):
        logger.info("%s", line)
    logger.info("Setting max batch total tokens to %d", limits.max_batch_total_tokens)
    logger.info(
        "KV cache of %d tokens in %s (%.1f requests of full length), prefix caching %s",
        limits.max_batch_total_tokens,
        _name(device.kv_dtype(loaded.dtype)),
        limits.max_batch_total_tokens / limits.max_total_tokens,
        "on" if config.is_prefix_caching else "off",
    )
    logger.info(
        "Limits: %d input tokens, %d total tokens, %d tokens per step",
        limits.max_input_tokens,
        limits.max_total_tokens,
        limits.max_batch_prefill_tokens,
    )
    logger.info("Kernels: %s, %d threads", device.attention, config.num_threads)
    for line in filter(None, (graphs, overlap, steps)):
        logger.info("%s", line)
    _log_roundings(dict(loaded.quantization.roundings))


def _log_roundings(roundings: dict[str, str]) -> None:
    if (instructions := roundings.pop("dense", None)) is not None:
        logger.info("Dense matrices: activations are rounded to bfloat16 (%s); --dtype auto keeps them", instructions)
    for instructions in set(roundings.values()):
        logger.info(
            "Quantised matrices: activations are rounded to 8 bits (%s); --dtype float32 keeps them", instructions
        )


def log_row_invariance(is_row_invariant: bool) -> None:
    """Log what the warm-up found about the bits of a row."""
    if is_row_invariant:
        logger.info("Row-invariant: the bits of a token's logits do not depend on what else is computed in its step")
    else:
        logger.info("Not row-invariant: a token's logits may differ in their last bits with what else is in its step")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
