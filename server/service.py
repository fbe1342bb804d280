"""What the routes share, and the one way to the engine: admit, validate, submit.

Every route opens its streams here; a plain answer is those streams collected. Leaving their block, for whatever reason,
aborts the sequences and gives the permit back.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TypeVar

import pydantic
from fastapi import Request

from server.chat.renderer import ChatRenderer
from server.chat.thoughts import OFF, default_thinking
from server.client import EngineClient
from server.config import ServerConfig
from server.edge.admission import Admission, Permit
from server.edge.intake import Intake, IntakeLimits
from server.errors import OverloadedError
from server.generation import Completion, Generation, Stream, Timings
from server.requests.body import BodyReader, MeasuredBody, require_json
from server.requests.grammar import GrammarCompiler
from server.requests.sampling_defaults import read_sampling_defaults
from server.requests.validation import GenerationInput, ValidatedRequest, Validator
from server.telemetry.metrics import Metrics, RequestMetrics
from server.telemetry.spans import begin_generation
from server.text.tokenizer import TextTokenizer

MAX_INLINE_TOKENS = 256
"""Tokens of an answer that the event loop writes itself, in a few milliseconds."""

M = TypeVar("M", bound=pydantic.BaseModel)
T = TypeVar("T")


class GenerationService:
    """The engine, the tokenizer and the limits, for all routes."""

    def __init__(self, engine: EngineClient, config: ServerConfig, tokenizer: TextTokenizer) -> None:
        self.engine = engine
        self.config = config
        self.tokenizer = tokenizer
        self.chats = ChatRenderer(
            tokenizer.chat_format, is_strict=config.is_strict_tgi, is_apart=not config.is_rendering_here
        )
        self.default_thinking = default_thinking(OFF if config.is_strict_tgi else config.reasoning_parser, tokenizer)
        self.started_at = int(time.time())
        self.admission = Admission(config.max_concurrent_requests)
        self.intake = Intake(IntakeLimits.for_bodies_of(config.payload_limit), is_strict=config.is_strict_tgi)
        self.bodies = BodyReader(is_strict=config.is_strict_tgi)
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self.grammars = GrammarCompiler()
        self.sampling_defaults = read_sampling_defaults(config)
        self.validator = Validator(config, tokenizer, self.grammars)
        self.metrics = Metrics(engine.limits, is_strict=config.is_strict_tgi)
        engine.observe_output = self.metrics.observe_output

    async def read_body(self, request: Request, model: type[M]) -> M:
        """The body as `model`. Raises BodyError, OverloadedError."""
        return await self.bodies.read(await self._receive(request), model)

    async def read_body_into(self, request: Request, model: type[M], convert: Callable[[M], T]) -> T:
        """The result of `convert` for the body as `model`.

        A large body is converted where it is read, on a thread: both take as long. Raises BodyError, OverloadedError,
        and what `convert` raises.
        """
        return await self.bodies.read_into(await self._receive(request), model, convert)

    async def _receive(self, request: Request) -> MeasuredBody:
        require_json(request.headers.get("content-type", ""))
        body = await self.bodies.measure(await self.intake.receive(request))
        self.intake.hold(request, body.memory - len(body.data))
        return body

    async def written(self, answers: Sequence[Completion], write: Callable[[], bytes]) -> bytes:
        """The body that `write` makes of `answers`."""
        return await self.encoded(
            sum(len(answer.tokens) + answer.generation.num_prompt_scores for answer in answers), write
        )

    async def encoded(self, num_scores: int, write: Callable[[], bytes]) -> bytes:
        """The bytes of so many logprobs, by `write`; on a thread if they are many, as those of 128 choices are."""
        if num_scores <= MAX_INLINE_TOKENS:
            return write()
        return await asyncio.get_running_loop().run_in_executor(self._writers, write)

    @contextlib.contextmanager
    def permit_beside_tgi(self) -> Iterator[None]:
        """A permit for the block of a request that does not generate; TGI asks for none. Raises OverloadedError."""
        permit = self.admission.permit(0 if self.config.is_strict_tgi else 1)
        try:
            yield
        finally:
            permit.release()

    def refuse_if_full(self, num_places: int) -> None:
        """Refuse chats that would find no permits before time goes to their templates. Raises OverloadedError.

        TGI renders first: under --strict-tgi this does nothing.
        """
        if self.config.is_strict_tgi:
            return
        with self.metrics.refusing(OverloadedError):
            self.admission.permit(num_places).release()

    def open(self, *inputs: GenerationInput) -> AdmittedRequest:
        """A request that is admitted and validated as its block begins."""
        return AdmittedRequest(self, inputs)

    def open_with_permit(self, request: GenerationInput) -> AdmittedRequest:
        """The request of a native stream, which holds its permit before the status line leaves. Raises OverloadedError.

        So overload is a plain 429, which clients and proxies understand; every other refusal is an event. Under
        --strict-tgi overload is an event as well, as in TGI (`docs/compatibility.md`, row 10).
        """
        opening = self.open(request)
        if not self.config.is_strict_tgi:
            with self.metrics.refusing(OverloadedError):
                opening.take_permit(1)
        return opening

    async def open_validated(self, *inputs: GenerationInput) -> AdmittedRequest:
        """The request of an OpenAI-shaped stream, which is valid before the status line leaves: a refusal is a status.

        Under --strict-tgi a refusal is an event of the stream, and nothing is done before that begins. Raises
        OverloadedError, ValidationError.
        """
        opening = self.open(*inputs)
        if not self.config.is_strict_tgi:
            await opening.validate()
        return opening

    def close(self) -> None:
        self.tokenizer.close()
        self.bodies.close()
        self._writers.shutdown(wait=False)
        self.grammars.close()
        self.chats.close()


class AdmittedRequest:
    """One request from its permit to its end, and the owner of that permit.

    Its block has a stream for each sequence. The request is admitted and validated as the block begins, unless that was
    done before. The block ends with `close`; whoever answers closes a request whose client left before the block began.
    """

    def __init__(self, service: GenerationService, inputs: Sequence[GenerationInput]) -> None:
        self._service = service
        self._inputs = inputs
        self._block: AbstractAsyncContextManager[list[Stream]] | None = None
        """The block of the streams, once the request is valid."""
        self._permit: Permit | None = None
        self.left_open: Sequence[str] = ()
        """Places of its schemas that the model is not held to, once it is valid."""

    def take_permit(self, num_places: int) -> None:
        """Raises OverloadedError."""
        self._permit = self._service.admission.permit(num_places)

    def close(self) -> None:
        """Give the permit back, once."""
        if self._permit is not None:
            self._permit.release()

    async def validate(self) -> AbstractAsyncContextManager[list[Stream]]:
        """Take a permit, unless there is one, and make the block. Raises OverloadedError, ValidationError."""
        started = time.perf_counter()
        begin_generation(is_stream=self._inputs[0].is_stream)
        validator, metrics = self._service.validator, self._service.metrics.entered()
        with metrics.failing():
            for request in self._inputs:
                validator.check_before_admission(request)
            if self._permit is None:
                num_sequences = sum(request.num_sequences for request in self._inputs)
                if self._inputs[0].is_openai:
                    validator.check_number(num_sequences)
                self.take_permit(num_sequences)
            requests: list[ValidatedRequest] = []
            try:
                for request in self._inputs:
                    requests += await validator.validate(request, self._service.engine.limits)
            except BaseException:
                self.close()
                raise
        self.left_open = requests[0].left_open
        for validated in requests:
            generation = validated.generation
            metrics.accepted(len(generation.prompt_token_ids), generation.max_new_tokens)
        self._block = self._generate(requests, metrics, started)
        return self._block

    @contextlib.asynccontextmanager
    async def _generate(
        self, requests: Sequence[ValidatedRequest], metrics: RequestMetrics, started: float
    ) -> AsyncIterator[list[Stream]]:
        """Submit all sequences; they live as long as the block."""
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(metrics.failing())
            stack.callback(self.close)
            submitted = time.perf_counter()
            streams = []
            for request in requests:
                generation = Generation(request, self._service.tokenizer, Timings(started, submitted), metrics)
                events = stack.enter_context(self._service.engine.generate(request.generation))
                tokens = await stack.enter_async_context(contextlib.aclosing(generation.read(events)))
                streams.append(Stream(generation, tokens))
            try:
                yield streams
            except (asyncio.CancelledError, GeneratorExit):
                for stream in streams:
                    stream.generation.log_cancelled()
                raise

    async def __aenter__(self) -> list[Stream]:
        block = self._block or await self.validate()
        return await block.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._block is not None
        return await self._block.__aexit__(kind, error, traceback)


def service_of(request: Request) -> GenerationService:
    """The service that `create_app` made."""
    service: GenerationService = request.app.state.service
    return service
