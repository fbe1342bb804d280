"""What a model writes in the shape of /v1/messages: blocks, and the events that build them (`docs/other-apis.md`)."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

import msgspec
from msgspec import UNSET, UnsetType

from server.chat.messages import AnswerEnd
from server.errors import AnthropicErrorBody, anthropic_error_body
from server.text.pieces import Arguments, CallStart, Content, Piece, Thought


class TextBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    text: str = ""


class ToolUseBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"{}"))
    """An object; empty in the event that begins the block."""


class ThinkingBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking"):
    thinking: str = ""
    signature: str = ""


Block = TextBlock | ToolUseBlock | ThinkingBlock


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int = 0
    """Tokens of the prompt but for those of the cache; all of them as long as nobody knows, when a stream begins."""
    cache_read_input_tokens: int = 0
    output_tokens: int = 0


class AnthropicAnswer(msgspec.Struct, kw_only=True):
    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[Block] = msgspec.field(default_factory=list)
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage = msgspec.field(default_factory=MessageUsage)


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What an event adds to a block, or to the message: the reason of its end."""

    type: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: str | UnsetType = UNSET
    stop_sequence: str | None | UnsetType = UNSET


class AnthropicEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of any type, with the fields that its type has."""

    type: str
    message: AnthropicAnswer | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: Block | UnsetType = UNSET
    delta: Delta | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET


class AnthropicWriter:
    """Builds a message from the pieces of an answer. A message that is not streamed is what remains at the end.

    The events refer to the message itself, which goes on to change: each is to be encoded before the next is asked for.
    """

    def __init__(self, model: str, *, has_thoughts: bool = False) -> None:
        """Without `has_thoughts` thoughts are left out: clients that ask for none take the first block for the text."""
        self.message = AnthropicAnswer(id=f"msg_{uuid.uuid4().hex}", model=model)
        self._arguments = ""
        """JSON text of the last block's input, as far as it has come."""
        self._is_open = False
        self._has_thoughts = has_thoughts

    @property
    def whole(self) -> AnthropicAnswer:
        return self.message

    def begin(self, num_prompt_tokens: int) -> Iterable[AnthropicEvent]:
        self.message.usage = MessageUsage(input_tokens=num_prompt_tokens)
        yield AnthropicEvent(type="message_start", message=self.message)

    def push(self, piece: Piece) -> Iterable[AnthropicEvent]:
        """The events of the next piece of the answer."""
        match piece:
            case Content(text):
                block = self.message.content[-1] if self._is_open else None
                if not isinstance(block, TextBlock):
                    yield from self._close()
                    block = TextBlock()
                    yield self._add(block)
                block.text += text
                yield self._delta(Delta(type="text_delta", text=text))
            case Thought(text):
                yield from self._think(text)
            case CallStart(_, name):
                yield from self._close()
                yield self._add(ToolUseBlock(id=f"toolu_{uuid.uuid4().hex[:24]}", name=name))
            case Arguments(_, text):
                self._arguments += text
                yield self._delta(Delta(type="input_json_delta", partial_json=text))

    def _think(self, text: str) -> Iterable[AnthropicEvent]:
        if not self._has_thoughts:
            return
        block = self.message.content[-1] if self._is_open else None
        if not isinstance(block, ThinkingBlock):
            block = ThinkingBlock()
            yield self._add(block)
        block.thinking += text
        yield self._delta(Delta(type="thinking_delta", thinking=text))

    def finish(self, end: AnswerEnd) -> Iterable[AnthropicEvent]:
        """The last events."""
        message = self.message
        if not message.content:
            yield self._add(TextBlock())
        yield from self._close()
        message.stop_reason, message.stop_sequence = _stop_reason(end), end.stop
        message.usage = MessageUsage(
            input_tokens=message.usage.input_tokens - end.num_cached_tokens,
            cache_read_input_tokens=end.num_cached_tokens,
            output_tokens=end.num_tokens,
        )
        delta = Delta(stop_reason=message.stop_reason, stop_sequence=message.stop_sequence)
        yield AnthropicEvent(type="message_delta", delta=delta, usage=message.usage)
        yield AnthropicEvent(type="message_stop")

    @staticmethod
    def fail(error: Exception) -> AnthropicErrorBody:
        """The last event of a message that has failed."""
        return anthropic_error_body(error)

    def _add(self, block: Block) -> AnthropicEvent:
        self.message.content.append(block)
        self._is_open, self._arguments = True, ""
        return AnthropicEvent(type="content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: Delta) -> AnthropicEvent:
        return AnthropicEvent(type="content_block_delta", index=self._index, delta=delta)

    def _close(self) -> Iterable[AnthropicEvent]:
        if not self._is_open:
            return
        block = self.message.content[-1]
        if isinstance(block, ToolUseBlock):
            block.input = _object(self._arguments)
        yield AnthropicEvent(type="content_block_stop", index=self._index)
        self._is_open = False

    @property
    def _index(self) -> int:
        return len(self.message.content) - 1


def _stop_reason(end: AnswerEnd) -> str:
    if end.is_cut:
        return "max_tokens"
    if end.num_calls:
        return "tool_use"
    return "end_turn" if end.stop is None else "stop_sequence"


def _object(text: str) -> msgspec.Raw:
    """The JSON text of an input; of one that was cut off nothing is left, for a client must not run it."""
    try:
        msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return msgspec.Raw(b"{}")
    return msgspec.Raw(text.encode())
