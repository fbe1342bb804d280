"""Text to tokens and back: POST /tokenize, /chat_tokenize (`docs/wire.md`, 1.3) and /detokenize, which is ours."""

from __future__ import annotations

import msgspec
from fastapi import Request, Response

from server.answers.json import encoded_answer, encoder, json_answer
from server.errors import ValidationError
from server.operation import Area, Operation
from server.requests.native import DetokenizeRequest, GenerateRequest
from server.requests.openai import ChatRequest
from server.routes.chat import chat_input
from server.service import GenerationService, service_of
from server.text.spans import SimpleToken

area = Area()


class ChatTokenizeResponse(msgspec.Struct, frozen=True):
    tokenize_response: list[SimpleToken]
    templated_text: str


class DetokenizeResponse(msgspec.Struct, frozen=True):
    prompt: str


@area.serve(
    Operation(
        method="POST",
        path="/tokenize",
        summary="The tokens of a text",
        body=GenerateRequest,
        answers=(list[SimpleToken],),
        span="tokenize",
    )
)
async def tokenize(request: Request) -> Response:
    """The prompt's tokens. The parameters have no effect (`docs/compatibility.md`, row 29)."""
    service = service_of(request)
    body = await service.read_body(request, GenerateRequest)
    with service.permit_beside_tgi():
        return encoded_answer(await _split(service, body.inputs, add_special_tokens=True))


@area.serve(
    Operation(
        method="POST",
        path="/chat_tokenize",
        summary="The prompt that a chat becomes, and its tokens",
        body=ChatRequest,
        answers=(ChatTokenizeResponse,),
        is_open_to_tgi=True,
    )
)
async def chat_tokenize(request: Request) -> Response:
    service = service_of(request)
    body = await service.read_body(request, ChatRequest)
    with service.permit_beside_tgi():
        chat, _ = await chat_input(service, body)
        prompt = chat.inputs
        tokens = await _split(service, prompt, add_special_tokens=False)
    text = encoder.encode(prompt)
    return encoded_answer(b"".join([b'{"tokenize_response":', tokens, b',"templated_text":', text, b"}"]))


@area.serve(
    Operation(
        method="POST",
        path="/detokenize",
        summary="The text of tokens",
        body=DetokenizeRequest,
        answers=(DetokenizeResponse,),
    )
)
async def detokenize(request: Request) -> Response:
    """The text, in vLLM's shape. It has the special tokens, and U+FFFD for what is not a whole character."""
    service = service_of(request)
    body = await service.read_body(request, DetokenizeRequest)
    with service.permit_beside_tgi():
        return json_answer(DetokenizeResponse(await service.tokenizer.decode_all(body.tokens)))


async def _split(service: GenerationService, text: str, *, add_special_tokens: bool) -> bytes:
    try:
        return await service.tokenizer.split(text, add_special_tokens=add_special_tokens)
    except Exception as error:  # the library raises plain Exception
        raise ValidationError(f"tokenizer error {error}", logged="tokenizer error") from None
