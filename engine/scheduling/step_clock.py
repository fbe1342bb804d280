"""How long the parts of a step take, and the report that says so."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

from engine.link.messages import StepReport, TokenEvent
from engine.scheduling.batch import ScheduledBatch


class StepClock:
    """Times one step, whose parts follow each other without a gap, and fills its report.

    The report of a step that raises says what was scheduled and has no times.
    """

    def __init__(self) -> None:
        self.report = StepReport()
        self._times = [time.monotonic()]

    @contextlib.contextmanager
    def scheduling(self) -> Iterator[None]:
        yield
        self._times.append(time.monotonic())

    @contextlib.contextmanager
    def computing(self, batch: ScheduledBatch) -> Iterator[None]:
        """Time the model and the sampling."""
        self.report.num_sequences = len(batch.scheduled)
        self.report.num_admitted = batch.num_admitted
        self.report.is_prefill = not batch.is_decoding or batch.num_admitted > 0
        yield
        self._times.append(time.monotonic())

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        yield
        self._times.append(time.monotonic())

    def finish(self, events: SequenceOf[TokenEvent]) -> float:
        """Complete the report; the step's seconds."""
        started, scheduled, sampled, ended = self._times
        self.report.total_s, self.report.schedule_s = ended - started, scheduled - started
        self.report.forward_s, self.report.update_s = sampled - scheduled, ended - sampled
        self.report.num_draft_hits = [len(event.token_ids) - 1 for event in events if event.token_ids]
        return self.report.total_s
