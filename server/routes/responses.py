"""POST /v1/responses: OpenAI's newer shape of a chat (`docs/other-apis.md`)."""

from __future__ import annotations

import time
import uuid

from fastapi import Request, Response

from server.chat.responses import ResponseEvent, ResponseObject, ResponseWriter
from server.operation import Area, Operation
from server.requests.responses import ResponsesRequest, chat_of
from server.routes.faces import answer_as
from server.service import service_of

area = Area()


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
    body, chat = await service.read_body_into(request, ResponsesRequest, lambda body: (body, chat_of(body)))
    return await answer_as(request, chat, ResponseWriter(_begun(body, service.config.model_names[0])))


def _begun(body: ResponsesRequest, model_id: str) -> ResponseObject:
    """The response before its first token, which tells the request's fields again."""
    text_format = body.text.format
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model or model_id,
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
