"""Chats whose answers have other shapes than those of /v1/chat/completions: one way from pieces to events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterable
from typing import Protocol

from fastapi import Request, Response

from engine.link.messages import FinishReason
from server.answers.headers import left_open_header, stream_headers
from server.answers.json import json_answer
from server.answers.sse import EventStream, Typed, named_event, with_error_event
from server.chat.messages import AnswerEnd
from server.edge.disconnect import cancel_if_gone
from server.requests.openai import ChatRequest
from server.routes.chat import chat_input
from server.service import AdmittedRequest, service_of
from server.text.pieces import Piece


class Writer(Protocol):
    """Builds an answer of its shape. The events refer to it while it grows: each is encoded before the next is made."""

    @property
    def whole(self) -> object:
        """The answer as a request without a stream gets it, after `finish`."""

    def begin(self, num_prompt_tokens: int) -> Iterable[Typed]:
        """The first events."""

    def push(self, piece: Piece) -> Iterable[Typed]:
        """The events of the next piece."""

    def finish(self, end: AnswerEnd) -> Iterable[Typed]:
        """The last events."""

    def fail(self, error: Exception) -> Typed:
        """The last event of an answer that fails while it is streamed."""


async def answer_as(request: Request, chat: ChatRequest, writer: Writer) -> Response:
    """The answer to `chat` as `writer` shapes it. Raises what /v1/chat/completions does."""
    service = service_of(request)
    generation_input, _ = await chat_input(service, chat)
    if not chat.stream:
        opening = service.open(generation_input)
        await cancel_if_gone(request, _drain(_events(opening, writer)))
        return json_answer(writer.whole, left_open_header(opening.left_open))
    opening = await service.open_validated(generation_input)
    encoded = _encoded(_events(opening, writer))
    events = with_error_event(encoded, lambda error: named_event(writer.fail(error)))
    headers = stream_headers(service.config.compute_type, generation_input.inputs, opening.left_open)
    return EventStream(events, headers, opening.close)


async def _events(opening: AdmittedRequest, writer: Writer) -> AsyncGenerator[Typed]:
    async with opening as [stream]:
        for event in writer.begin(stream.generation.num_prompt_tokens):
            yield event
        async for token in stream.tokens:
            for piece in token.pieces:
                for event in writer.push(piece):
                    yield event
        end = AnswerEnd(
            num_tokens=stream.generation.num_generated_tokens,
            num_cached_tokens=stream.generation.num_cached_tokens,
            num_thought_tokens=stream.generation.num_thought_tokens,
            num_calls=token.num_calls,
            is_cut=token.finish_reason is FinishReason.LENGTH,
            stop=stream.generation.stop,
        )
    for event in writer.finish(end):
        yield event


async def _encoded(events: AsyncGenerator[Typed]) -> AsyncGenerator[bytes]:
    async with contextlib.aclosing(events):
        async for item in events:
            yield named_event(item)


async def _drain(events: AsyncGenerator[Typed]) -> None:
    async with contextlib.aclosing(events):
        async for _ in events:
            pass
