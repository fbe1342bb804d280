"""POST /v1/responses: OpenAI's newer shape of a chat (`docs/other-apis.md`)."""

from __future__ import annotations

import time
import uuid

from fastapi import Request, Response

from server.answers.json import encoder
from server.answers.openai import model_name
from server.chat.responses import ResponseEvent, ResponseObject, ResponseWriter
from server.operation import Area, Operation
from server.requests.responses import ResponsesRequest, chat_of
from server.requests.wording import RESPONSES_WORDING
from server.routes.chat_shapes import answer_as
from server.service import service_of

area = Area()

MAX_ECHOED_BYTES = 1 << 16
"""Bytes of the request's fields that its response tells again. A stream tells them three times."""


@area.serve(
    Operation(
        method="POST",
        path="/v1/responses",
        summary="The next items of a conversation",
        body=ResponsesRequest,
        answers=(ResponseObject,),
        events=(ResponseEvent,),
        is_generating=True,
        span="responses",
    )
)
async def responses(request: Request) -> Response:
    service = service_of(request)
    service.refuse_if_full(1)
    with RESPONSES_WORDING.speaking():
        response, chat = await service.read_body_into(
            request,
            ResponsesRequest,
            lambda body: (_begun(body, model_name(body.model, service.config)), chat_of(body)),
        )
        return await answer_as(request, chat, ResponseWriter(response))


def _begun(body: ResponsesRequest, model: str) -> ResponseObject:
    """The response before its first token, which tells the request's fields again unless they are long."""
    text_format = body.text.format
    response = ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=model,
        parallel_tool_calls=body.parallel_tool_calls,
        temperature=body.temperature,
        text={
            "format": {"type": "text"}
            if text_format is None
            else text_format.model_dump(by_alias=True, exclude_none=True)
        },
        tool_choice=body.tool_choice or "auto",
        tools=body.tools,
        top_p=body.top_p,
    )
    if len(encoder.encode(response)) > MAX_ECHOED_BYTES:
        response.instructions, response.metadata, response.tools = None, {}, []
        response.tool_choice, response.text = "auto", {"format": {"type": "text"}}
    return response
