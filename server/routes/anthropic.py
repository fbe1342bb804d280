"""POST /v1/messages and /v1/messages/count_tokens: chats in Anthropic's shape (`docs/other-apis.md`)."""

from __future__ import annotations

import msgspec
from fastapi import Request, Response

from server.answers.json import json_answer
from server.answers.openai import model_name
from server.chat.anthropic import AnthropicAnswer, AnthropicEvent, AnthropicWriter
from server.errors import AnthropicErrorBody
from server.operation import Area, Operation
from server.requests.anthropic import AnthropicRequest, CountTokensRequest, answered_chat, counted_chat
from server.requests.openai import ChatRequest
from server.requests.wording import ANTHROPIC_WORDING
from server.routes.chat import chat_input
from server.routes.chat_shapes import answer_as
from server.service import service_of

area = Area()


class TokenCount(msgspec.Struct, frozen=True):
    input_tokens: int


@area.serve(
    Operation(
        method="POST",
        path="/v1/messages",
        summary="The next message of a chat, in Anthropic's shape",
        body=AnthropicRequest,
        answers=(AnthropicAnswer,),
        events=(AnthropicEvent,),
        late_errors=(AnthropicErrorBody,),
        is_generating=True,
        span="messages",
    )
)
async def messages(request: Request) -> Response:
    service = service_of(request)
    service.refuse_if_full(1)

    def begin(body: AnthropicRequest) -> tuple[ChatRequest, AnthropicWriter]:
        model = model_name(body.model, service.config)
        return answered_chat(body), AnthropicWriter(model, has_thoughts=body.has_thoughts)

    with ANTHROPIC_WORDING.speaking():
        chat, writer = await service.read_body_into(request, AnthropicRequest, begin)
        return await answer_as(request, chat, writer)


@area.serve(
    Operation(
        method="POST",
        path="/v1/messages/count_tokens",
        summary="The number of tokens that a chat becomes",
        body=CountTokensRequest,
        answers=(TokenCount,),
        span="count_tokens",
    )
)
async def count_tokens(request: Request) -> Response:
    service = service_of(request)
    with ANTHROPIC_WORDING.speaking():
        chat = await service.read_body_into(request, CountTokensRequest, counted_chat)
        with service.permit_beside_tgi():
            generation_input, _ = await chat_input(service, chat)
            token_ids = await service.tokenizer.encode(generation_input.inputs, add_special_tokens=False)
    return json_answer(TokenCount(len(token_ids)))
