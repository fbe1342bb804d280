"""From a step's logits to its tokens, in one call."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

import torch

from engine.link.messages import SamplingParams
from engine.sampling.sampler import LaunchSample, PendingTokens, RawRows, Sample
from engine.scheduling.batch import SampledBatch, ScheduledBatch, ScheduledSequence
from engine.scheduling.sequence import Sequence


class LogitsProcessor(Protocol):
    """Changes the logits of some sequences before a token is drawn: penalties, grammar masks."""

    def needs_tokens(self, sequence: Sequence) -> bool:
        """Whether the change of the sequence's next logits takes its tokens so far on the host."""

    def select(self, batch: ScheduledBatch) -> list[ScheduledSequence]:
        """The sequences that have rows in this step and want them changed."""

    def apply(self, selected: SequenceOf[ScheduledSequence], logits: torch.Tensor) -> None:
        """Change the rows of the selected sequences in place; logits [batch.num_rows, vocab] float32."""


class BatchSampler:
    """Lets the processors change the logits, one after the other, and then draws."""

    def __init__(self, sample: Sample, processors: SequenceOf[LogitsProcessor]) -> None:
        self._sample = sample
        self._processors = processors

    def sample(self, batch: ScheduledBatch, logits: torch.Tensor) -> SampledBatch:
        """Choose a token for each row of logits [batch.num_rows, vocab] float32, which change on the way."""
        return self._sample(logits, *self._adjust(batch, logits))

    def needs_tokens(self, sequence: Sequence) -> bool:
        """Whether the choice of the sequence's next token takes its tokens so far on the host."""
        return any(processor.needs_tokens(sequence) for processor in self._processors)

    def launching(self, launch_sample: LaunchSample) -> LaunchingBatchSampler:
        """The same choice by a sampler that can also leave the tokens on the device."""
        return LaunchingBatchSampler(self._sample, self._processors, launch_sample)

    def _adjust(
        self, batch: ScheduledBatch, logits: torch.Tensor
    ) -> tuple[list[SamplingParams], list[int], RawRows | None]:
        """Let the processors change the logits; for each row parameters and position, and copies of changed rows."""
        params: list[SamplingParams] = []
        positions: list[int] = []
        for scheduled in batch.scheduled:
            first = scheduled.sequence.num_output_tokens
            params += [scheduled.sequence.request.sampling] * len(scheduled.rows)
            positions += range(first, first + len(scheduled.rows))
        changes = [(processor, processor.select(batch)) for processor in self._processors]
        changed_rows = {row for _, selected in changes for scheduled in selected for row in scheduled.rows}
        raw = RawRows.of(logits, changed_rows, params)
        for processor, selected in changes:
            if selected:
                processor.apply(selected, logits)
        return params, positions, raw


class LaunchingBatchSampler(BatchSampler):
    """A `BatchSampler` that can also leave the tokens on the device."""

    def __init__(self, sample: Sample, processors: SequenceOf[LogitsProcessor], launch_sample: LaunchSample) -> None:
        super().__init__(sample, processors)
        self._launch_sample = launch_sample

    def launch(self, batch: ScheduledBatch, logits: torch.Tensor) -> PendingTokens:
        """As `sample`, but the tokens are read later. The batch's sequences are as they were when it was scheduled."""
        return self._launch_sample(logits, *self._adjust(batch, logits))
