"""The assistant's messages: words and calls of functions, whole or in parts (`docs/wire.md`, 1.10, 3.5 and 3.6)."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
from msgspec import UNSET, UnsetType

from server.text.pieces import Arguments, CallStart, Content, Piece, Thought


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerEnd:
    """The end of an answer, whatever shape it is told in."""

    num_tokens: int
    num_cached_tokens: int
    """Tokens of the prompt that the prefix cache had."""
    num_thought_tokens: int
    num_calls: int
    is_cut: bool
    """The answer has reached its length, and the model had more to say."""
    stop: str | None
    """The stop string that has ended it."""


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    description: None | UnsetType = UNSET
    """TGI's messages have this key, with null."""
    name: str
    arguments: str
    """JSON text."""


class ToolCallAnswer(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str | None | UnsetType = UNSET
    tool_calls: list[ToolCallAnswer] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    """What the model thought first, as vLLM and SGLang name it."""


class FunctionDelta(msgspec.Struct, frozen=True, kw_only=True):
    name: str | None | UnsetType = UNSET
    arguments: str


class ToolCallDelta(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(msgspec.Struct, frozen=True):
    """What a chunk adds to the message."""

    role: str | UnsetType
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


def message_of(pieces: Iterable[Piece]) -> ChatMessage:
    """The message in OpenAI's shape. If there are calls, content without words is null."""
    content = thoughts = ""
    calls: list[tuple[str, list[str]]] = []
    for piece in pieces:
        match piece:
            case Content(text):
                content += text
            case Thought(text):
                thoughts += text
            case CallStart(_, name):
                calls.append((name, []))
            case Arguments(index, text):
                calls[index][1].append(text)
    answers = [
        ToolCallAnswer(id=_new_call_id(), function=FunctionCall(name=name, arguments="".join(arguments)))
        for name, arguments in calls
    ]
    return ChatMessage(
        "assistant", (content or None) if calls else content, answers if calls else UNSET, thoughts or UNSET
    )


def delta_of(piece: Piece, role: str | UnsetType) -> ChatDelta:
    """The delta of a piece. In OpenAI's order a call's id and name come first, then its arguments, part by part."""
    match piece:
        case Content(text):
            return ChatDelta(role, text)
        case Thought(text):
            return ChatDelta(role, reasoning_content=text)
        case CallStart(index, name):
            call = ToolCallDelta(
                index=index, id=_new_call_id(), type="function", function=FunctionDelta(name=name, arguments="")
            )
        case Arguments(index, text):
            call = ToolCallDelta(index=index, function=FunctionDelta(arguments=text))
    return ChatDelta(role, tool_calls=[call])


def _new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
