"""Running out of memory while serving: the request that asked for most ends with an error, and the others go on."""

from __future__ import annotations

import logging

import torch

from engine.link.messages import TokenEvent
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence

logger = logging.getLogger(__name__)

OUT_OF_MEMORY_ERROR = (
    "the device ran out of memory in a step of this request: send a shorter one, or start the server with a lower "
    "--max-batch-prefill-tokens or --max-batch-total-tokens"
)
MAX_LONE_FAILURES = 3
"""Steps in a row that fail with one sequence alone. After so many the device can't serve anybody."""


class Shedder:
    """Takes back steps that the device has no memory for."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._num_lone_failures = 0

    def note_success(self) -> None:
        """A step was computed."""
        self._num_lone_failures = 0

    def shed(self, batch: ScheduledBatch, error: torch.OutOfMemoryError) -> list[TokenEvent]:
        """Take back a step that was scheduled and not computed; the event ends one request, the rest is tried again.

        Raises the error where it keeps coming back with nobody else to end.
        """
        if len(batch.scheduled) == 1:
            self._num_lone_failures += 1
            if self._num_lone_failures >= MAX_LONE_FAILURES:
                raise error
        victim = choose_victim(batch)
        logger.warning(
            "Out of memory in a step of %d tokens for %d sequences; request %s ends: %s",
            batch.num_tokens,
            len(batch.scheduled),
            victim.request.request_id,
            str(error).partition("\n")[0],
        )
        return self._scheduler.take_back(batch, victim, OUT_OF_MEMORY_ERROR)


def choose_victim(batch: ScheduledBatch) -> Sequence:
    """The sequence with the longest part of a prompt in the step; of equals, as in decoding, the latest admitted."""
    longest = max(scheduled.num_tokens for scheduled in batch.scheduled)
    return [scheduled.sequence for scheduled in batch.scheduled if scheduled.num_tokens == longest][-1]
