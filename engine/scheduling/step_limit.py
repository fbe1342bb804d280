"""The number of tokens that a step may compute so that it ends in time, learnt from the steps so far."""

from __future__ import annotations

MIN_TOKENS_LEARNT_FROM = 16
"""Smaller steps are bound by reading the weights and say nothing about the cost of a token."""
MIN_CHUNK_TOKENS = 16
"""A prompt makes some progress in every step, however short the limit."""
SMOOTHING = 0.3


class StepLimit:
    """Predicts a step's seconds as tokens x seconds per token."""

    def __init__(self, limit_s: float | None, alone_limit_s: float | None) -> None:
        """`limit_s` holds for a step of several sequences, `alone_limit_s` for that of one; None: there is no limit."""
        self._limit_s = limit_s
        self._alone_limit_s = alone_limit_s
        self._seconds_per_token: float | None = None

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` tokens took `seconds`."""
        if num_tokens < MIN_TOKENS_LEARNT_FROM:
            return
        cost = seconds / num_tokens
        if self._seconds_per_token is None:
            self._seconds_per_token = cost
        self._seconds_per_token += SMOOTHING * (cost - self._seconds_per_token)

    def max_tokens(self, *, is_only_sequence: bool) -> int | None:
        """Tokens that fit the limit, `MIN_CHUNK_TOKENS` at least; None: there is no limit, or nothing is learnt yet."""
        limit_s = self._alone_limit_s if is_only_sequence else self._limit_s
        if limit_s is None or self._seconds_per_token is None:
            return None
        return max(MIN_CHUNK_TOKENS, int(limit_s / self._seconds_per_token))
