"""Exchanges -> what the statistics are made of: one request's times, tokens, or failure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from http.client import responses

from server.bench.answers import OK, Answer, BrokenAnswerError, read_answer, refusal_text
from server.bench.connection import Exchange
from server.bench.wires import Wire


@dataclass(frozen=True)
class Record:
    """One request; times in seconds. Without a failure it has a token at least."""

    started: float
    ended: float
    failure: str | None = None
    token_times: list[float] = field(default_factory=list)
    """When each event with tokens came."""
    num_prompt_tokens: int = 0
    """As the server says; 0 if it does not."""
    num_output_tokens: int = 0
    is_counted_by_server: bool = False

    @property
    def time_to_first_token_s(self) -> float:
        return self.token_times[0] - self.started

    @property
    def end_to_end_s(self) -> float:
        return self.ended - self.started

    @property
    def gaps_s(self) -> list[float]:
        """Times between events that have tokens."""
        return [after - before for before, after in itertools.pairwise(self.token_times)]

    @property
    def time_per_output_token_s(self) -> float | None:
        """Mean time of a token after the first; None for a single token."""
        if self.num_output_tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.num_output_tokens - 1)


def record_of(exchange: Exchange, wire: Wire) -> Record:
    ended = exchange.reads[-1][0] if exchange.reads else exchange.sent_at
    if exchange.failure is not None:
        return Record(exchange.sent_at, ended, exchange.failure)
    try:
        answer = read_answer(exchange.reads)
        if answer.status != OK:
            return Record(exchange.sent_at, ended, refusal_of(answer))
        return _completed(exchange.sent_at, answer, wire)
    except BrokenAnswerError as error:
        return Record(exchange.sent_at, ended, str(error))


def _completed(started: float, answer: Answer, wire: Wire) -> Record:
    times: list[float] = []
    usage = None
    ended = started
    for ended, data in answer.events():
        event = wire.event(data)
        if event.error is not None:
            return Record(started, ended, event.error)
        if event.has_token:
            times.append(ended)
        usage = event.usage or usage
    if not times:
        return Record(started, ended, "the answer has no token")
    num_prompt, num_output = usage or (0, len(times))
    return Record(started, times[-1], None, times, num_prompt, num_output, usage is not None)


def refusal_of(answer: Answer) -> str:
    """Status and text of an answer that is none, the meaning of the status where it has no text."""
    return f"status {answer.status}: {refusal_text(answer.body) or responses.get(answer.status, 'without a word')}"
