"""POST /v1/chat/completions (reference 1.9, 1.10, 3.5)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager

import msgspec
from fastapi import APIRouter, Request, Response

from server.answers import Usage, json_answer
from server.body import read_body
from server.disconnect import cancel_if_gone
from server.generation import (
    Answer,
    GeneratedToken,
    GenerationService,
    Running,
    collect,
    interleave,
    service_of,
)
from server.headers import plain_headers, stream_headers
from server.openai_answers import Envelope, Logprobs, chat_logprobs, openai_stream, usage_of
from server.openai_parameters import native_parameters
from server.openai_schemas import ChatRequest
from server.sse import EventStream, event
from server.tools import check_tools
from server.validation import GenerationInput

router = APIRouter()


class ChatMessage(msgspec.Struct, frozen=True):
    """A whole message, or what a chunk adds to it."""

    role: str
    content: str


class ChatChoice(msgspec.Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: Logprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "chat.completion"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatMessage
    logprobs: Logprobs | None
    finish_reason: str | None


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "chat.completion.chunk"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    return await answer_chat(request, await read_body(request, ChatRequest, service_of(request).config))


async def answer_chat(request: Request, body: ChatRequest) -> Response:
    service = service_of(request)
    check_tools(body)
    prompt = service.chat_template.render(body.messages)
    wanted = chat_input(body, prompt, is_strict=service.config.is_strict_tgi)
    chat = _Chat(service, body, wanted)
    if not body.stream:
        answer, headers = await cancel_if_gone(request, chat.complete())
        return json_answer(answer, headers)
    opening, permit = await service.open_for_stream(wanted)
    events = openai_stream(chat.chunks(opening), service.config)
    return EventStream(events, stream_headers(service.config.compute_type, prompt), permit)


def chat_input(request: ChatRequest, prompt: str, *, is_strict: bool) -> GenerationInput:
    """What the engine is asked for (reference 3.5)."""
    own = {"top_n_tokens": request.top_logprobs, "grammar": request.response_format}
    parameters = native_parameters(request, is_strict=is_strict).model_copy(update=own)
    return GenerationInput(
        inputs=prompt,
        parameters=parameters,
        is_stream=request.stream,
        add_special_tokens=False,
        num_choices=1 if is_strict or request.n is None else request.n,
        is_openai=not is_strict,
    )


class _Chat:
    """One request and its answer."""

    def __init__(self, service: GenerationService, body: ChatRequest, wanted: GenerationInput) -> None:
        self._service = service
        self._body = body
        self._wanted = wanted
        self._envelope = Envelope(service.config, "chatcmpl")
        # The request's own name for the model is echoed, whatever it is (quirk 26).
        self._model = service.config.model_id if body.model is None or body.model == "tgi" else body.model

    async def complete(self) -> tuple[ChatCompletion, dict[str, str]]:
        async with self._service.open(self._wanted) as running:
            answers = await collect(running)
        completion = ChatCompletion(
            id=self._envelope.id,
            created=self._envelope.now,
            model=self._model,
            system_fingerprint=self._envelope.system_fingerprint,
            choices=[self._choice(index, answer) for index, answer in enumerate(answers)],
            usage=self._usage(running),
        )
        headers = plain_headers(self._service.config.compute_type, self._wanted.inputs, answers[0].generation)
        return completion, headers

    def _choice(self, index: int, answer: Answer) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage("assistant", answer.text),
            logprobs=self._logprobs(answer.tokens),
            finish_reason=self._envelope.finish_reasons[answer.finish_reason],
        )

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> Logprobs | None:
        return chat_logprobs(tokens) if self._body.logprobs else None

    @staticmethod
    def _usage(running: Sequence[Running]) -> Usage:
        generations = [one.generation for one in running]
        return usage_of(generations, generations[0].num_prompt_tokens)

    async def chunks(self, opening: AbstractAsyncContextManager[list[Running]]) -> AsyncGenerator[bytes]:
        """An event for each token of each choice, and one with the usage if it is wanted."""
        async with opening as running:
            async with contextlib.aclosing(interleave(running)) as tokens:
                async for index, token in tokens:
                    yield event(self._chunk([self._chunk_choice(index, token)], None))
            usage = self._usage(running)
        if self._body.stream_options.include_usage:
            yield event(self._chunk([], usage))

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._envelope.id,
            created=self._envelope.now,
            model=self._model,
            system_fingerprint=self._envelope.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    def _chunk_choice(self, index: int, token: GeneratedToken) -> ChunkChoice:
        reason = token.finish_reason
        return ChunkChoice(
            index=index,
            delta=ChatMessage("assistant", token.visible),
            logprobs=self._logprobs([token]),
            finish_reason=None if reason is None else self._envelope.finish_reasons[reason],
        )
