"""Perplexity of a folder's model as the engine runs it, with the same kernels, those for quantized weights included."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Sequence as SequenceOf

from engine.build import load_model
from engine.device import detect_device
from engine.link.config import EngineConfig
from engine.link.messages import GenerationRequest
from engine.runner import ModelRunner
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.sequence import Sequence
from engine.start import set_threads


def perplexity(config: EngineConfig, token_ids: SequenceOf[int], window: int = 512) -> float:
    """The perplexity of the model of `config`, in its dtype and quantization, on `token_ids`; limits have no effect.

    Every window of tokens starts afresh, and every token but the first of its window is scored. Raises StartError.
    """
    set_threads(config.num_threads)
    device = detect_device()
    loaded = load_model(config, device)
    runner = ModelRunner(loaded.model, device)
    runner.allocate(-(-window // runner.block_size), device.kv_dtype(loaded.dtype), num_positions=window)
    return runner_perplexity(runner, token_ids, window)


def runner_perplexity(runner: ModelRunner, token_ids: SequenceOf[int], window: int) -> float:
    """The perplexity of a runner that has KV memory for one window."""
    total, num_scored = 0.0, 0
    for first in range(0, len(token_ids) - 1, window):
        request = GenerationRequest(
            request_id="window",
            prompt_token_ids=list(token_ids[first : first + window]),
            max_new_tokens=1,
            has_prompt_logprobs=True,
        )
        sequence = Sequence(request, arrival_time=time.monotonic())
        sequence.block_table = array("i", range(-(-sequence.num_tokens // runner.block_size)))
        batch = ScheduledBatch()
        batch.add(sequence, sequence.num_tokens)
        logprobs = runner.execute(batch).copy_scores().read().tolist()
        total += math.fsum(logprobs)
        num_scored += len(logprobs)
    if not num_scored:
        raise ValueError("a perplexity needs two tokens of a window at least")
    return math.exp(-total / num_scored)
