"""The room that a step has for prompts, so that it ends in time for those who wait for their next token."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_times import StepTimes, StepWork, work_of

MIN_PROMPT_TOKENS = 16
"""Prompts get so many tokens in every step, however short the limit: that many cost little more than one."""
MIN_PROMPT_SHARE = 0.5
"""Prompts make a step longer by so much of the time that it takes without them, however short the limit."""
SHORT_STEP_S = 0.065
"""A step that spares streams may take so long whatever it takes without prompts."""
SPARING_RATIOS = 1.5, 3.0
"""Beyond that prompts add to it as many times what it takes without them as seconds of prompts wait, but no fewer times
and no more than these."""


class StepRoom(Protocol):
    """The room of one step: the scheduler takes it up for one prompt after the other."""

    def begin(self, decodes: SequenceOf[Sequence], num_waiting_tokens: int) -> None:
        """The step computes one token of each of `decodes`, whatever the room.

        `num_waiting_tokens` of prompts are to be computed, in this step and later ones.
        """

    def num_fitting(self, num_tokens: int, context: int, share: float) -> int:
        """As many of a prompt's next `num_tokens` tokens, after `context` others, as fit into `share` of the room.

        At least one while nothing was taken.
        """

    def take(self, num_tokens: int, context: int) -> None:
        """The step computes `num_tokens` tokens of a prompt after `context` others."""


class EndlessRoom:
    """Room for any step."""

    def begin(self, decodes: SequenceOf[Sequence], num_waiting_tokens: int) -> None:
        pass

    def num_fitting(self, num_tokens: int, context: int, share: float) -> int:
        return num_tokens

    def take(self, num_tokens: int, context: int) -> None:
        pass


class TimeRoom:
    """Room for what is predicted to end in time."""

    def __init__(self, times: StepTimes, limit_s: float, *, spares_streams: bool = False) -> None:
        """`limit_s` and `spares_streams` are those of `StepLimit`."""
        self._times = times
        self._limit_s = limit_s
        self._spares_streams = spares_streams
        self._work = StepWork()
        """What the step computes so far."""
        self._num_granted = MIN_PROMPT_TOKENS
        """Tokens that fit whatever the time."""

    def begin(self, decodes: SequenceOf[Sequence], num_waiting_tokens: int) -> None:
        num_pairs = sum(sequence.num_tokens for sequence in decodes)
        self._work = StepWork(len(decodes), len(decodes), 0, num_pairs)
        decodes_s = self._times.seconds(self._work)
        if decodes and self._spares_streams:
            least, most = SPARING_RATIOS
            ratio = min(max(least, self._times.seconds(StepWork(num_waiting_tokens))), most)
            self._limit_s = min(self._limit_s, max(SHORT_STEP_S, (1 + ratio) * decodes_s))
        self._limit_s = max(self._limit_s, (1 + MIN_PROMPT_SHARE) * decodes_s)

    def num_fitting(self, num_tokens: int, context: int, share: float) -> int:
        so_far_s = self._times.seconds(self._work)
        end_s = so_far_s + share * (self._limit_s - so_far_s)

        def seconds(count: int) -> float:
            return self._times.seconds(self._work.with_chunk(count, context))

        num_in_time = bisect.bisect_right(range(1, num_tokens + 1), end_s, key=seconds)
        return min(num_tokens, max(num_in_time, math.ceil(share * self._num_granted)))

    def take(self, num_tokens: int, context: int) -> None:
        self._work = self._work.with_chunk(num_tokens, context)
        self._num_granted = max(0, self._num_granted - num_tokens)


class StepLimit:
    """How long a step may take, and what that is in tokens."""

    def __init__(self, limit_s: float | None, alone_limit_s: float | None, *, spares_streams: bool = False) -> None:
        """`limit_s` holds for a step of several sequences, `alone_limit_s` for that of one; None: there is no limit.

        `spares_streams`: whether prompts and drafts add less while others decode, by what that takes without them.
        """
        self._limit_s = limit_s
        self._spares_streams = spares_streams
        self._alone_limit_s = alone_limit_s
        self._times: StepTimes | None = None

    def describe(self) -> str | None:
        """A line for the summary of the start; None without a limit."""
        if self._limit_s is None:
            return None
        text = f"Steps of several requests are planned to take {self._limit_s:g} s at most"
        if self._spares_streams:
            least, most = (1 + ratio for ratio in SPARING_RATIOS)
            text += f", and beside streams {SHORT_STEP_S:g} s, or {least:g} to {most:g} times what those take alone"
        return f"{text} (target between two tokens)"

    def calibrate(self, num_tokens: int, few_s: float, many_s: float) -> None:
        """A step of one token took `few_s`, one of `num_tokens` tokens of a prompt `many_s`."""
        if self._limit_s is not None or self._alone_limit_s is not None:
            self._times = StepTimes(num_tokens, few_s, many_s)

    def observe(self, batch: ScheduledBatch, seconds: float) -> None:
        """The step of `batch` took `seconds`."""
        if self._times is not None:
            self._times.observe(work_of(batch), seconds)

    def room(self, *, is_only_sequence: bool) -> StepRoom:
        """The next step's room: endless without a limit, or before anything is known."""
        limit_s = self._alone_limit_s if is_only_sequence else self._limit_s
        if limit_s is None or self._times is None:
            return EndlessRoom()
        return TimeRoom(self._times, limit_s, spares_streams=self._spares_streams)
