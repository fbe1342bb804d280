"""The room that a step has for prompts, so that it ends in time for those who wait for their next token."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_times import Chunk, StepTimes, StepWork, work_of

MIN_PROMPT_TOKENS = 16
"""Prompts get so many tokens in every step, however short the limit: that many cost little more than one."""
MIN_PROMPT_SHARE = 0.5
"""Prompts make a step longer by so much of the time that it takes without them, however short the limit."""
MAX_PROMPT_RATIO = 3.0
"""Where streams are spared, prompts or drafts add so many times what a step takes without them at most."""
SHORT_STEP_S = 0.065
"""A step that would take longer for that is cut, to this time at the least: prompts then add one time for each second
of prompts that wait, ..."""
MIN_PROMPT_RATIO = 1.5
"""... but so many times at the least."""


class StepRoom(Protocol):
    """The room of one step: the scheduler takes it up for one prompt after the other."""

    def begin(self, decodes: SequenceOf[Sequence], prompts: Iterable[Chunk]) -> None:
        """The step computes one token of each of `decodes`, whatever the room; `prompts` are what prompts still lack.

        They are looked at only as far as the room depends on them.
        """

    def num_fitting(self, num_tokens: int, context: int, share: float) -> int:
        """As many of a prompt's next `num_tokens` tokens, after `context` others, as fit into `share` of the room.

        At least one while nothing was taken.
        """

    def take(self, num_tokens: int, context: int) -> None:
        """The step computes `num_tokens` tokens of a prompt after `context` others."""


class EndlessRoom:
    """Room for any step."""

    def begin(self, decodes: SequenceOf[Sequence], prompts: Iterable[Chunk]) -> None:
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

    def begin(self, decodes: SequenceOf[Sequence], prompts: Iterable[Chunk]) -> None:
        num_pairs = sum(sequence.num_tokens for sequence in decodes)
        self._work = StepWork(len(decodes), len(decodes), 0, num_pairs)
        decodes_s = self._times.seconds(self._work)
        if decodes and self._spares_streams:
            self._limit_s = min(self._limit_s, self._sparing_limit_s(decodes_s, prompts))
        self._limit_s = max(self._limit_s, (1 + MIN_PROMPT_SHARE) * decodes_s)

    def _sparing_limit_s(self, decodes_s: float, prompts: Iterable[Chunk]) -> float:
        """The longest step of streams that take `decodes_s` without prompts.

        What is spared streams is waited for by those whose prompts lack tokens. Drafts are there where they pay, and
        nobody waits for them but those who gain by them.
        """
        longest_s = (1 + MAX_PROMPT_RATIO) * decodes_s
        if longest_s <= SHORT_STEP_S:
            return longest_s
        waiting, ratio = StepWork(), MIN_PROMPT_RATIO
        for chunk in prompts:
            waiting = waiting.with_chunk(*chunk)
            ratio = max(ratio, self._times.seconds(waiting))
            if ratio >= MAX_PROMPT_RATIO:
                return longest_s
        return max(SHORT_STEP_S, (1 + ratio) * decodes_s) if waiting.num_tokens else longest_s

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

        `spares_streams`: whether what prompts and drafts add to a step of several sequences is held to a multiple of
        what decoding alone takes (`MAX_PROMPT_RATIO`).
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
            longest, least = 1 + MAX_PROMPT_RATIO, 1 + MIN_PROMPT_RATIO
            text += (
                f", and {longest:g} times what they take without prompts; while few prompts wait {least:g} times, or "
                f"{SHORT_STEP_S:g} s if that is longer"
            )
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
        return TimeRoom(self._times, limit_s, spares_streams=self._spares_streams and not is_only_sequence)
