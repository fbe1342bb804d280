"""POST /v1/chat/completions (`docs/wire.md`, 1.9, 1.10 and 3.5)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

import msgspec
from fastapi import Request, Response
from msgspec import UNSET, UnsetType

from engine.link.messages import FinishReason
from server.answers.headers import plain_headers, stream_headers
from server.answers.json import Usage, encoded_answer, encoded_items, encoder
from server.answers.openai import (
    Envelope,
    Logprobs,
    PromptLogprobs,
    chat_logprobs,
    model_name,
    num_generated_tokens,
    openai_stream,
    prompt_logprobs,
    tgi_logprobs,
    usage_of,
)
from server.answers.sse import EventStream, event
from server.chat.messages import (
    ChatDelta,
    ChatMessage,
    FunctionCall,
    FunctionDelta,
    ToolCallAnswer,
    ToolCallDelta,
    delta_of,
    message_of,
)
from server.chat.thoughts import grammar_preface, thinking_after
from server.chat.tools import NO_TOOL, ToolUse, ending, use_tools
from server.edge.disconnect import cancel_if_gone
from server.errors import OpenAIErrorBody, TemplateError, ToolError, ValidationError
from server.generation import Completion, GeneratedToken, Stream, collect, interleave
from server.operation import Area, Operation
from server.requests.messages import Message, ToolCallBody
from server.requests.openai import ChatRequest, openai_parameters
from server.requests.rows import Dialect
from server.requests.validation import GenerationInput
from server.requests.wording import CHAT_WORDINGS, TGI_WORDING
from server.service import AdmittedRequest, GenerationService, service_of
from server.text.pieces import Arguments, CallStart, Piece, Thought

area = Area()


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
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    """vLLM's, on request."""


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
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


@area.serve(
    Operation(
        method="POST",
        path="/v1/chat/completions",
        summary="The next message of a chat",
        body=ChatRequest,
        answers=(ChatCompletion,),
        events=(ChatCompletionChunk,),
        late_errors=(OpenAIErrorBody,),
        is_generating=True,
        has_headers=True,
        span="chat_completions",
    )
)
async def chat_completions(request: Request) -> Response:
    return await answer_chat(request, await service_of(request).read_body(request, ChatRequest))


async def answer_chat(request: Request, body: ChatRequest) -> Response:
    service = service_of(request)
    service.refuse_if_full(1)
    generation_input, use = await chat_input(service, body)
    is_tgi_call = service.config.is_strict_tgi and use.grammar is not None
    chat = (_TgiToolChat if is_tgi_call else _Chat)(service, body, generation_input, use)
    if not body.stream:
        answer, headers = await cancel_if_gone(request, chat.complete())
        return encoded_answer(answer, headers)
    opening = await service.open_validated(generation_input)
    events = openai_stream(chat.chunks(opening), service.config)
    headers = stream_headers(service.config.compute_type, generation_input.inputs, opening.left_open)
    return EventStream(events, headers, opening.close)


async def chat_input(service: GenerationService, request: ChatRequest) -> tuple[GenerationInput, ToolUse]:
    """The prompt and parameters of a chat, and how it uses tools. Raises TemplateError, ToolError, ValidationError."""
    is_strict = service.config.is_strict_tgi
    wording = TGI_WORDING if is_strict else CHAT_WORDINGS[request.length_key].with_format(request.format_key)
    with service.metrics.refusing(TemplateError, ValidationError), wording.speaking():
        if not request.messages and not is_strict:
            raise ValidationError("there are no messages", param="messages")
        use = use_tools(request, service.tokenizer, is_strict=is_strict)
        end = ending(request)
        prompt = await service.chats.render(request.messages, use.offered, end, request.template_variables)
    use = dataclasses.replace(use, thinking=thinking_after(prompt, request.messages, end, service.default_thinking))
    generation_input = GenerationInput(
        inputs=prompt,
        parameters=openai_parameters(request, service.sampling_defaults, is_strict=is_strict),
        is_stream=request.stream,
        add_special_tokens=False,
        num_choices=1 if is_strict or request.n is None else request.n,
        dialect=Dialect.NATIVE if is_strict else Dialect.CHAT,
        wording=wording,
        tool_grammar=use.grammar,
        grammar_preface=grammar_preface(use.thinking, service.tokenizer),
        reader=use.reader,
        # Some tokenizers have the marks as special tokens, which no text shows otherwise.
        shown_ids=service.tokenizer.token_ids(*use.marks),
    )
    return generation_input, use


class _Chat:
    """One request and its answer."""

    def __init__(
        self, service: GenerationService, body: ChatRequest, generation_input: GenerationInput, use: ToolUse
    ) -> None:
        self._service = service
        self._body = body
        self._input = generation_input
        self._use = use
        self._begun: set[int] = set()
        """Indices of the choices that a chunk was sent of."""
        self._envelope = Envelope(service.config, "chatcmpl")
        self._model = model_name(body.model, service.config)

    async def complete(self) -> tuple[bytes, dict[str, str]]:
        opening = self._service.open(self._input)
        async with opening as streams:
            answers = await collect(streams)
        content = await self._service.written(answers, lambda: self._written(answers, streams))
        return content, self._headers(answers, opening)

    def _written(self, answers: Sequence[Completion], streams: Sequence[Stream]) -> bytes:
        choices = (
            self._choice(index, answer, message_of(self._shown(answer.pieces))) for index, answer in enumerate(answers)
        )
        return encoder.encode(self._completion(encoded_items(choices), streams))

    def _shown(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces that the client wants to see."""
        return [piece for piece in pieces if self._body.include_reasoning or not isinstance(piece, Thought)]

    def _completion(self, choices: list[ChatChoice], streams: Sequence[Stream]) -> ChatCompletion:
        num_top = self._input.parameters.prompt_logprobs
        return ChatCompletion(
            id=self._envelope.id,
            created=self._envelope.now,
            model=self._model,
            system_fingerprint=self._envelope.system_fingerprint,
            choices=choices,
            usage=self._usage(streams),
            prompt_logprobs=UNSET if num_top is None else prompt_logprobs(streams[0].generation, num_top),
        )

    def _headers(self, answers: Sequence[Completion], opening: AdmittedRequest) -> dict[str, str]:
        compute_type, prompt = self._service.config.compute_type, self._input.inputs
        return plain_headers(compute_type, prompt, answers[0].generation, opening.left_open)

    def _choice(self, index: int, answer: Completion, message: ChatMessage) -> ChatChoice:
        logprobs = self._logprobs(answer.tokens)
        finish_reason = self._finish_reason(answer.tokens[-1].num_calls, answer.finish_reason)
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=finish_reason)

    def _finish_reason(self, num_calls: int, reason: FinishReason) -> str:
        """OpenAI's reason. If a call is cut off it is `length`, for the client must not run such a call."""
        if num_calls and reason is not FinishReason.LENGTH:
            return "stop" if self._use.is_named else "tool_calls"
        return self._envelope.finish_reasons[reason]

    def _logprobs(self, tokens: Sequence[GeneratedToken]) -> Logprobs | None:
        if not self._body.logprobs:
            return None
        if self._service.config.is_strict_tgi:
            return tgi_logprobs(tokens)
        return chat_logprobs(tokens, self._service.tokenizer.name, self._body.top_logprobs or 0)

    def _usage(self, streams: Sequence[Stream]) -> Usage:
        num_thought = sum(stream.generation.num_thought_tokens for stream in streams)
        return usage_of(
            self._service.config,
            [streams[0].generation],
            num_generated_tokens(streams),
            num_thought if self._use.thinking.is_apart else None,
        )

    async def chunks(self, opening: AdmittedRequest) -> AsyncGenerator[bytes]:
        """The events of all choices, and one with the usage if the request includes it."""
        async with opening as streams:
            async with contextlib.aclosing(interleave(streams)) as tokens:
                async for index, token in tokens:
                    for choice in self._chunk_choices(index, token):
                        yield event(self._chunk([choice], None))
            usage = self._usage(streams)
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

    def _role(self, index: int) -> str | UnsetType:
        """TGI has the role in every chunk. OpenAI's client would join the roles to one text: there it comes once."""
        if index in self._begun and not self._service.config.is_strict_tgi:
            return UNSET
        self._begun.add(index)
        return "assistant"

    def _chunk_choices(self, index: int, token: GeneratedToken) -> list[ChunkChoice]:
        """The chunks of a token: one, if the answer is words; else any number, and one for the finish reason."""
        reason = token.finish_reason
        if self._use.marks:
            deltas = [delta_of(piece, self._role(index)) for piece in self._shown(token.pieces)]
            if reason is not None or (self._body.logprobs and not deltas):
                deltas.append(ChatDelta(self._role(index), UNSET if token.num_calls else ""))
        else:
            deltas = [ChatDelta(self._role(index), token.visible)]
        finish_reason = None if reason is None else self._finish_reason(token.num_calls, reason)
        logprobs = self._logprobs([token])
        last = len(deltas) - 1
        return [
            ChunkChoice(
                index=index,
                delta=delta,
                logprobs=logprobs if place == 0 else None,
                finish_reason=finish_reason if place == last else None,
            )
            for place, delta in enumerate(deltas)
        ]


class _TgiToolChat(_Chat):
    """Tools as TGI has them: one call in JSON of TGI's own or, with `no_tool`, a second run in words."""

    async def complete(self) -> tuple[bytes, dict[str, str]]:
        opening = self._service.open(self._input)
        async with opening as streams:
            answers = await collect(streams)
        call = _read_tgi_call(answers[0].text)
        if call.name == NO_TOOL and self._use.has_no_tool:
            return await (await self._in_words()).complete()
        message = ChatMessage("assistant", tool_calls=[ToolCallAnswer(id="0", function=call)])
        choices = [self._choice(0, answers[0], message)]
        return encoder.encode(self._completion(choices, streams)), self._headers(answers, opening)

    def _finish_reason(self, num_calls: int, reason: FinishReason) -> str:
        return self._envelope.finish_reasons[reason]

    async def chunks(self, opening: AdmittedRequest) -> AsyncGenerator[bytes]:
        call_id = _next_call_id(self._body.messages)
        is_in_words = False
        async with opening as streams:
            async for token in streams[0].tokens:
                is_in_words = self._use.has_no_tool and CallStart(0, NO_TOOL) in token.pieces
                if is_in_words:
                    break
                for choice in self._tgi_choices(token, call_id):
                    yield event(self._chunk([choice], None))
            usage = self._usage(streams)
        if is_in_words:
            chat = await self._in_words()
            async with contextlib.aclosing(chat.chunks(self._service.open(chat._input))) as events:
                async for item in events:
                    yield item
        elif self._body.stream_options.include_usage:
            yield event(self._chunk([], usage))

    async def _in_words(self) -> _Chat:
        """The second run. Nothing of the first has a part in its answer (`docs/compatibility.md`, row 18)."""
        body = self._body.model_copy(update={"tools": None})
        return _Chat(self._service, body, *(await chat_input(self._service, body)))

    def _tgi_choices(self, token: GeneratedToken, call_id: str) -> list[ChunkChoice]:
        """A chunk with the name and the opening brace, one for each further part, one with the finish reason."""
        choices = []
        for piece in token.pieces:
            if isinstance(piece, CallStart):
                choices.append(self._tgi_choice(token, _tgi_delta(call_id, piece.name, "{")))
            elif isinstance(piece, Arguments):
                text = piece.text.removeprefix("{") if choices else piece.text
                if text:
                    choices.append(self._tgi_choice(token, _tgi_delta(call_id, None, text)))
        if token.finish_reason is not None:
            reason = self._envelope.finish_reasons[token.finish_reason]
            choices.append(self._tgi_choice(token, ChatDelta("assistant", ""), reason))
        return choices

    def _tgi_choice(self, token: GeneratedToken, delta: ChatDelta, finish_reason: str | None = None) -> ChunkChoice:
        return ChunkChoice(index=0, delta=delta, logprobs=self._logprobs([token]), finish_reason=finish_reason)


def _tgi_delta(call_id: str, name: str | None, arguments: str) -> ChatDelta:
    function = FunctionDelta(name=name, arguments=arguments)
    call = ToolCallDelta(index=0, id=call_id, type="function", function=function)
    return ChatDelta("assistant", tool_calls=[call])


def _read_tgi_call(text: str) -> FunctionCall:
    """The call that the model has written. Raises ToolError."""
    try:
        function = _decode_tgi(text).function
        name = function.pop("_name")
    except (msgspec.DecodeError, KeyError, RecursionError) as error:
        reason = "missing field `_name`" if isinstance(error, KeyError) else str(error)
        raise ToolError(f"Failed to parse generated text: {reason} {json.dumps(text, ensure_ascii=False)}") from None
    return FunctionCall(description=None, name=str(name), arguments=msgspec.json.encode(function).decode())


class _TgiCall(msgspec.Struct):
    function: dict[str, Any]


_decode_tgi = msgspec.json.Decoder(_TgiCall).decode


def _next_call_id(messages: Sequence[Message]) -> str:
    """One more than the largest id among the messages' calls; if one of those is no number, neither is this."""
    bodies = [message.body for message in messages if isinstance(message.body, ToolCallBody)]
    ids = [call.id or "" for body in bodies for call in body.tool_calls]
    if not all(id.isdecimal() and id.isascii() and len(id) < 20 for id in ids):
        return str(uuid.uuid4())
    return str(max(map(int, ids), default=-1) + 1)
