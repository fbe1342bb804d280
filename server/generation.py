"""One sequence on its way: the engine's events become tokens with text, and several sequences one stream or one answer.

`server.service` admits requests and opens their streams; a plain answer is those streams collected.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.link.messages import FinishReason, TokenEvent
from server.errors import IncompleteGenerationError
from server.requests.validation import ValidatedRequest
from server.telemetry.metrics import RequestMetrics
from server.telemetry.spans import log_extra, set_fields
from server.text.detokenizer import Detokenizer, StopChecker, StopCutter
from server.text.pieces import Piece
from server.text.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token by itself: one of the prompt, or one that might have been chosen."""

    id: int
    text: str
    logprob: float
    is_special: bool


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token of the answer; the last one, and only that, has `finish_reason`."""

    id: int
    text: str
    visible: str
    logprob: float
    is_special: bool
    finish_reason: FinishReason | None
    top_tokens: Sequence[ScoredToken]
    """The likeliest tokens at this place, the likeliest first; there are none unless the request has top_n_tokens."""
    pieces: Sequence[Piece]
    """The pieces of the answer that the token completes; with the last token all that are left."""
    num_calls: int
    """Calls of functions up to here."""


@dataclass(slots=True)
class Timings:
    """Moments of one request, in seconds of `time.perf_counter`."""

    started: float
    submitted: float
    queue_s: float = 0.0
    finished: float = 0.0

    @property
    def total_s(self) -> float:
        return self.finished - self.started

    @property
    def validation_s(self) -> float:
        return self.submitted - self.started

    @property
    def inference_s(self) -> float:
        # the queue time is measured by the engine's clock
        return max(0.0, self.finished - self.submitted - self.queue_s)


class Generation:
    """One sequence under way."""

    def __init__(
        self,
        request: ValidatedRequest,
        tokenizer: TextTokenizer,
        timings: Timings,
        metrics: RequestMetrics,
    ) -> None:
        self.seed = request.generation.sampling.seed
        self.num_generated_tokens = 0
        self.num_thought_tokens = 0
        """Tokens between the marks of a thought."""
        self.timings = timings
        self._metrics = metrics
        self._received: float | None = None
        self._parameters = request.parameters
        self._tokenizer = tokenizer
        self._prompt_token_ids = request.generation.prompt_token_ids
        self._has_prompt_logprobs = request.generation.has_prompt_logprobs
        self._first_event = TokenEvent(request_id="")
        """What is told of the prompt."""
        parameters = request.parameters
        shown_ids = request.shown_ids if parameters.skip_special_tokens else tokenizer.special_ids
        self._detokenizer = Detokenizer(tokenizer, self._prompt_token_ids, shown_ids)
        is_stop_shown = parameters.include_stop_str_in_output
        self._is_end_hidden = request.is_stop_hidden and not is_stop_shown
        stop = parameters.stop
        self._stop_checker = StopChecker(() if request.is_stop_hidden else stop)
        self._stop_cutter = StopCutter(stop, is_shown=is_stop_shown) if request.is_stop_hidden and stop else None
        self._reader = request.reader()

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prompt_token_ids)

    @property
    def stop(self) -> str | None:
        """The stop string that has ended the text before itself, as OpenAI has it."""
        return None if self._stop_cutter is None else self._stop_cutter.found

    @property
    def time_per_token_s(self) -> float:
        return self.timings.inference_s / max(1, self.num_generated_tokens)

    @property
    def prefill(self) -> list[ScoredToken]:
        """The prompt's tokens, if the request asks for their logprobs. The first has none."""
        if not self._has_prompt_logprobs:
            return []
        logprobs = [math.nan, *self._first_event.prompt_logprobs]
        return [self._scored(*pair) for pair in zip(self._prompt_token_ids, logprobs, strict=True)]

    @property
    def prompt_texts(self) -> list[str]:
        """The text that each token of the prompt completes; parts of a character but the last one complete none."""
        detokenizer = Detokenizer(self._tokenizer, ())
        return [detokenizer.push(token_id, is_last=False).text for token_id in self._prompt_token_ids]

    @property
    def prefill_tops(self) -> list[list[ScoredToken]]:
        """For each token of `prefill` the likeliest ones at its place: none for the first, or if none are asked for."""
        event = self._first_event
        tops = [
            [self._scored(*pair) for pair in zip(token_ids, logprobs, strict=True)]
            for token_ids, logprobs in zip(event.prompt_top_token_ids, event.prompt_top_logprobs, strict=True)
        ]
        return [[], *(tops or [[]] * len(event.prompt_logprobs))]

    @property
    def prefill_ranks(self) -> list[int | None]:
        """For each token of `prefill` its rank: None for the first."""
        return [None, *self._first_event.prompt_ranks]

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that did not have to be computed."""
        return self._first_event.num_cached_tokens

    @property
    def num_prompt_scores(self) -> int:
        """Numbers that are told of the prompt's tokens."""
        event = self._first_event
        return len(event.prompt_logprobs) + sum(map(len, event.prompt_top_logprobs))

    async def read(self, events: AsyncIterator[TokenEvent]) -> AsyncGenerator[GeneratedToken]:
        """The tokens in `events`, one by one. Raises IncompleteGenerationError if none of them is the last."""
        async for event in events:
            if event.queue_time_s is not None:
                self.timings.queue_s = event.queue_time_s
                self._first_event = event
            self._observe_tokens(len(event.token_ids))
            last = len(event.token_ids) - 1
            for index, token_id in enumerate(event.token_ids):
                top_tokens = self._top_tokens(event, index) if event.top_token_ids else ()
                reason = event.finish_reason if index == last else None
                token = self._next_token(token_id, event.logprobs[index], reason, top_tokens)
                yield token
                if token.finish_reason is not None:
                    return
        raise IncompleteGenerationError

    def _next_token(
        self, token_id: int, logprob: float, reason: FinishReason | None, top_tokens: Sequence[ScoredToken]
    ) -> GeneratedToken:
        """The next token: the last one if the engine says so, a stop string is complete (`docs/wire.md`, 4.4), or the
        reader knows that nothing new comes."""
        # Some tokenizers have an end of sequence that is no special token, and a request may have its own.
        is_end = self._is_end_hidden and reason is FinishReason.EOS_TOKEN
        text, visible = self._detokenizer.push(token_id, is_last=reason is not None, is_hidden=is_end)
        if self._stop_cutter is not None and self.num_generated_tokens >= (self._parameters.min_tokens or 0):
            visible, is_stopped = self._stop_cutter.push(visible, is_last=reason is not None)
            if is_stopped:
                reason = FinishReason.STOP_SEQUENCE
        elif reason is None and (num_kept := self._stop_checker.check(text)) is not None:
            text, visible, reason = text[:num_kept], visible[:num_kept], FinishReason.STOP_SEQUENCE
        reader = self._reader
        was_thinking = reader.is_thinking
        pieces = reader.push(visible)
        self.num_thought_tokens += was_thinking and reader.is_thinking
        if reason is None and reader.is_over:
            reason = FinishReason.EOS_TOKEN
        self.num_generated_tokens += 1
        if reason is not None:
            pieces += reader.finish(is_cut=reason is FinishReason.LENGTH)
            self._finish()
        is_special = self._tokenizer.is_special(token_id)
        return GeneratedToken(
            token_id, text, visible, logprob, is_special, reason, top_tokens, pieces, reader.num_calls
        )

    def _top_tokens(self, event: TokenEvent, index: int) -> list[ScoredToken]:
        pairs = zip(event.top_token_ids[index], event.top_logprobs[index], strict=True)
        return [self._scored(*pair) for pair in pairs]

    def _scored(self, token_id: int, logprob: float) -> ScoredToken:
        tokenizer = self._tokenizer
        return ScoredToken(token_id, tokenizer.decode([token_id]), logprob, tokenizer.is_special(token_id))

    def _observe_tokens(self, num_tokens: int) -> None:
        now = time.perf_counter()
        since = self.timings.started if self._received is None else self._received
        self._metrics.received(num_tokens, now - since, is_first=self._received is None)
        self._received = now

    def _finish(self) -> None:
        timings = self.timings
        timings.finished = time.perf_counter()
        self._metrics.finished(
            total_s=timings.total_s,
            validation_s=timings.validation_s,
            queue_s=timings.queue_s,
            inference_s=timings.inference_s,
            num_generated_tokens=self.num_generated_tokens,
            prefix_hit_ratio=self.num_cached_tokens / self.num_prompt_tokens,
        )
        fields = self._fields()
        set_fields(fields)
        logger.info("Success", extra=log_extra(fields, self._own_fields()))

    def log_cancelled(self) -> None:
        """Write the line of a request whose client left before its end. A failed one has its error's line instead."""
        if self.timings.finished:  # one of several sequences, which has ended
            return
        self.timings.finished = time.perf_counter()
        logger.info("Cancelled", extra=log_extra(self._fields(), self._own_fields()))

    def _fields(self) -> dict[str, str]:
        """TGI's fields of a request's line (`docs/wire.md`, 7.4); nothing of the prompt or the answer."""
        return {
            "parameters": self._parameters.logged(),
            "total_time": _duration(self.timings.total_s),
            "validation_time": _duration(self.timings.validation_s),
            "queue_time": _duration(self.timings.queue_s),
            "inference_time": _duration(self.timings.inference_s),
            "time_per_token": _duration(self.time_per_token_s),
            "seed": f"Some({self.seed})" if self.seed is not None else "None",
        }

    def _own_fields(self) -> dict[str, int]:
        """Fields of a request's line that TGI does not have."""
        return {"prompt_tokens": self.num_prompt_tokens, "generated_tokens": self.num_generated_tokens}


def _duration(seconds: float) -> str:
    """A duration as Rust prints it in TGI's log: `482.34071ms`, `1.5s`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{round(seconds / size, 6):g}{unit}"
    return f"{seconds * 1e9:.0f}ns"


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation."""

    generation: Generation
    tokens: list[GeneratedToken]
    text: str
    finish_reason: FinishReason

    @property
    def pieces(self) -> Iterator[Piece]:
        return (piece for token in self.tokens for piece in token.pieces)

    @property
    def mean_logprob(self) -> float:
        return sum(token.logprob for token in self.tokens) / len(self.tokens)


@dataclass(frozen=True, slots=True)
class Stream:
    """A sequence under way."""

    generation: Generation
    tokens: AsyncIterator[GeneratedToken]

    async def collect(self) -> Completion:
        tokens = [token async for token in self.tokens]
        reason = tokens[-1].finish_reason
        assert reason is not None
        return Completion(self.generation, tokens, "".join(token.visible for token in tokens), reason)


async def collect(streams: Sequence[Stream]) -> list[Completion]:
    """The answers of all streams. The first failure ends the others."""
    if len(streams) == 1:
        return [await streams[0].collect()]
    return await _all_or_none([stream.collect() for stream in streams])


def best_of(completions: Sequence[Completion]) -> Completion:
    """The likeliest of a request's answers by the mean logprob of its tokens; of equals the first."""
    return max(completions, key=lambda completion: completion.mean_logprob)


async def _all_or_none(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def interleave(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, GeneratedToken]]:
    """The tokens of all streams as they come, each with the index of its stream."""
    if len(streams) == 1:
        async for token in streams[0].tokens:
            yield 0, token
        return
    # No larger than needed: what a slow reader has not taken stays with the engine client, which holds it anyway.
    queue: asyncio.Queue[tuple[int, GeneratedToken | Exception | None]] = asyncio.Queue(len(streams))

    async def pump(index: int, stream: Stream) -> None:
        try:
            async for token in stream.tokens:
                await queue.put((index, token))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    num_open = len(streams)
    try:
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        await _cancel(tasks)
