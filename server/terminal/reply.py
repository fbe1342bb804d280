"""One answer as it comes: events -> text, thoughts, calls, and how fast they came."""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from server.bench.wires import WIRES
from server.terminal.conversation import Message
from server.terminal.errors import ChatError

THOUGHT_KEYS = ("reasoning_content", "reasoning")
"""Where servers put a thought."""


class Kind(enum.Enum):
    TEXT = enum.auto()
    THOUGHT = enum.auto()


@dataclass
class Call:
    """A tool that the model calls; `arguments` is JSON, if the model wrote it right."""

    id: str
    name: str = ""
    arguments: str = ""


@dataclass
class Reply:
    """What has come of an answer so far. Times are those of `time.monotonic`."""

    sent_at: float = field(default_factory=time.monotonic)
    token_times: list[float] = field(default_factory=list)
    """When each event with tokens came."""
    text: str = ""
    calls: dict[int, Call] = field(default_factory=dict)
    finish_reason: str | None = None
    num_tokens: int | None = None
    """As the server says; None if it does not."""

    def take(self, event: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
        """What the event adds, as far as it is to be shown now.

        Raises ChatError for an error, and for what is none of OpenAI's events.
        """
        try:
            read = WIRES["chat"].event(event)
            if read.error is not None:
                raise ChatError(f"the server ended the answer: {read.error}: try again")
            if read.has_token:
                self.token_times.append(time.monotonic())
            if read.usage is not None:
                self.num_tokens = int(read.usage[1] or 0)
            for choice in event.get("choices") or []:
                if not choice.get("index"):
                    self.finish_reason = choice.get("finish_reason") or self.finish_reason
                    yield from self._take_delta(choice.get("delta") or {})
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ChatError(f"an event is none of OpenAI's ({error!r}): is this address that of a chat?") from error

    def _take_delta(self, delta: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
        thought = next((str(delta[key]) for key in THOUGHT_KEYS if delta.get(key)), "")
        if thought:
            yield Kind.THOUGHT, thought
        if text := str(delta.get("content") or ""):
            self.text += text
            yield Kind.TEXT, text
        for part in delta.get("tool_calls") or []:
            index = int(part.get("index") or 0)
            call = self.calls.setdefault(index, Call(f"call_{index}"))
            function = part.get("function") or {}
            call.id = str(part.get("id") or call.id)
            call.name += str(function.get("name") or "")
            arguments = function.get("arguments") or ""
            call.arguments += arguments if isinstance(arguments, str) else json.dumps(arguments)

    @property
    def message(self) -> Message:
        """The answer as a message of the next request; thoughts are no part of it."""
        message: Message = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls.values()
            ]
        return message

    @property
    def speed(self) -> str:
        """`12 tokens, 31.5 per second, the first after 0.21 s`; the speed is that of the tokens after the first."""
        if not self.token_times:
            return "no tokens"
        first, last = self.token_times[0], self.token_times[-1]
        number = self.num_tokens or len(self.token_times)
        parts = [f"{number} {'token' if number == 1 else 'tokens'}" + ("" if self.num_tokens else " or more")]
        if number > 1 and last > first:
            parts.append(f"{(number - 1) / (last - first):.1f} per second")
        return ", ".join([*parts, f"the first after {first - self.sent_at:.2f} s"])
