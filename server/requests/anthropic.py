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
    return chat_request(_conversation(request))


def answered_chat(request: AnthropicRequest) -> ChatRequest:
    """The chat that is asked for. Raises ValidationError."""
    return chat_request(
        _conversation(request)
        | {
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "stop": request.stop_sequences or None,
            "stream": request.stream,
        }
    )


def _conversation(request: CountTokensRequest) -> Json:
    messages: list[Json] = []
    if request.system:
        messages.append({"role": "system", "content": _content(request.system)})
    for message in request.messages:
        messages += _assistant(message) if message.role == "assistant" else _from_user(message)
    choice = request.tool_choice
    if choice.type == "tool" and choice.name is None:
        raise ValidationError("tool_choice: missing field `name`", param="tool_choice.name", code=MISSING)
    named = {"type": "function", "function": {"name": choice.name}}
    if choice.type != "tool" and choice.type not in _CHOICES:
        raise unsupported("tool choices", choice.type)
    return {
        "messages": messages,
        "model": request.model,
        "tools": [_tool(tool) for tool in request.tools] or None,
        "tool_choice": named if choice.type == "tool" else _CHOICES[choice.type],
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
        "chat_template_kwargs": _template_variables(request),
    }


def _template_variables(request: CountTokensRequest) -> Json:
    """The effort is another thing than whether the model thinks: it is about all of the answer."""
    thinking = None if request.thinking is None else request.has_thoughts
    variables = {"enable_thinking": thinking, "reasoning_effort": request.output_config.effort}
    return {name: value for name, value in variables.items() if value is not None}


def _assistant(message: AnthropicMessage) -> list[Json]:
    """The assistant's words, thoughts and calls, which are one message of a chat."""
    if isinstance(message.content, str):
        return [{"role": "assistant", "content": message.content}]
    words, thoughts, calls = [], "", []
    for block in message.content:
        match block.get("type"):
            case "thinking":
                thoughts += str(block.get("thinking") or "")
            case "redacted_thinking":
                pass
            case "tool_use":
                function = {"name": block.get("name"), "arguments": json.dumps(block.get("input") or {})}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case _:
                words.append(_part(block))
    shown: Json = {"role": "assistant", "content": words or None}
    if thoughts:
        shown["reasoning_content"] = thoughts
    return [shown | {"tool_calls": calls} if calls else shown]


def _from_user(message: AnthropicMessage) -> list[Json]:
    """Results of tools, each a message of its own, and then the words."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results = [block for block in message.content if block.get("type") == "tool_result"]
    words = [_part(block) for block in message.content if block.get("type") != "tool_result"]
    messages: list[Json] = [
        {"role": "tool", "tool_call_id": result.get("tool_use_id"), "content": _content(result.get("content") or "")}
        for result in results
    ]
    return [*messages, {"role": message.role, "content": words}] if words or not results else messages


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
