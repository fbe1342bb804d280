"""Bodies of /v1/responses, which become chats (`docs/other-apis.md`).

Nothing is stored: each request brings the whole conversation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pydantic

from server.errors import ValidationError
from server.requests.chat_shapes import Json, TextOrItems, chat_request, unsupported
from server.requests.messages import OpenAIModel
from server.requests.openai import MAX_MESSAGES, ChatRequest, OpenAIBody
from server.requests.serde import F32, U32, ListOf, max_items
from server.requests.tool_choice import MAX_TOOLS

LOGPROBS = "message.output_text.logprobs"
"""What `include` has to name for logprobs."""
_STORED = ("previous_response_id", "conversation", "prompt")
"""Fields that name something which a server has kept."""


class TextFormat(OpenAIModel):
    type: str
    name: str | None = None
    json_schema: Any = pydantic.Field(None, alias="schema")
    strict: bool | None = None


class ReasoningOptions(OpenAIModel):
    effort: str | None = None


class TextOptions(OpenAIModel):
    format: TextFormat | None = None


class ResponsesRequest(OpenAIBody):
    """Body of /v1/responses."""

    input: Annotated[TextOrItems, max_items(MAX_MESSAGES)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: U32 | None = None
    temperature: F32 | None = None
    top_p: F32 | None = None
    tools: Annotated[ListOf[Json], max_items(MAX_TOOLS)] = pydantic.Field(default_factory=list)
    tool_choice: Annotated[str | Json | None, pydantic.SkipValidation] = None  # the chat's reading says what is wrong
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    top_logprobs: U32 | None = None
    include: ListOf[str] = pydantic.Field(default_factory=list)
    stream: bool = False
    background: bool = False
    metadata: Json | None = None
    previous_response_id: str | None = None
    conversation: Annotated[str | Json | None, pydantic.SkipValidation] = None
    prompt: Json | None = None


def chat_of(request: ResponsesRequest) -> ChatRequest:
    """The chat that is asked for. Raises ValidationError."""
    stored = next((name for name in _STORED if getattr(request, name) is not None), None)
    if stored is not None:
        raise ValidationError(
            f"`{stored}` is not supported: responses are not stored, send all of the input", param=stored
        )
    if request.background:
        raise ValidationError(
            "`background` is not supported: ask for a stream or wait for the answer", param="background"
        )
    if request.top_logprobs or LOGPROBS in request.include:
        raise ValidationError(
            "logprobs are not supported here: ask /v1/chat/completions for them",
            param="top_logprobs" if request.top_logprobs else "include",
        )
    messages, places = _messages(request)
    body: Json = {
        "messages": messages,
        "model": request.model,
        "max_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "tools": [_tool(tool) for tool in request.tools] or None,
        "tool_choice": _tool_choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "reasoning_effort": request.reasoning.effort,
        "response_format": _response_format(request.text.format),
        "stream": request.stream,
    }
    return chat_request(body, places)


def _messages(request: ResponsesRequest) -> tuple[list[Json], dict[str, str]]:
    """The messages, and the items that they come from (`chat_request`)."""
    messages: list[Json] = []
    places: dict[str, str] = {}
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}], places
    for index, item in enumerate(request.input):
        kind = item.get("type", "message")
        read = _ITEMS.get(kind) if isinstance(kind, str) else None
        try:
            if read is None:
                raise unsupported("input items", kind)
            read(item, messages)
        except ValidationError as error:
            error.param = f"input[{index}]"
            raise
        call = len(messages[-1].get("tool_calls", ())) - 1 if messages else -1
        for place, key in _PLACES[kind].items():
            places[f"messages[{len(messages) - 1}]{place.format(call=call)}"] = f"input[{index}]{key}"
    return messages, places


def _add_message(item: Json, messages: list[Json]) -> None:
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part) for part in content]
    role = item.get("role")
    if role == "assistant":
        _assistant(messages, "content", "tool_calls")["content"] = content
    else:
        messages.append({"role": role, "content": content})


def _add_call(item: Json, messages: list[Json]) -> None:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    _assistant(messages).setdefault("tool_calls", []).append(call)


def _add_output(item: Json, messages: list[Json]) -> None:
    output = item.get("output")
    if isinstance(output, list):
        output = [_part(part) for part in output]
    messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})


def _add_reasoning(item: Json, messages: list[Json]) -> None:
    """A thought belongs to the assistant's message that follows. What was summarised or encrypted is left out."""
    parts = item.get("content")
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    thought = "".join(text for text in texts if isinstance(text, str))
    if thought:
        messages.append({"role": "assistant", "reasoning_content": thought})


_ITEMS: dict[str, Callable[[Json, list[Json]], None]] = {
    "message": _add_message,
    "function_call": _add_call,
    "function_call_output": _add_output,
    "reasoning": _add_reasoning,
}
"""Type of an input item -> what adds it to the messages."""

_PLACES: dict[str, dict[str, str]] = {
    "message": {"": ""},
    "function_call": {".tool_calls[{call}].function": "", ".tool_calls[{call}].id": ".call_id"},
    "function_call_output": {"": "", ".content": ".output", ".tool_call_id": ".call_id"},
    "reasoning": {},
}
"""Type of an input item -> places in the message that it has become or is a part of, and the keys of these places."""


def _assistant(messages: list[Json], *taken: str) -> Json:
    """The assistant's message that an item belongs to: the last one, unless it has any of `taken`.

    A thought, words and calls are items of their own here, and one message to a chat template.
    """
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or any(key in last for key in taken):
        messages.append({"role": "assistant"})
    return messages[-1]


def _part(part: Any) -> Json:
    kind = part.get("type") if isinstance(part, dict) else None
    match kind:
        case "input_text" | "output_text" | "text":
            return {"type": "text", "text": part.get("text")}
        case "refusal":
            return {"type": "text", "text": part.get("refusal")}
    raise unsupported("content parts", kind)


def _tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        raise unsupported("tools", tool.get("type"))
    function = {key: tool[key] for key in ("name", "description", "parameters", "strict") if key in tool}
    return {"type": "function", "function": function}


def _tool_choice(choice: str | Json | None) -> str | Json | None:
    if isinstance(choice, dict) and choice.get("type") not in ("function", "allowed_tools"):
        raise unsupported("tool choices", choice.get("type"))
    return choice


def _response_format(text_format: TextFormat | None) -> Json | None:
    if text_format is None or text_format.type != "json_schema":
        return None if text_format is None else {"type": text_format.type}
    return {
        "type": "json_schema",
        "json_schema": {"name": text_format.name, "schema": text_format.json_schema, "strict": text_format.strict},
    }
