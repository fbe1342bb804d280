"""The routes of cloud platforms: POST /invocations for SageMaker, /vertex for Vertex AI (`docs/wire.md`, 1.7, 1.8)."""

from __future__ import annotations

import dataclasses

import msgspec
from fastapi import Request, Response

from server.answers.json import json_answer
from server.edge.disconnect import cancel_if_gone
from server.errors import ErrorBody, FailedInstanceError, NoInstanceError, OpenAIErrorBody
from server.generation import best_of, collect
from server.operation import Area, Operation
from server.requests.cloud import SagemakerRequest, VertexRequest, vertex_parameters
from server.requests.native import CompatGenerateRequest, VertexInstance
from server.requests.openai import ChatRequest
from server.requests.validation import GenerationInput
from server.routes.chat import ChatCompletion, ChatCompletionChunk, answer_chat, chat_input
from server.routes.completions import CompletionChunk, CompletionFinal, answer_completions
from server.routes.generate import GenerateResponse, StreamResponse, answer_compat
from server.service import GenerationService, service_of

area = Area()


class VertexResponse(msgspec.Struct, frozen=True):
    predictions: list[str]


@area.serve(
    Operation(
        method="POST",
        path="/invocations",
        summary="For SageMaker: what POST /, chat or completions answer, as the body's shape says",
        body=SagemakerRequest,
        answers=(list[GenerateResponse], ChatCompletion, CompletionFinal),
        events=(StreamResponse, ChatCompletionChunk, CompletionChunk, CompletionFinal),
        late_errors=(ErrorBody, OpenAIErrorBody),
        is_generating=True,
        has_headers=True,
        span="sagemaker_compatibility",
    )
)
async def invocations(request: Request) -> Response:
    body = (await service_of(request).read_body(request, SagemakerRequest)).root
    if isinstance(body, CompatGenerateRequest):
        return await answer_compat(request, body)
    if isinstance(body, ChatRequest):
        return await answer_chat(request, body)
    return await answer_completions(request, body)


@area.serve(
    Operation(
        method="POST",
        path="/vertex",
        summary="For Vertex AI: texts for several prompts or chats",
        body=VertexRequest,
        answers=(VertexResponse,),
        is_generating=True,
        span="vertex_compatibility",
    )
)
async def vertex(request: Request) -> Response:
    """The texts of all instances, which run side by side; nothing is streamed."""
    service = service_of(request)
    body = await service.read_body(request, VertexRequest)
    if not body.instances:
        raise NoInstanceError
    service.refuse_if_full(len(body.instances))
    inputs = [await _input(service, instance) for instance in body.instances]
    return json_answer(VertexResponse(await cancel_if_gone(request, _predictions(service, inputs))))


async def _predictions(service: GenerationService, inputs: list[GenerationInput]) -> list[str]:
    try:
        async with service.open(*inputs) as streams:
            answers = await collect(streams)
    except Exception as error:
        if service.config.is_strict_tgi:
            raise FailedInstanceError from error
        raise
    predictions, start = [], 0
    for instance in inputs:
        best = best_of(answers[start : start + instance.num_sequences])
        predictions.append(instance.echo + best.text)
        start += instance.num_sequences
    return predictions


async def _input(service: GenerationService, instance: VertexInstance | ChatRequest) -> GenerationInput:
    if isinstance(instance, ChatRequest):
        chat, _ = await chat_input(service, instance)
        return dataclasses.replace(chat, is_stream=False, num_choices=1)
    parameters = vertex_parameters(instance, is_strict=service.config.is_strict_tgi)
    return GenerationInput(inputs=instance.inputs, parameters=parameters, is_stream=False)
