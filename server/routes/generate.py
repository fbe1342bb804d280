"""TGI's native routes: POST /generate, /generate_stream and / (`docs/wire.md`, 1.1, 1.2 and 3.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence

import msgspec
from fastapi import Request, Response

from engine.link.messages import FinishReason
from server.answers.headers import plain_headers, stream_headers
from server.answers.json import JsonF32, Token, encoded_answer, encoded_items, encoder, f32, token_answer, token_answers
from server.answers.sse import EventStream, event, with_error_event
from server.edge.disconnect import cancel_if_gone
from server.errors import ErrorBody, error_body
from server.generation import Completion, Generation, best_of, collect
from server.operation import Area, Operation
from server.requests.native import CompatGenerateRequest, GenerateRequest, native_parameters
from server.requests.validation import GenerationInput
from server.service import AdmittedRequest, GenerationService, service_of

area = Area()


class PrefillToken(msgspec.Struct, frozen=True):
    id: int
    text: str
    logprob: JsonF32


class BestOfSequence(msgspec.Struct, frozen=True):
    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | msgspec.UnsetType = msgspec.UNSET


class Details(msgspec.Struct, frozen=True):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | msgspec.UnsetType = msgspec.UNSET
    top_tokens: list[list[Token]] | msgspec.UnsetType = msgspec.UNSET


class GenerateResponse(msgspec.Struct, frozen=True):
    generated_text: str
    details: Details | msgspec.UnsetType = msgspec.UNSET


class StreamDetails(msgspec.Struct, frozen=True):
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    token: Token
    top_tokens: list[Token] | msgspec.UnsetType = msgspec.UNSET
    generated_text: str | None
    details: StreamDetails | None


@area.serve(
    Operation(
        method="POST",
        path="/",
        summary="Text for a prompt, in an array of one or as events",
        body=CompatGenerateRequest,
        answers=(list[GenerateResponse],),
        events=(StreamResponse,),
        late_errors=(ErrorBody,),
        is_generating=True,
        has_headers=True,
        span="compat_generate",
    )
)
async def compat_generate(request: Request) -> Response:
    """The route that `text_generation.Client` and `InferenceClient.text_generation` call."""
    return await answer_compat(request, await service_of(request).read_body(request, CompatGenerateRequest))


@area.serve(
    Operation(
        method="POST",
        path="/generate",
        summary="Text for a prompt",
        body=GenerateRequest,
        answers=(GenerateResponse,),
        is_generating=True,
        has_headers=True,
        span="generate",
    )
)
async def generate(request: Request) -> Response:
    service = service_of(request)
    body = await service.read_body(request, GenerateRequest)
    answer, headers = await cancel_if_gone(request, _generate(service, _input(body, is_stream=False)))
    return encoded_answer(answer, headers)


@area.serve(
    Operation(
        method="POST",
        path="/generate_stream",
        summary="Text for a prompt, an event per token",
        body=GenerateRequest,
        events=(StreamResponse,),
        late_errors=(ErrorBody,),
        is_generating=True,
        has_headers=True,
        span="generate_stream",
    )
)
async def generate_stream(request: Request) -> Response:
    service = service_of(request)
    body = await service.read_body(request, GenerateRequest)
    return _stream(service, _input(body, is_stream=True))


async def answer_compat(request: Request, body: CompatGenerateRequest) -> Response:
    service = service_of(request)
    generation = _echoing(_input(body, is_stream=body.stream))
    if body.stream:
        return _stream(service, generation)
    answer, headers = await cancel_if_gone(request, _generate(service, generation))
    return encoded_answer(b"[" + answer + b"]", headers)


def _input(body: GenerateRequest, *, is_stream: bool) -> GenerationInput:
    return GenerationInput(inputs=body.inputs, parameters=native_parameters(body), is_stream=is_stream)


def _echoing(request: GenerationInput) -> GenerationInput:
    """POST / echoes the prompt unless told otherwise, as TGI does where no pipeline tag is known."""
    parameters = request.parameters
    if parameters.return_full_text is not None:
        return request
    return dataclasses.replace(request, parameters=dataclasses.replace(parameters, return_full_text=True))


async def _generate(service: GenerationService, request: GenerationInput) -> tuple[bytes, dict[str, str]]:
    opening = service.open(request)
    async with opening as streams:
        answers = await collect(streams)
    best = best_of(answers)
    headers = plain_headers(service.config.compute_type, request.inputs, best.generation, opening.left_open)
    return await service.written(answers, lambda: encoder.encode(_response(request, answers, best))), headers


def _response(request: GenerationInput, answers: Sequence[Completion], best: Completion) -> GenerateResponse:
    prompt = request.echo
    details: Details | msgspec.UnsetType = msgspec.UNSET
    if request.parameters.details or request.parameters.decoder_input_details:
        others = encoded_items(_other_sequence(prompt, answer) for answer in answers if answer is not best)
        details = Details(
            finish_reason=best.finish_reason,
            generated_tokens=len(best.tokens),
            seed=best.generation.seed,
            prefill=_prefill(best),
            tokens=token_answers(best.tokens),
            best_of_sequences=others or msgspec.UNSET,
            top_tokens=_top_tokens(best),
        )
    return GenerateResponse(prompt + best.text, details)


def _other_sequence(prompt: str, answer: Completion) -> BestOfSequence:
    return BestOfSequence(
        generated_text=prompt + answer.text,
        finish_reason=answer.finish_reason,
        generated_tokens=len(answer.tokens),
        seed=answer.generation.seed,
        prefill=_prefill(answer),
        tokens=token_answers(answer.tokens),
        top_tokens=_top_tokens(answer),
    )


def _prefill(answer: Completion) -> list[PrefillToken]:
    return [PrefillToken(token.id, token.text, f32(token.logprob)) for token in answer.generation.prefill]


def _top_tokens(answer: Completion) -> list[list[Token]] | msgspec.UnsetType:
    top_tokens = [token_answers(token.top_tokens) for token in answer.tokens]
    return top_tokens if any(top_tokens) else msgspec.UNSET


def _stream(service: GenerationService, request: GenerationInput) -> EventStream:
    headers = stream_headers(service.config.compute_type, request.inputs)
    opening = service.open_with_permit(request)
    events = with_error_event(_events(opening, request), lambda error: event(error_body(error)))
    return EventStream(events, headers, opening.close)


async def _events(opening: AdmittedRequest, request: GenerationInput) -> AsyncGenerator[bytes]:
    text_parts = [request.echo]
    async with opening as [stream]:
        generation = stream.generation
        async for token in stream.tokens:
            text_parts.append(token.visible)
            text, details = None, None
            if token.finish_reason is not None:
                text = "".join(text_parts)
                details = _stream_details(generation, token.finish_reason) if request.parameters.details else None
            yield event(
                StreamResponse(
                    index=generation.num_generated_tokens,
                    token=token_answer(token),
                    top_tokens=token_answers(token.top_tokens) or msgspec.UNSET,
                    generated_text=text,
                    details=details,
                )
            )


def _stream_details(generation: Generation, reason: FinishReason) -> StreamDetails:
    return StreamDetails(reason, generation.num_generated_tokens, generation.seed, generation.num_prompt_tokens)
