"""The largest step that an engine will compute, run once before the KV cache is planned, and the plan that follows.

Only devices with their own memory are measured: what a step takes beside the weights, in kernels, libraries and the
collectives, is then known and not estimated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from engine.device import Device
from engine.limits import (
    DEFAULT_MAX_BATCH_PREFILL_TOKENS,
    MemoryNeeds,
    MemoryPlan,
    NotEnoughMemoryError,
    prefill_refusal,
    reduce_prefill_tokens,
)
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.messages import SamplingParams
from engine.runner import SCORED_ROWS, ModelRunner
from engine.sampling.sampler import RawRows, Sample
from engine.step_inputs import BLOCK_BYTES, StepInputs

logger = logging.getLogger(__name__)

DEFAULT_MAX_RUNNING = 256
"""Sequences that run at a time without --max-batch-size, where steps are measured: TGI's 128 requests, two each."""


def max_measured_running(config: EngineConfig) -> int:
    """Sequences that may run at a time where steps are measured: no step has more rows of logits than the measured."""
    return config.max_batch_size or DEFAULT_MAX_RUNNING


def full_step(num_tokens: int, *, num_positions: int, max_rows: int, block_size: int) -> StepInputs:
    """A step of `num_tokens` at the end of sequences of `num_positions`, all of whose KV is in block 0.

    It has `max_rows` rows of logits if it has so many tokens, and scores as many tokens as the runner does at a time.
    """
    starts = [*range(0, num_tokens, num_positions), num_tokens]
    num_sequences, num_scored = len(starts) - 1, min(SCORED_ROWS, num_tokens)
    num_blocks = -(-num_positions // block_size)
    return StepInputs(
        input_ids=[0] * num_tokens,
        query_start_loc=starts,
        seq_lens=[num_positions] * num_sequences,
        block_table=bytes(num_sequences * num_blocks * BLOCK_BYTES),
        prompt_lens=[num_positions] * num_sequences,
        logits_indices=list(range(min(max_rows, num_tokens))),
        scored_indices=list(range(num_scored)),
        scored_token_ids=[0] * num_scored,
    )


class StepMeter:
    """Measures the memory of steps of one rank, on a device with its own memory."""

    def __init__(
        self,
        runner: ModelRunner,
        device: Device,
        kv_dtype: torch.dtype,
        sample: Sample,
        *,
        num_positions: int,
        max_rows: int,
    ) -> None:
        """Steps attend to `num_positions` tokens."""
        self._runner = runner
        self._device = device
        self._kv_dtype = kv_dtype
        self._sample = sample
        self._num_positions = num_positions
        self._max_rows = max_rows

    def measure(self, num_tokens: int) -> int:
        """Bytes that a step takes at its peak. Leaves the runner with a KV cache of one block.

        Raises torch.OutOfMemoryError where they are not there.
        """
        memory = self._device.memory
        assert memory is not None
        memory.release_cached()
        started, free_bytes = time.monotonic(), self._device.free_memory_bytes()
        self._runner.allocate(1, self._kv_dtype, num_positions=self._num_positions)
        self._compute(num_tokens)
        num_bytes = free_bytes - self._device.free_memory_bytes()
        memory.release_cached()
        seconds = time.monotonic() - started
        logger.info("A step of %d tokens takes %.2f GB (measured in %.1f s)", num_tokens, num_bytes / 1e9, seconds)
        return max(num_bytes, 1)

    def _compute(self, num_tokens: int) -> None:
        """The step and the draw of its tokens, which are random, with top tokens and the raw logits kept."""
        inputs = full_step(
            num_tokens,
            num_positions=self._num_positions,
            max_rows=self._max_rows,
            block_size=self._runner.block_size,
        )
        result = self._runner.run(inputs)
        num_rows = result.logits.shape[0]
        if num_rows:  # other ranks than 0 have none
            rows = list(range(num_rows))
            raw = RawRows(rows, result.logits.clone())
            self._sample(result.logits, [SamplingParams(seed=0, top_p=0.9, num_top_tokens=1)] * num_rows, rows, raw)
            result.copy_scores().read()


def plan_measured(
    config: EngineConfig,
    window: int,
    needs: MemoryNeeds,
    free_bytes: int,
    *,
    measure: Callable[[int], int],
    plan: Callable[[int, int], MemoryPlan],
    is_alone: bool,
) -> MemoryPlan:
    """The plan with the largest step that fits: as many tokens as the flag says or the default, a half, a quarter...

    `needs` are estimated and `free_bytes` counted for the tightest rank, `window` is in tokens. `plan` makes a plan for
    steps of its first argument's tokens, of which this rank has measured its second argument. All ranks call this at
    the same time, and come to the same end; a rank that is not alone can't try again once a step was too large, as
    the others wait in it. Raises StartError.
    """
    spec = config.max_batch_prefill_tokens
    max_tokens = min(DEFAULT_MAX_BATCH_PREFILL_TOKENS, window) if spec is None else spec
    refusal: StartError | None = None
    num_tokens = max_tokens
    while num_tokens >= min(max_tokens, needs.block_size):
        try:
            if num_tokens * needs.per_step_token <= free_bytes - needs.fixed:
                result = plan(num_tokens, measure(num_tokens))
                break
        except NotEnoughMemoryError as error:
            refusal = refusal or error
        except torch.OutOfMemoryError as error:
            if not is_alone:
                raise StartError(prefill_refusal(num_tokens, num_tokens // 2)) from error
        num_tokens //= 2
    else:
        raise refusal or NotEnoughMemoryError(
            "Not enough memory for a step beside the weights: raise --cuda-memory-fraction, or serve a smaller model"
        )
    if num_tokens < max_tokens:
        reduce_prefill_tokens(max_tokens, num_tokens, num_tokens, is_explicit=spec is not None)
    return result
