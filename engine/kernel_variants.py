"""The steps that compile kernels before an engine serves, on devices whose kernels are compiled while they are used.

A kernel is another one for other counts of rows, and some of them only start for what a request asks for. Each is
started once here, so that no request waits for a compiler.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Collection

import numpy as np

from engine.core import Runner
from engine.link.messages import GenerationRequest, SamplingParams
from engine.link.progress import Stage, StartProgress
from engine.sampling.batch_sampler import BatchSampler
from engine.sampling.grammar import ApplyMasks, num_words
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.sequence import Sequence

logger = logging.getLogger(__name__)

PARAMS = (
    SamplingParams(),
    SamplingParams(seed=0, temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, typical_p=0.9, num_top_tokens=1),
    SamplingParams(seed=0, logit_bias={0: 1.0}, num_top_tokens=1),
    SamplingParams(
        is_watermarked=True,
        repetition_penalty=1.1,
        relative_frequency_penalty=0.1,
        frequency_penalty=0.1,
        presence_penalty=0.1,
    ),
)
"""Together they start every kernel of sampling but that of grammars."""


def compile_variants(
    runner: Runner,
    sampler: BatchSampler,
    apply_masks: ApplyMasks,
    row_counts: Collection[int],
    *,
    block_size: int,
    progress: StartProgress,
) -> None:
    """Run a step with each number of rows, and choose tokens in every way that a request may ask for."""
    started = time.monotonic()
    progress.begin(Stage.COMPILING)
    for num_done, num_rows in enumerate(row_counts, start=1):
        batch = make_batch(num_rows, SamplingParams(num_top_tokens=1), block_size)
        sampler.sample(batch, runner.execute(batch).logits)
        progress.advance(num_done / len(row_counts), f"Compiled kernels for {num_rows} rows")
    for params in PARAMS:
        batch = make_batch(1, params, block_size)
        logits = runner.execute(batch).logits
        everything = np.full((1, num_words(logits.shape[1])), -1, np.int32)
        apply_masks(logits, np.zeros(1, np.int32), everything)
        sampler.sample(batch, logits)
    logger.info("Compiling kernels took %.1f s", time.monotonic() - started)


def make_batch(num_rows: int, params: SamplingParams, block_size: int) -> ScheduledBatch:
    """A step of one sequence with a token and a draft, `num_rows` in all."""
    request = GenerationRequest(request_id="variants", prompt_token_ids=[0], max_new_tokens=num_rows, sampling=params)
    sequence = Sequence(request, arrival_time=0.0)
    sequence.block_table = array("i", range(-(-num_rows // block_size)))
    batch = ScheduledBatch()
    batch.add(sequence, 1, [0] * (num_rows - 1))
    return batch
