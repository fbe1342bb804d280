"""The routes of cloud platforms: POST /invocations for SageMaker, /vertex for Vertex AI (`docs/wire.md`, 1.7, 1.8)."""

from __future__ import annotations

import dataclasses

import msgspec
from fastapi import Request, Response

from server.answers.json import json_answer
from server.edge.disconnect import cancel_if_gone
from server.errors import ErrorBody, FailedInstanceError, NoInstanceError, OpenAIErrorBody
from server.generation import Completion, GenerationService, collect, service_of
from server.operation import Area, Operation
from server.requests.body import read_body
from server.requests.cloud import SagemakerRequest, VertexRequest
from server.requests.native import CompatGenerateRequest, GenerateParameters, VertexInstance
from server.requests.openai import ChatRequest
from server.requests.validation import GenerationInput
from server.routes.chat import ChatCompletion, ChatCompletionChunk, answer_chat, chat_input
from server.routes.completions import CompletionChunk, CompletionFinal, answer_completions
from server.routes.generate import GenerateResponse, StreamResponse, answer_compat

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
    body = (await read_body(request, SagemakerRequest, service_of(request).config)).root
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
    body = await read_body(request, VertexRequest, service.config)
    if not body.instances:
        raise NoInstanceError
    wanted = [_input(service, instance) for instance in body.instances]
    return json_answer(VertexResponse(await cancel_if_gone(request, _predictions(service, wanted))))


async def _predictions(service: GenerationService, wanted: list[GenerationInput]) -> list[str]:
    try:
        async with service.open(*wanted) as running:
            answers = await collect(running)
    except Exception as error:
        if service.config.is_strict_tgi:
            raise FailedInstanceError from error
        raise
    predictions, start = [], 0
    for one in wanted:
        predictions.append(_prediction(one, answers[start : start + one.num_sequences]))
        start += one.num_sequences
    return predictions


def _prediction(wanted: GenerationInput, answers: list[Completion]) -> str:
    best = max(answers, key=lambda answer: answer.mean_logprob)  # of equals the first
    return (wanted.inputs if wanted.parameters.return_full_text else "") + best.text


def _input(service: GenerationService, instance: VertexInstance | ChatRequest) -> GenerationInput:
    is_strict = service.config.is_strict_tgi
    if isinstance(instance, ChatRequest):
        wanted, _ = chat_input(service, instance)
        return dataclasses.replace(wanted, is_stream=False, num_choices=1)
    parameters = _parameters(instance.parameters or GenerateParameters(), is_strict=is_strict)
    return GenerationInput(inputs=instance.inputs, parameters=parameters, is_stream=False)


def _parameters(given: GenerateParameters, *, is_strict: bool) -> GenerateParameters:
    """TGI samples whatever is asked for, and looks at two parameters only; here all have their effect."""
    if is_strict:
        return GenerateParameters(do_sample=True, max_new_tokens=given.max_new_tokens, seed=given.seed)
    return given if "do_sample" in given.model_fields_set else given.model_copy(update={"do_sample": True})
