"""Sequence: the engine's mutable state of one request."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from engine.link.messages import GenerationRequest


class OutputGrammar(Protocol):
    """The grammar of a sequence's output, at the place that the output has reached (`engine.sampling.grammar`)."""

    error: str | None
    """The reason why the grammar cannot be followed any longer, in words for the user; None while it can."""

    def advance(self, token_id: int) -> bool:
        """Take in the next token of the output; False, and `error` is set, if it may not stand there."""

    def count_allowed(self, token_ids: SequenceOf[int]) -> int:
        """Count how many of `token_ids` may follow here, one after the other; nothing is taken in."""

    def forced(self) -> list[int]:
        """Tokens of the only text that may follow here; empty where there is a choice."""


@dataclasses.dataclass(slots=True, weakref_slot=True, eq=False)
class Sequence:
    """Tokens so far, how many of them have their KV computed, and where that KV lies."""

    request: GenerationRequest
    arrival_time: float
    """`time.monotonic()` when the request reached the engine."""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    """Prompt and output."""
    num_prompt_tokens: int = dataclasses.field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Computed tokens that were found in the prefix cache at the last admission."""
    block_table: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    cache_salt: bytes = b""
    """Sequences share blocks only under equal salts: anything beside the tokens that their KV depends on."""
    block_hashes: list[bytes] = dataclasses.field(default_factory=list)
    """Chained hashes of the first full blocks, as many as were needed so far."""
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    """Logprobs of the prompt's tokens from the second on, as many as are computed; empty unless the request has them.

    The first event takes them away.
    """
    queue_time_s: float | None = None
    """Seconds from arrival to the first admission, None before it; the first event says it."""
    grammar: OutputGrammar | None = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_unscored_tokens(self) -> int:
        """Prompt tokens whose logprobs the first event must have and that are not known yet."""
        if not self.request.has_prompt_logprobs or self.num_output_tokens:
            return 0
        return self.num_prompt_tokens - 1 - len(self.prompt_logprobs)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """At least 1 while the sequence lives: the newest token's KV is made by the step that chooses the next one."""
        return len(self.token_ids) - self.num_computed_tokens
