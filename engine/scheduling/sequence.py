"""Sequence: the engine's mutable state of one request."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from engine.link.messages import GenerationRequest, TokenEvent
from engine.scheduling.adapters import Adapter

UNKNOWN_TOKEN = -1
"""Stands in `Sequence.token_ids` for the token that a launched step chooses, until the host knows it."""


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
    block_copy: tuple[int, int] | None = None
    """A block of others and the own one that its next step copies it to: `num_computed_tokens` counts on that."""
    cache_salt: bytes = b""
    """Sequences share blocks only under equal salts: anything beside the tokens that their KV depends on."""
    block_hashes: list[bytes] = dataclasses.field(default_factory=list)
    """Chained hashes of the first full blocks, as many as were needed so far."""
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    """Logprobs of the prompt's tokens from the second on, as many as are computed; empty unless the request has them.

    The first event takes them away.
    """
    prompt_ranks: list[int] = dataclasses.field(default_factory=list)
    """Ranks of the tokens of `prompt_logprobs`, if the request has them."""
    prompt_top_token_ids: list[list[int]] = dataclasses.field(default_factory=list)
    """The likeliest tokens at the places of `prompt_logprobs`, if the request has them."""
    prompt_top_logprobs: list[list[float]] = dataclasses.field(default_factory=list)
    num_prefix_hit_tokens: int = 0
    """Computed tokens that were found in the prefix cache before the first step."""
    queue_time_s: float | None = None
    """Seconds from arrival to the first step that computes something of it, None before; the first event says it."""
    grammar: OutputGrammar | None = None
    adapter: Adapter | None = None
    """None: the model as it is."""
    needs_tokens: bool = False
    """Whether the choice of a token takes the tokens before it on the host."""
    num_launched: int = 0
    """Steps that compute something of it and whose results are not taken in yet."""
    unknown_row: int = 0
    """Row of the launched step whose choice is the unknown last token."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        if self.adapter is not None:
            self.cache_salt = self.adapter.salt

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_unscored_tokens(self) -> int:
        """Prompt tokens whose logprobs the first event must have and that are not known yet."""
        if not self.request.has_prompt_logprobs or self.num_output_tokens:
            return 0
        return self.num_prompt_tokens - 1 - len(self.prompt_logprobs)

    def add_score(self, logprob: float, rank: int | None, top_token_ids: list[int], top_logprobs: list[float]) -> None:
        """Take in the next prompt token's logprob and rank, and the likeliest tokens at its place.

        There may be a rank, and more of those tokens, where the request wants none.
        """
        self.prompt_logprobs.append(logprob)
        if self.request.has_prompt_ranks:
            assert rank is not None
            self.prompt_ranks.append(rank)
        if num_top := self.request.num_prompt_top_tokens:
            self.prompt_top_token_ids.append(top_token_ids[:num_top])
            self.prompt_top_logprobs.append(top_logprobs[:num_top])

    def move_scores(self, event: TokenEvent) -> None:
        """Hand the prompt's scores over to the first event."""
        event.prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, []
        event.prompt_ranks, self.prompt_ranks = self.prompt_ranks, []
        event.prompt_top_token_ids, self.prompt_top_token_ids = self.prompt_top_token_ids, []
        event.prompt_top_logprobs, self.prompt_top_logprobs = self.prompt_top_logprobs, []

    @property
    def is_prompt(self) -> bool:
        """Whether it lacks more than its newest token, or nothing of it was computed yet."""
        return self.num_uncomputed_tokens > 1 or self.queue_time_s is None

    @property
    def has_unknown_token(self) -> bool:
        """Whether the last token is one that a launched step chooses."""
        return self.token_ids[-1] == UNKNOWN_TOKEN

    @property
    def is_waiting_for_results(self) -> bool:
        """Whether a launched step must be taken in before another one can go on with the sequence."""
        if not self.num_launched:
            return False
        is_full = self.num_output_tokens >= self.request.max_new_tokens
        return bool(self.num_unscored_tokens) or (self.has_unknown_token and (self.needs_tokens or is_full))

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """At least 1 while the sequence lives: the newest token's KV is made by the step that chooses the next one."""
        return len(self.token_ids) - self.num_computed_tokens
