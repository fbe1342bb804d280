"""POST /v1/completions (`docs/wire.md`, 1.11 and 3.5), with OpenAI's parameters that TGI ignores."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import AsyncGenerator, Sequence

import msgspec
from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from server.answers.headers import plain_headers_of_prompts, stream_headers
from server.answers.json import JsonF32, Scored, Usage, encoded_answer, encoded_items, encoder, f32
from server.answers.openai import (
    FINISH_REASONS_TGI_STREAM,
    Envelope,
    NameOf,
    PromptLogprobs,
    model_name,
    num_generated_tokens,
    openai_stream,
    prompt_logprobs,
    usage_of,
)
from server.answers.sse import EventStream, event
from server.edge.disconnect import cancel_if_gone
from server.errors import BatchSizeError, OpenAIErrorBody, SuffixError, ValidationError
from server.generation import (
    Completion,
    GeneratedToken,
    Generation,
    ScoredToken,
    Stream,
    collect,
    interleave,
)
from server.operation import Area, Operation
from server.requests.dialects import MAX_CHOICES
from server.requests.infill import ENDS, infill_prompt
from server.requests.openai import CompletionRequest, openai_parameters
from server.requests.rows import Dialect
from server.requests.validation import GenerationInput, refuse_if
from server.requests.wording import COMPLETIONS_WORDING, TGI_WORDING
from server.service import AdmittedRequest, GenerationService, service_of

area = Area()


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """OpenAI's own shape of this route: four lists, an entry per token in each."""

    tokens: list[str]
    token_logprobs: list[JsonF32]
    top_logprobs: list[dict[str, JsonF32] | None] | None
    """For each token the likeliest ones and the token itself; null for the first one of a prompt."""
    text_offset: list[int]
    """Index, in code points, at which each token begins in the choice's text."""


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    """vLLM's, on request."""


class CompletionFinal(msgspec.Struct, frozen=True, kw_only=True):
    """A plain answer, and the last event of each sequence of a stream."""

    object: str = "text_completion"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None


class CompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "text_completion"
    id: str
    created: int
    choices: list[CompletionChoice]
    model: str
    system_fingerprint: str


@area.serve(
    Operation(
        method="POST",
        path="/v1/completions",
        summary="Texts for one or several prompts",
        body=CompletionRequest,
        answers=(CompletionFinal,),
        events=(CompletionChunk, CompletionFinal),
        late_errors=(OpenAIErrorBody,),
        is_generating=True,
        has_headers=True,
        span="completions",
    )
)
async def completions(request: Request) -> Response:
    body = await service_of(request).read_body(request, CompletionRequest)
    return await answer_completions(request, body)


async def answer_completions(request: Request, body: CompletionRequest) -> Response:
    service = service_of(request)
    with service.metrics.refusing(SuffixError, BatchSizeError, ValidationError):
        completion = await _Completion.of(service, body)
    if not body.stream:
        answer, headers = await cancel_if_gone(request, completion.complete())
        return encoded_answer(answer, headers)
    opening = await service.open_validated(*completion.prompts)
    headers = stream_headers(service.config.compute_type, completion.text_of_prompts, opening.left_open)
    return EventStream(openai_stream(completion.chunks(opening), service.config), headers, opening.close)


class _Completion:
    """One request and its answer: for each prompt `best_of` sequences, of which `n` are choices."""

    def __init__(self, service: GenerationService, body: CompletionRequest) -> None:
        """The prompts are still to come. Raises SuffixError, BatchSizeError, ValidationError."""
        config = service.config
        self._service = service
        self._body = body
        self._is_strict = config.is_strict_tgi
        self._num_choices = 1 if body.n is None else body.n
        self._num_sequences = self._num_choices if body.best_of is None else body.best_of
        if body.suffix is not None and self._is_strict:
            raise SuffixError
        if len(body.prompt) > config.max_prompts:
            raise BatchSizeError(config.max_prompts)
        self._check(config.max_best_of)
        self.prompts: list[GenerationInput] = []
        self._envelope = Envelope(config, "cmpl")
        self._model = model_name(None if self._is_strict else body.model, config)

    @classmethod
    async def of(cls, service: GenerationService, body: CompletionRequest) -> _Completion:
        """Raises SuffixError, BatchSizeError, ValidationError."""
        completion = cls(service, body)
        completion.prompts = [await completion._input(prompt) for prompt in body.prompt]
        return completion

    @property
    def text_of_prompts(self) -> str:
        return "".join(prompt.inputs for prompt in self.prompts)

    def _check(self, max_best_of: int) -> None:
        n, best_of = self._num_choices, self._num_sequences
        is_choosing, is_stream = best_of > n, self._body.stream
        refuse_if(n == 0, f"`n` must be > 0 and <= {MAX_CHOICES}. Given: {n}", param="n")
        refuse_if(best_of < n, f"`best_of` must be >= `n`. Given: {best_of} and {n}", param="best_of")
        refuse_if(
            is_choosing and best_of > max_best_of,
            f"`best_of` must be > 0 and <= {max_best_of}. Given: {best_of}",
            param="best_of",
        )
        refuse_if(
            bool(self._body.suffix) and self._body.echo, "`echo` is not supported beside a `suffix`", param="echo"
        )
        refuse_if(is_choosing and is_stream, "`best_of` > `n` is not supported when streaming tokens", param="best_of")

    @property
    def _has_prompt_logprobs(self) -> bool:
        return self._body.echo and self._body.logprobs is not None

    @property
    def _is_scoring(self) -> bool:
        """The prompt is all that is asked for. The engine makes a token besides, which nobody gets to see."""
        return self._body.echo and self._body.max_tokens == 0

    async def _input(self, prompt: str | list[int]) -> GenerationInput:
        parameters = openai_parameters(self._body, self._service.sampling_defaults, is_strict=self._is_strict)
        if self._is_scoring:
            parameters = dataclasses.replace(parameters, max_new_tokens=1)
        if self._body.suffix:
            prompt = await infill_prompt(self._service.tokenizer, prompt, self._body.suffix)
            ends = self._service.tokenizer.token_ids(*ENDS)
            parameters = dataclasses.replace(parameters, stop_token_ids=[*parameters.stop_token_ids, *sorted(ends)])
        return GenerationInput(
            inputs=prompt if isinstance(prompt, str) else await self._service.tokenizer.decode_all(prompt),
            token_ids=None if isinstance(prompt, str) else prompt,
            parameters=dataclasses.replace(parameters, decoder_input_details=self._has_prompt_logprobs),
            is_stream=self._body.stream,
            num_choices=self._num_sequences,
            num_prompt_top_tokens=(self._body.logprobs or 0) if self._body.echo else 0,
            dialect=Dialect.NATIVE if self._is_strict else Dialect.COMPLETIONS,
            wording=TGI_WORDING if self._is_strict else COMPLETIONS_WORDING.with_format(self._body.format_key),
        )

    async def complete(self) -> tuple[bytes, dict[str, str]]:
        opening = self._service.open(*self.prompts)
        async with opening as streams:
            answers = await collect(streams)
        by_prompt = [
            answers[start : start + self._num_sequences] for start in range(0, len(answers), self._num_sequences)
        ]
        headers = plain_headers_of_prompts(
            self._service.config.compute_type,
            self.text_of_prompts,
            [[answer.generation for answer in candidates] for candidates in by_prompt],
            opening.left_open,
        )
        return await self._service.written(answers, lambda: self._written(by_prompt, streams)), headers

    def _written(self, by_prompt: Sequence[Sequence[Completion]], streams: Sequence[Stream]) -> bytes:
        chosen = [(index, answer) for index, answers in enumerate(by_prompt) for answer in self._chosen(answers)]
        choices = (self._choice(number, index, answer) for number, (index, answer) in enumerate(chosen))
        return encoder.encode(self._final(encoded_items(choices), self._usage(streams)))

    def _chosen(self, candidates: Sequence[Completion]) -> Sequence[Completion]:
        if self._num_choices == self._num_sequences:
            return candidates
        best_first = sorted(candidates, key=lambda answer: answer.mean_logprob, reverse=True)
        return best_first[: self._num_choices]

    def _choice(self, index: int, prompt_index: int, answer: Completion) -> CompletionChoice:
        echo, text = self._echo(prompt_index), "" if self._is_scoring else answer.text
        logprobs = None
        if self._body.logprobs is not None:
            table = self._table()
            if self._body.echo:
                table.add_prompt(answer.generation)
            table.num_characters = len(echo)  # tokens that were put before the prompt have counted, too
            for generated in () if self._is_scoring else answer.tokens:
                table.add(generated)
            logprobs = table.take()
        num_top = self._body.prompt_logprobs
        scores = UNSET if num_top is None else prompt_logprobs(answer.generation, num_top)
        return CompletionChoice(index, echo + text, logprobs, self._finish_reason(answer.tokens[-1]), scores)

    def _table(self) -> _LogprobTable:
        return _LogprobTable(self._service.tokenizer.name, self._body.logprobs or 0)

    def _echo(self, prompt_index: int) -> str:
        return self.prompts[prompt_index].inputs if self._body.echo else ""

    def _usage(self, streams: Sequence[Stream]) -> Usage:
        prompts = [stream.generation for stream in streams[:: self._num_sequences]]
        return usage_of(self._service.config, prompts, 0 if self._is_scoring else num_generated_tokens(streams))

    async def chunks(self, opening: AdmittedRequest) -> AsyncGenerator[bytes]:
        """A chunk for each token; with `echo` one more before them, which waits for the prompt's logprobs."""
        async with opening as streams:
            tables = [self._table() for _ in streams]
            unscored = set(range(len(streams))) if self._has_prompt_logprobs else set()
            for index in range(len(streams)):
                if index not in unscored and self._echo(index // self._num_choices):
                    yield self._echo_event(index, tables[index])
            async with contextlib.aclosing(interleave(streams)) as tokens:
                async for index, token in tokens:
                    if index in unscored:
                        unscored.discard(index)
                        generation = streams[index].generation
                        write = functools.partial(self._echo_event, index, tables[index], generation)
                        yield await self._service.encoded(generation.num_prompt_scores, write)
                    choice = self._chunk_choice(index, token, tables[index])
                    yield event(self._chunk(choice, None if token.finish_reason is None else streams[index]))
            usage = self._usage(streams)
        if self._body.stream_options.include_usage:
            yield event(self._final([], usage))

    def _echo_event(self, index: int, table: _LogprobTable, scored: Generation | None = None) -> bytes:
        """The chunk of a prompt, with its logprobs if `scored` has them."""
        echo, logprobs = self._echo(index // self._num_choices), None
        if scored is not None:
            table.add_prompt(scored)
            logprobs = table.take()
        table.num_characters = len(echo)  # tokens that were put before the prompt have counted, too
        return event(self._chunk(CompletionChoice(index, echo, logprobs, self._no_finish_reason)))

    def _chunk_choice(self, index: int, token: GeneratedToken, table: _LogprobTable) -> CompletionChoice:
        logprobs = None
        if self._body.logprobs is not None and not self._is_scoring:
            table.add(token)
            logprobs = table.take()
        text = token.text if self._is_strict else token.visible  # `docs/compatibility.md`, row 7
        if self._is_scoring:
            text = ""
        return CompletionChoice(index, text, logprobs, self._finish_reason(token))

    def _chunk(self, choice: CompletionChoice, finished: Stream | None = None) -> CompletionFinal | CompletionChunk:
        """A chunk. TGI's last one of a sequence has its usage; OpenAI has the usage of all at the end, on request."""
        if self._body.stream_options.include_usage:
            return self._final([choice], None)
        if finished is not None:
            num_generated = 0 if self._is_scoring else num_generated_tokens([finished])
            return self._final([choice], usage_of(self._service.config, [finished.generation], num_generated))
        return CompletionChunk(
            id=self._envelope.id,
            created=self._envelope.created,
            choices=[choice],
            model=self._model,
            system_fingerprint=self._envelope.system_fingerprint,
        )

    def _final(self, choices: list[CompletionChoice], usage: Usage | None) -> CompletionFinal:
        return CompletionFinal(
            id=self._envelope.id,
            created=self._envelope.created,
            model=self._model,
            system_fingerprint=self._envelope.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    @property
    def _no_finish_reason(self) -> str | None:
        return "" if self._is_strict else None  # `docs/compatibility.md`, row 7

    def _finish_reason(self, token: GeneratedToken) -> str | None:
        if token.finish_reason is None:
            return self._no_finish_reason
        is_tgi_stream = self._is_strict and self._body.stream
        spellings = FINISH_REASONS_TGI_STREAM if is_tgi_stream else self._envelope.finish_reasons
        return spellings[token.finish_reason]


class _LogprobTable:
    """Collects tokens for `CompletionLogprobs`; `num_characters` is the length of the text before the next one."""

    def __init__(self, name: NameOf, num_top_tokens: int) -> None:
        self.num_characters = 0
        self._name = name
        self._num_top_tokens = num_top_tokens
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[msgspec.Raw] = []
        self._top_logprobs: list[dict[str, msgspec.Raw] | None] = []
        self._offsets: list[int] = []

    def add(self, token: GeneratedToken) -> None:
        self._append(token, self._tops(token, token.top_tokens))
        self.num_characters += len(token.visible)

    def add_prompt(self, generation: Generation) -> None:
        """Add the prompt's tokens. The first has neither a logprob nor others at its place."""
        tokens = zip(generation.prefill, generation.prefill_tops, generation.prompt_texts, strict=True)
        for place, (token, candidates, text) in enumerate(tokens):
            self._append(token, self._tops(token, candidates) if place else None)
            self.num_characters += len(text)

    def _tops(self, token: Scored, candidates: Sequence[ScoredToken]) -> dict[str, msgspec.Raw]:
        """The likeliest tokens at a token's place and the token itself."""
        best = reversed(candidates[: self._num_top_tokens])
        top = {self._text(candidate.id): f32(candidate.logprob) for candidate in best}
        top.setdefault(self._text(token.id), f32(token.logprob))
        return top

    def _text(self, token_id: int) -> str:
        """The token's name in OpenAI's words: parts of characters are marked, as keys must not collide."""
        name = self._name(token_id)
        return f"bytes:{name.text}" if name.is_part else name.text

    def _append(self, token: Scored, top: dict[str, msgspec.Raw] | None) -> None:
        self._tokens.append(self._text(token.id))
        self._logprobs.append(f32(token.logprob))
        self._top_logprobs.append(top)
        self._offsets.append(self.num_characters)

    def take(self) -> CompletionLogprobs:
        """The lists of the tokens since the last call."""
        top_logprobs = self._top_logprobs if self._num_top_tokens else None
        logprobs = CompletionLogprobs(self._tokens, self._logprobs, top_logprobs, self._offsets)
        self._clear()
        return logprobs
