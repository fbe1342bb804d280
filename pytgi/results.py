"""Answers of the Python API and their parts, each with the whole JSON of the route it came by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a text. `body` is its event of /generate_stream, or its object in /generate."""

    id: int
    text: str
    logprob: float | None
    is_special: bool
    body: dict[str, Any] = field(repr=False)

    @classmethod
    def from_event(cls, body: dict[str, Any]) -> Token:
        token = body.get("token", body)
        return cls(token["id"], token["text"], token["logprob"], token["special"], body)


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A text. `body` is the answer of /generate."""

    text: str
    finish_reason: str
    """`length`, `eos_token` or `stop_sequence`."""
    num_tokens: int
    seed: int | None
    tokens: list[Token] = field(repr=False)
    body: dict[str, Any] = field(repr=False)

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> GenerateResult:
        details = body["details"]
        tokens = [Token.from_event(token) for token in details["tokens"]]
        finish_reason, num_tokens = details["finish_reason"], details["generated_tokens"]
        return cls(body["generated_text"], finish_reason, num_tokens, details["seed"], tokens, body)


@dataclass(frozen=True, slots=True)
class ChatResult:
    """The assistant's message. `body` is the answer of /v1/chat/completions, with all choices."""

    text: str
    """Empty where the model called tools instead."""
    reasoning: str
    """The thoughts of a reasoning model that are told apart from its answer; else empty."""
    tool_calls: list[dict[str, Any]]
    finish_reason: str
    num_prompt_tokens: int
    num_tokens: int
    body: dict[str, Any] = field(repr=False)

    @classmethod
    def from_body(cls, body: dict[str, Any]) -> ChatResult:
        choice, usage = body["choices"][0], body["usage"]
        message = choice["message"]
        return cls(
            message.get("content") or "",
            message.get("reasoning_content") or "",
            message.get("tool_calls") or [],
            choice["finish_reason"],
            usage["prompt_tokens"],
            usage["completion_tokens"],
            body,
        )


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """A part of an assistant's message. `body` is its event of /v1/chat/completions."""

    text: str
    reasoning: str
    tool_calls: list[dict[str, Any]]
    finish_reason: str | None
    """None until the last part."""
    body: dict[str, Any] = field(repr=False)

    @classmethod
    def from_event(cls, body: dict[str, Any]) -> ChatPiece:
        choice = (body.get("choices") or [{}])[0]  # the last event of stream_options has none
        delta = choice.get("delta") or {}
        text, reasoning = delta.get("content") or "", delta.get("reasoning_content") or ""
        return cls(text, reasoning, delta.get("tool_calls") or [], choice.get("finish_reason"), body)
