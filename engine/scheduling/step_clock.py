"""How long the parts of a step take, and the report that says so."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf

from engine.link.messages import StepReport, TokenEvent
from engine.scheduling.batch import ScheduledBatch


class StepClock:
    """Times one step, whose parts follow each other without a gap, and fills its report.

    The report of a step that raises says what was scheduled and has no times.
    """

    def __init__(self, last: StepClock | None = None) -> None:
        """`last` times the step that the device computes before this one, if that isn't finished yet.

        The step begins when that one ends, and the device begins with it when it has computed that one.
        """
        self.report = StepReport()
        self._last = last
        self._started = time.monotonic()
        self._scheduled = self._sampled = self._ended = 0.0

    def end_scheduling(self) -> None:
        self._scheduled = time.monotonic()

    def begin_computing(self, batch: ScheduledBatch) -> None:
        """The model and the sampling come next."""
        self.report.num_sequences = len(batch.scheduled)
        self.report.num_admitted = batch.num_admitted
        self.report.is_prefill = not batch.is_decoding or batch.num_admitted > 0

    def end_computing(self) -> None:
        self._sampled = time.monotonic()

    def end_updating(self) -> None:
        self._ended = time.monotonic()

    def finish(self, events: SequenceOf[TokenEvent]) -> float:
        """Complete the report; the step's seconds."""
        begun, computing = self._started, self._scheduled
        if self._last is not None:
            begun, computing = max(begun, self._last._ended), max(computing, self._last._sampled)
            self._last = None
        self.report.total_s, self.report.schedule_s = self._ended - begun, self._scheduled - self._started
        self.report.forward_s, self.report.update_s = self._sampled - computing, self._ended - self._sampled
        self.report.num_draft_hits = [len(event.token_ids) - 1 for event in events if event.token_ids]
        return self.report.total_s
