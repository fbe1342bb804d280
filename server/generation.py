"""The one streaming path: admit, validate, submit, and turn the engine's events into tokens with text.

Every route goes through `GenerationService.open`; a plain answer is this stream collected. Leaving the block early, for
whatever reason, aborts the sequence and gives the permit back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass

from fastapi import Request

from engine.types import FinishReason, TokenEvent
from server.admission import Admission, Permit
from server.chat import ChatTemplate
from server.client import EngineClient
from server.config import ServerConfig
from server.detokenizer import Detokenizer, StopChecker
from server.errors import IncompleteGenerationError, OverloadedError
from server.metrics import Metrics, RequestMetrics
from server.schemas import GenerateParameters
from server.spans import begin_generation, log_extra, set_fields
from server.tokenizer import TextTokenizer
from server.validation import GenerationInput, ValidatedRequest, Validator

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token of the answer; the last one, and only that, has `finish_reason`."""

    id: int
    text: str
    visible: str
    logprob: float
    is_special: bool
    finish_reason: FinishReason | None


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
        # the queue time is of the engine's clock
        return max(0.0, self.finished - self.submitted - self.queue_s)


class Generation:
    """One running request."""

    def __init__(
        self,
        request: ValidatedRequest,
        parameters: GenerateParameters,
        tokenizer: TextTokenizer,
        timings: Timings,
        metrics: RequestMetrics,
    ) -> None:
        self.seed = request.generation.sampling.seed
        self.num_prompt_tokens = len(request.generation.prompt_token_ids)
        self.num_generated_tokens = 0
        self.timings = timings
        self._metrics = metrics
        self._received: float | None = None
        self._parameters = parameters
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, request.generation.prompt_token_ids)
        self._stop_checker = StopChecker(request.stop)

    @property
    def time_per_token_s(self) -> float:
        return self.timings.inference_s / max(1, self.num_generated_tokens)

    async def read(self, events: AsyncIterator[TokenEvent]) -> AsyncGenerator[GeneratedToken]:
        """The tokens in `events`, one by one. Raises IncompleteGenerationError if none of them is the last."""
        async for event in events:
            if event.queue_time_s is not None:
                self.timings.queue_s = event.queue_time_s
            self._observe(len(event.token_ids))
            num_left = len(event.token_ids)
            for token_id, logprob in zip(event.token_ids, event.logprobs, strict=True):
                num_left -= 1
                token = self._next_token(token_id, logprob, None if num_left else event.finish_reason)
                yield token
                if token.finish_reason is not None:
                    return
        raise IncompleteGenerationError

    def _next_token(self, token_id: int, logprob: float, reason: FinishReason | None) -> GeneratedToken:
        """The engine's reason, which comes first, or a stop string ends the sequence (reference 4.4)."""
        text, visible = self._detokenizer.push(token_id, is_last=reason is not None)
        if reason is None and (num_kept := self._stop_checker.check(text)) is not None:
            text, visible, reason = text[:num_kept], visible[:num_kept], FinishReason.STOP_SEQUENCE
        self.num_generated_tokens += 1
        if reason is not None:
            self._finish()
        return GeneratedToken(token_id, text, visible, logprob, self._tokenizer.is_special(token_id), reason)

    def _observe(self, num_tokens: int) -> None:
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
        )
        fields = self._fields()
        set_fields(fields)
        logger.info("Success", extra=log_extra(fields))

    def log_cancelled(self) -> None:
        """The line of a request whose client left before the end; a failed one has its error's line instead."""
        if self._metrics.is_finished:
            return
        self.timings.finished = time.perf_counter()
        logger.info("Cancelled", extra=log_extra(self._fields()))

    def _fields(self) -> dict[str, str]:
        """TGI's fields of a request's line (reference 7.4); nothing of the prompt or the answer."""
        return {
            "parameters": str(self._parameters.model_dump(exclude_defaults=True, exclude={"stop", "grammar"})),
            "total_time": _duration(self.timings.total_s),
            "validation_time": _duration(self.timings.validation_s),
            "queue_time": _duration(self.timings.queue_s),
            "inference_time": _duration(self.timings.inference_s),
            "time_per_token": _duration(self.time_per_token_s),
            "seed": f"Some({self.seed})" if self.seed is not None else "None",
        }


def _duration(seconds: float) -> str:
    """As Rust prints one in TGI's log: `482.34071ms`, `1.5s`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{round(seconds / size, 6):g}{unit}"
    return f"{seconds * 1e9:.0f}ns"


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished generation."""

    tokens: list[GeneratedToken]
    text: str
    finish_reason: FinishReason


async def collect(tokens: AsyncIterator[GeneratedToken]) -> Answer:
    all_tokens = [token async for token in tokens]
    reason = all_tokens[-1].finish_reason
    assert reason is not None
    return Answer(all_tokens, "".join(token.visible for token in all_tokens), reason)


class GenerationService:
    """What the routes share: the engine, the tokenizer, the limits."""

    def __init__(self, engine: EngineClient, config: ServerConfig, tokenizer: TextTokenizer) -> None:
        self.engine = engine
        self.config = config
        self.tokenizer = tokenizer
        self.chat_template = ChatTemplate(tokenizer.chat_format)
        self._admission = Admission(config.max_concurrent_requests)
        self._validator = Validator(config, tokenizer)
        self.metrics = Metrics(engine.limits, is_strict=config.is_strict_tgi)
        engine.observe_output = self.metrics.observe_output

    def permit_for_stream(self) -> Permit | None:
        """Taken before the status line leaves, so that overload is a plain 429 which clients and proxies understand.

        As TGI has it (quirk 10), overload while streaming is an event under status 200: then None, and `open` finds it.
        """
        if self.config.is_strict_tgi:
            return None
        try:
            return self._admission.permit()
        except OverloadedError as error:
            self.metrics.refused(error)
            raise

    @contextlib.contextmanager
    def _admitted(self, wanted: GenerationInput, permit: Permit | None) -> Iterator[RequestMetrics]:
        with self.metrics.request() as metrics:
            self._validator.check_before_admission(wanted)
            with permit or self._admission.permit():
                yield metrics

    @contextlib.asynccontextmanager
    async def open(
        self, wanted: GenerationInput, permit: Permit | None = None
    ) -> AsyncIterator[tuple[Generation, AsyncIterator[GeneratedToken]]]:
        """Start generating, under `permit` or one of its own; the request lives as long as the block."""
        started = time.perf_counter()
        begin_generation(is_stream=wanted.is_stream)
        with self._admitted(wanted, permit) as metrics:
            request = await self._validator.validate(wanted, self.engine.limits)
            metrics.accepted(len(request.generation.prompt_token_ids), request.generation.max_new_tokens)
            timings = Timings(started, time.perf_counter())
            generation = Generation(request, wanted.parameters, self.tokenizer, timings, metrics)
            with self.engine.generate(request.generation) as events:
                async with contextlib.aclosing(generation.read(events)) as tokens:
                    try:
                        yield generation, tokens
                    except (asyncio.CancelledError, GeneratorExit):
                        generation.log_cancelled()
                        raise


def service_of(request: Request) -> GenerationService:
    """The service that `create_app` put there."""
    service: GenerationService = request.app.state.service
    return service
