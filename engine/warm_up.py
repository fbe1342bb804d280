"""The first steps of an engine: they compile kernels, and teach the scheduler what a step costs."""

from __future__ import annotations

import contextlib
import logging
import time
from array import array
from collections.abc import Iterator
from typing import Any

import torch
from numba.core import event

from engine.core import Runner
from engine.link.errors import StartError
from engine.link.messages import GenerationRequest, SamplingParams
from engine.link.progress import Stage, StartProgress
from engine.sampling.sampler import Sample
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_costs import StepCosts
from engine.scheduling.step_limit import StepLimit

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 64
MEASURED_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32)
MEASUREMENTS = 3


def warm_up(
    runner: Runner, sample: Sample, limit: StepLimit, num_tokens: int, *, block_size: int, progress: StartProgress
) -> bool:
    """Run a prompt three times and its last token alone twice; True if that token's logits had the same bits each time.

    The first prompt is scored, hence computed call by call; the next of either kind is recorded, the last is a
    program. Compiles the kernels (a first start only) and tells `limit` what the last steps of each kind took. Raises
    StartError out of memory.
    """
    started = time.monotonic()
    progress.begin(Stage.WARMING_UP)
    logger.info("Warming up model (the first start on a machine compiles the kernels)")
    prompt = [index % 16 for index in range(num_tokens)]
    # Scored in its first step, in which all layers have all rows: the last one has the last row alone otherwise.
    request = GenerationRequest(
        request_id="warm-up", prompt_token_ids=prompt, max_new_tokens=1, has_prompt_logprobs=True
    )
    sequence = Sequence(request, arrival_time=started)
    sequence.block_table = array("i", range(-(-num_tokens // block_size)))
    results, seconds = [], {}
    counts = (num_tokens, 1, num_tokens, 1, num_tokens)
    for num_done, count in enumerate(counts):
        progress.advance(num_done / len(counts), f"Warming up: {num_done} of {len(counts)} steps")
        sequence.num_computed_tokens = num_tokens - count
        step_started = time.monotonic()
        batch = ScheduledBatch()
        batch.add(sequence, count)
        try:
            logits = runner.execute(batch).logits
        except torch.OutOfMemoryError as error:
            raise StartError(
                f"Not enough memory to handle {num_tokens} prefill tokens. You need to decrease "
                "`--max-batch-prefill-tokens`, or --cuda-memory-fraction"
            ) from error
        sequence.prompt_logprobs = [0.0] * (num_tokens - 1)
        results.append(logits.clone())
        sample(logits, [SamplingParams(seed=0, top_p=0.9, num_top_tokens=1)], [0])
        seconds[count] = time.monotonic() - step_started
    limit.calibrate(num_tokens, few_s=seconds[1], many_s=seconds[num_tokens])
    logger.info("Warm-up took %.1f s", time.monotonic() - started)
    return all(torch.equal(results[0], other) for other in results[1:])


@contextlib.contextmanager
def watch_compiler(progress: StartProgress) -> Iterator[None]:
    """Report each kernel that Numba compiles in the block. How many there will be is not known.

    A kernel that is in the folder of compiled ones is none of them.
    """

    class Counter(event.Listener):  # type: ignore[misc]  # Numba has no types
        num_begun = 0

        def on_start(self, event: Any) -> None:
            self.num_begun += 1
            progress.advance(None, f"Compiling kernels: {self.num_begun} so far")

        def on_end(self, event: Any) -> None:
            """Nothing: the next one tells, or the next step."""

    with event.install_listener("numba:compile", Counter()):
        yield


def measure_steps(runner: Runner, sample: Sample, max_rows: int, *, block_size: int) -> StepCosts:
    """Measure steps of up to `max_rows` rows, the quickest of some each: other processes only make a step slower."""
    started = time.monotonic()
    request = GenerationRequest(request_id="costs", prompt_token_ids=[0], max_new_tokens=max_rows)
    sequence = Sequence(request, arrival_time=started)
    sequence.block_table = array("i", range(-(-max_rows // block_size)))
    seconds: dict[int, list[float]] = {rows: [] for rows in MEASURED_ROWS if rows <= max_rows}
    for _ in range(MEASUREMENTS):
        for rows, measured in seconds.items():
            batch = ScheduledBatch()
            batch.add(sequence, 1, [0] * (rows - 1))
            step_started = time.monotonic()
            sample(runner.execute(batch).logits, [SamplingParams()] * rows, list(range(rows)))
            measured.append(time.monotonic() - step_started)
    # No count costs more than a larger one: a step that seems to was disturbed each time.
    quickest = {rows: min(min(seconds[more]) for more in seconds if more >= rows) for rows in seconds}
    logger.info(
        "Steps by rows: %s (measured in %.1f s)",
        ", ".join(f"{rows}: {value * 1000:.1f} ms" for rows, value in quickest.items()),
        time.monotonic() - started,
    )
    return StepCosts(quickest)
