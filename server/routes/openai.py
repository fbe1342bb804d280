"""The OpenAI-shaped routes: POST /v1/chat/completions and GET /v1/models (reference 1.5, 1.9, 1.10, 3.5)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator

import msgspec
from fastapi import APIRouter, Request, Response

from engine.types import FinishReason
from server.admission import Permit
from server.answers import SYSTEM_FINGERPRINT, Usage, f32, json_answer
from server.body import read_body
from server.disconnect import cancel_if_gone
from server.errors import error_body
from server.generation import GeneratedToken, Generation, GenerationService, collect, service_of
from server.headers import plain_headers, stream_headers
from server.schemas import ChatRequest
from server.sse import DONE, EventStream, event, with_error_event
from server.validation import GenerationInput, chat_input, check_tools

router = APIRouter()

_FINISH_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop_sequence",  # not OpenAI's `stop` (quirk 6)
}


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: msgspec.Raw


class TokenLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: msgspec.Raw
    top_logprobs: list[TopLogprob]


class Logprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]


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
    id: str = ""
    created: int
    model: str
    system_fingerprint: str = SYSTEM_FINGERPRINT
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatMessage
    logprobs: Logprobs | None
    finish_reason: str | None


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "chat.completion.chunk"
    id: str = ""
    created: int
    model: str
    system_fingerprint: str = SYSTEM_FINGERPRINT
    choices: list[ChunkChoice]
    usage: Usage | None


class StreamError(msgspec.Struct, frozen=True):
    message: str
    http_status_code: int = 422
    """Whatever went wrong (quirk 10)."""


class StreamErrorBody(msgspec.Struct, frozen=True):
    error: StreamError


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Model]


@router.api_route("/v1/models", methods=["GET", "HEAD"])
async def models(request: Request) -> Response:
    model_id = service_of(request).config.model_id
    return json_answer(ModelList(data=[Model(id=model_id, owned_by=model_id)]))


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    service = service_of(request)
    body = await read_body(request, ChatRequest, service.config.payload_limit)
    check_tools(body)
    wanted = chat_input(body, service.chat_template.render(body.messages))
    if body.stream:
        permit = service.permit_for_stream()
        events = _with_done(with_error_event(_chunks(service, body, wanted, permit), _error_data))
        return EventStream(events, stream_headers(service.config.compute_type, wanted.inputs), permit)
    answer, headers = await cancel_if_gone(request, _complete(service, body, wanted))
    return json_answer(answer, headers)


def _model_name(service: GenerationService, body: ChatRequest) -> str:
    """The request's own name for the model is echoed, whatever it is (quirk 26)."""
    return service.config.model_id if body.model is None or body.model == "tgi" else body.model


def _usage(generation: Generation) -> Usage:
    num_prompt, num_generated = generation.num_prompt_tokens, generation.num_generated_tokens
    return Usage(num_prompt, num_generated, num_prompt + num_generated)


def _logprobs(body: ChatRequest, tokens: list[GeneratedToken]) -> Logprobs | None:
    if not body.logprobs:
        return None
    return Logprobs([TokenLogprob(token.text, f32(token.logprob), []) for token in tokens])


async def _complete(
    service: GenerationService, body: ChatRequest, wanted: GenerationInput
) -> tuple[ChatCompletion, dict[str, str]]:
    async with service.open(wanted) as (generation, tokens):
        answer = await collect(tokens)
    choice = ChatChoice(
        index=0,
        message=ChatMessage("assistant", answer.text),
        logprobs=_logprobs(body, answer.tokens),
        finish_reason=_FINISH_REASONS[answer.finish_reason],
    )
    completion = ChatCompletion(
        created=int(time.time()), model=_model_name(service, body), choices=[choice], usage=_usage(generation)
    )
    return completion, plain_headers(service.config.compute_type, wanted.inputs, generation)


async def _chunks(
    service: GenerationService, body: ChatRequest, wanted: GenerationInput, permit: Permit | None
) -> AsyncGenerator[bytes]:
    model = _model_name(service, body)
    async with service.open(wanted, permit) as (generation, tokens):
        async for token in tokens:
            yield event(_chunk(model, [_chunk_choice(body, token)], None))
    if body.stream_options.include_usage:
        yield event(_chunk(model, [], _usage(generation)))


def _chunk(model: str, choices: list[ChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
    return ChatCompletionChunk(created=int(time.time()), model=model, choices=choices, usage=usage)


def _chunk_choice(body: ChatRequest, token: GeneratedToken) -> ChunkChoice:
    return ChunkChoice(
        index=0,
        delta=ChatMessage("assistant", token.visible),
        logprobs=_logprobs(body, [token]),
        finish_reason=None if token.finish_reason is None else _FINISH_REASONS[token.finish_reason],
    )


def _error_data(error: Exception) -> StreamErrorBody:
    return StreamErrorBody(StreamError(error_body(error).error))


async def _with_done(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """OpenAI's end mark, also after an error."""
    async with contextlib.aclosing(events):
        async for item in events:
            yield item
    yield DONE
