"""Bodies of /v1/messages, Anthropic's route, which become chats (`docs/other-apis.md`)."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pydantic

from server.errors import ValidationError
from server.requests.chat_shapes import Json, TextOrItems, chat_request, unsupported
from server.requests.messages import OpenAIModel
from server.requests.openai import MAX_MESSAGES, ChatRequest, OpenAIBody
from server.requests.serde import F32, I32, MISSING, U32, ListOf, max_items
from server.requests.tool_choice import MAX_TOOLS

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""Anthropic's word for a choice of tools -> OpenAI's."""
_OWN_TOOLS = (None, "custom")
"""Types of a tool that the client runs itself."""


class AnthropicMessage(OpenAIModel):
    role: str
    content: TextOrItems


class ToolChoice(OpenAIModel):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool = False


class OutputConfig(OpenAIModel):
    effort: str | None = None


class CountTokensRequest(OpenAIBody):
    """Body of /v1/messages/count_tokens: a chat that is not answered."""

    messages: Annotated[ListOf[AnthropicMessage], max_items(MAX_MESSAGES)]
    model: str | None = None
    system: TextOrItems | None = None
    tools: Annotated[ListOf[Json], max_items(MAX_TOOLS)] = pydantic.Field(default_factory=list)
    tool_choice: ToolChoice = ToolChoice(type="auto")
    thinking: Json | None = None
    """Whether the model is to think, for templates that ask, and whether thoughts are part of the answer.

    None: the model thinks as its template has it, and its thoughts are left out.
    """

    output_config: OutputConfig = OutputConfig()

    @property
    def has_thoughts(self) -> bool:
        return self.thinking is not None and self.thinking.get("type") != "disabled"


class AnthropicRequest(CountTokensRequest):
    """Body of /v1/messages."""

    max_tokens: U32
    temperature: F32 | None = None
    top_k: I32 | None = None
    top_p: F32 | None = None
    stop_sequences: ListOf[str] = pydantic.Field(default_factory=list)
    stream: bool = False


def counted_chat(request: CountTokensRequest) -> ChatRequest:
    """The chat whose tokens are counted. Raises ValidationError."""
    return chat_request(*_conversation(request))


def answered_chat(request: AnthropicRequest) -> ChatRequest:
    """The chat that is asked for. Raises ValidationError."""
    body, places = _conversation(request)
    return chat_request(
        body
        | {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "stop": request.stop_sequences or None,
            "stream": request.stream,
        },
        places,
    )


def _conversation(request: CountTokensRequest) -> tuple[Json, dict[str, str]]:
    """A chat's body, and where its messages come from (`chat_request`)."""
    messages: list[Json] = []
    places: dict[str, str] = {}
    if request.system:
        messages.append({"role": "system", "content": _content(request.system)})
        places["messages[0].content"] = "system"
    for index, message in enumerate(request.messages):
        for read, keys in _assistant(message) if message.role == "assistant" else _from_user(message):
            for place, key in ({"": ""} | keys).items():
                places[f"messages[{len(messages)}]{place}"] = f"messages[{index}]{key}"
            messages.append(read)
    choice = request.tool_choice
    if choice.type == "tool" and choice.name is None:
        raise ValidationError("tool_choice: missing field `name`", param="tool_choice.name", code=MISSING)
    named = {"type": "function", "function": {"name": choice.name}}
    if choice.type != "tool" and choice.type not in _CHOICES:
        raise unsupported("tool choices", choice.type)
    body: Json = {
        "messages": messages,
        "model": request.model,
        "tools": [_tool(tool) for tool in request.tools] or None,
        "tool_choice": named if choice.type == "tool" else _CHOICES[choice.type],
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
        "chat_template_kwargs": _template_variables(request),
    }
    return body, places


def _template_variables(request: CountTokensRequest) -> Json:
    """The effort is another thing than whether the model thinks: it is about all of the answer."""
    thinking = None if request.thinking is None else request.has_thoughts
    variables = {"enable_thinking": thinking, "reasoning_effort": request.output_config.effort}
    return {name: value for name, value in variables.items() if value is not None}


_Read = tuple[Json, dict[str, str]]
"""A message, and places in it that come from other keys."""


def _assistant(message: AnthropicMessage) -> list[_Read]:
    """The assistant's words, thoughts and calls, which are one message of a chat."""
    if isinstance(message.content, str):
        return [({"role": "assistant", "content": message.content}, {})]
    words: list[Json] = []
    thoughts = ""
    calls: list[Json] = []
    keys: dict[str, str] = {}
    for index, block in enumerate(message.content):
        here = f".content[{index}]"
        match block.get("type"):
            case "thinking":
                thoughts += str(block.get("thinking") or "")
            case "redacted_thinking":
                pass
            case "tool_use":
                keys |= {f".tool_calls[{len(calls)}]{place}": here for place in (".function", "")}
                function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case _:
                keys[f".content[{len(words)}]"] = here
                words.append(_part(block))
    shown: Json = {"role": "assistant", "content": words or None}
    if thoughts:
        shown["reasoning_content"] = thoughts
    return [(shown | {"tool_calls": calls} if calls else shown, keys)]


def _from_user(message: AnthropicMessage) -> list[_Read]:
    """Results of tools, each a message of its own, and then the words."""
    if isinstance(message.content, str):
        return [({"role": message.role, "content": message.content}, {})]
    results: list[_Read] = []
    words: list[Json] = []
    keys: dict[str, str] = {}
    for index, block in enumerate(message.content):
        here = f".content[{index}]"
        if block.get("type") == "tool_result":
            content = _content(block.get("content") or "")
            result = {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
            results.append((result, {"": here, ".tool_call_id": f"{here}.tool_use_id"}))
        else:
            keys[f".content[{len(words)}]"] = here
            words.append(_part(block))
    said: _Read = ({"role": message.role, "content": words}, keys)
    return [*results, said] if words or not results else results


def _content(content: Any) -> Any:
    return [_part(part) for part in content] if isinstance(content, list) else content


def _part(block: Any) -> Json:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        return {"type": "text", "text": block.get("text")}
    raise unsupported("content blocks", kind)


def _tool(tool: Json) -> Json:
    if tool.get("type") not in _OWN_TOOLS:
        raise unsupported("tools", tool.get("type"))
    function = {key: tool[key] for key in ("name", "description") if key in tool}
    return {"type": "function", "function": function | {"parameters": tool.get("input_schema")}}
