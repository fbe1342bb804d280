"""A conversation: what has been said, and with what the next answer is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from server.terminal.errors import ChatError

Message = dict[str, Any]

OWN_KEYS = frozenset("messages model stream stream_options tools".split())
"""Keys of a request that the chat fills itself."""
HEADINGS = {"system": "System prompt", "user": "You", "assistant": "Model", "tool": "Result"}


@dataclass
class Conversation:
    model: str
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    """Further keys of a request -> values, as OpenAI's routes and the server name them."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)

    @property
    def request(self) -> dict[str, Any]:
        """The body that asks for the next answer, but for streaming."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        tools = {"tools": self.tools} if self.tools else {}
        return {"model": self.model, "messages": [*system, *self.messages], **tools, **self.params}

    def take_back(self, num_messages: int) -> bool:
        """Drop what stands behind the last answer, and behind so many messages; whether nothing but those is left.

        A question without an answer, or a call without a result, would make the next request one that models are not
        trained on and templates refuse.
        """
        while len(self.messages) > num_messages and not _is_answer(self.messages[-1]):
            self.messages.pop()
        return len(self.messages) == num_messages

    def as_markdown(self) -> str:
        parts = [f"# {self.model}"]
        for message in self.request["messages"]:
            parts.append(f"## {HEADINGS[message['role']]}")
            parts += [message["content"]] if message["content"] else []
            parts += [f"```json\n{json.dumps(call['function'])}\n```" for call in message.get("tool_calls", [])]
        return "\n\n".join(parts) + "\n"


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant" and "tool_calls" not in message


def read_params(text: str) -> dict[str, Any]:
    """`NAME=VALUE ...` as a dictionary. Raises ChatError.

    A value is JSON, or a word that is a text without quotes.
    """
    params: dict[str, Any] = {}
    while text := text.strip():
        name, equals, text = text.partition("=")
        if not equals or not name.isidentifier():
            raise ChatError(f"{name.split()[0] if name.split() else '='} is not NAME=VALUE: write temperature=0.7")
        if name in OWN_KEYS:
            raise ChatError(f"{name} is filled by the chat: set another parameter")
        params[name], text = _first_value(text)
    return params


def _first_value(text: str) -> tuple[Any, str]:
    """The value at the beginning of `text`, and the rest."""
    try:
        value, end = json.JSONDecoder().raw_decode(text)
        if not text[end:].strip() or text[end].isspace():
            return value, text[end:]
    except ValueError:
        pass
    word, _, rest = text.partition(" ")
    return word, rest


def read_tools(text: str) -> list[dict[str, Any]]:
    """Tools as OpenAI's routes take them, from JSON: one or a list, whole or as bare functions. Raises ChatError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ChatError(
            f"the tools are no JSON ({error}): write a list of tools as OpenAI's routes take them"
        ) from None
    tools = [
        tool if not isinstance(tool, dict) or "function" in tool else {"type": "function", "function": tool}
        for tool in (value if isinstance(value, list) else [value])
    ]
    if not tools or not all(isinstance(tool, dict) and isinstance(name_of(tool), str) for tool in tools):
        raise ChatError('a tool has no name: write {"name": ..., "description": ..., "parameters": {...}}')
    return tools


def name_of(tool: dict[str, Any]) -> Any:
    """The name of a tool's function; None if there is none."""
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else None
