"""What a model writes in the shape of /v1/responses: items, and the events that build them (`docs/other-apis.md`)."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from server.chat.messages import AnswerEnd
from server.errors import openai_error_body
from server.text.pieces import Arguments, CallStart, Content, Piece, Thought

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(msgspec.Struct, kw_only=True, tag_field="type", tag="output_text"):
    text: str = ""
    annotations: list[Any] = msgspec.field(default_factory=list)
    logprobs: list[Any] = msgspec.field(default_factory=list)


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    id: str
    status: Status = "in_progress"
    role: str = "assistant"
    content: list[OutputText] = msgspec.field(default_factory=list)


class OutputCall(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Status = "in_progress"


class ReasoningText(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    text: str = ""


class OutputReasoning(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    id: str
    summary: list[Any] = msgspec.field(default_factory=list)
    content: list[ReasoningText] = msgspec.field(default_factory=list)
    status: Status = "in_progress"


OutputItem = OutputMessage | OutputCall | OutputReasoning


class InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputDetails = msgspec.field(default_factory=InputDetails)
    output_tokens: int
    output_tokens_details: OutputDetails = msgspec.field(default_factory=OutputDetails)
    total_tokens: int


class ResponseError(msgspec.Struct, frozen=True):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response; the fields of the request are told again."""

    id: str
    object: str = "response"
    created_at: int
    status: Status = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputItem] = msgspec.field(default_factory=list)
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: bool = False
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of any type, with the fields that its type has."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET


class ResponseWriter:
    """Builds a response from the pieces of an answer. A response that is not streamed is what remains at the end.

    The events refer to the response itself, which goes on to change: each is to be encoded before the next is asked
    for.
    """

    def __init__(self, response: ResponseObject) -> None:
        self.response = response
        self._num_events = 0
        self._num_prompt_tokens = 0
        self._open: OutputItem | None = None
        """The last item, while it may grow."""

    @property
    def whole(self) -> ResponseObject:
        return self.response

    def begin(self, num_prompt_tokens: int) -> Iterable[ResponseEvent]:
        self._num_prompt_tokens = num_prompt_tokens
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self.response)

    def push(self, piece: Piece) -> Iterable[ResponseEvent]:
        """The events of the next piece of the answer."""
        match piece:
            case Content(text):
                if not isinstance(self._open, OutputMessage):
                    yield from self._close("completed")
                    yield from self._add(OutputMessage(id=_new_id("msg")))
                yield self._grow_text(text)
            case Thought(text):
                if not isinstance(self._open, OutputReasoning):
                    yield from self._add(OutputReasoning(id=_new_id("rs")))
                yield self._grow_text(text)
            case CallStart(_, name):
                yield from self._close("completed")
                yield from self._add(OutputCall(id=_new_id("fc"), call_id=_new_id("call"), name=name))
            case Arguments(_, text):
                assert isinstance(self._open, OutputCall)
                self._open.arguments += text
                yield self._event_of_item("response.function_call_arguments.delta", delta=text)

    def finish(self, end: AnswerEnd) -> Iterable[ResponseEvent]:
        """The last events."""
        if not self.response.output:
            yield from self._add(OutputMessage(id=_new_id("msg")))
        status: Status = "incomplete" if end.is_cut else "completed"
        yield from self._close(status)
        self.response.status = status
        self.response.usage = ResponseUsage(
            input_tokens=self._num_prompt_tokens,
            input_tokens_details=InputDetails(end.num_cached_tokens),
            output_tokens=end.num_tokens,
            output_tokens_details=OutputDetails(end.num_thought_tokens),
            total_tokens=self._num_prompt_tokens + end.num_tokens,
        )
        if end.is_cut:
            self.response.incomplete_details = IncompleteDetails("max_output_tokens")
        yield self._event(f"response.{status}", response=self.response)

    def fail(self, error: Exception) -> ResponseEvent:
        """The last event of a response that has failed."""
        message = openai_error_body(error).error.message
        self.response.status, self.response.error = "failed", ResponseError("server_error", message)
        return self._event("response.failed", response=self.response)

    def _add(self, item: OutputItem) -> Iterable[ResponseEvent]:
        self._open = item
        self.response.output.append(item)
        yield self._event("response.output_item.added", output_index=self._index, item=item)
        if isinstance(item, OutputMessage):
            item.content.append(OutputText())
        if isinstance(item, OutputReasoning):
            item.content.append(ReasoningText())
        if not isinstance(item, OutputCall):
            yield self._event_of_part("response.content_part.added", part=item.content[0])

    def _grow_text(self, text: str) -> ResponseEvent:
        assert self._open is not None and not isinstance(self._open, OutputCall)
        self._open.content[0].text += text
        if isinstance(self._open, OutputReasoning):
            return self._event_of_part("response.reasoning_text.delta", delta=text)
        return self._event_of_part("response.output_text.delta", delta=text, logprobs=[])

    def _close(self, status: Status) -> Iterable[ResponseEvent]:
        item = self._open
        if item is None:
            return
        item.status = status
        if isinstance(item, OutputMessage):
            part = item.content[0]
            yield self._event_of_part("response.output_text.done", text=part.text, logprobs=[])
            yield self._event_of_part("response.content_part.done", part=part)
        elif isinstance(item, OutputReasoning):
            thought = item.content[0]
            yield self._event_of_part("response.reasoning_text.done", text=thought.text)
            yield self._event_of_part("response.content_part.done", part=thought)
        else:
            done = "response.function_call_arguments.done"
            yield self._event_of_item(done, name=item.name, arguments=item.arguments)
        yield self._event("response.output_item.done", output_index=self._index, item=item)
        self._open = None

    @property
    def _index(self) -> int:
        return len(self.response.output) - 1

    def _event_of_part(self, kind: str, **fields: Any) -> ResponseEvent:
        return self._event_of_item(kind, content_index=0, **fields)

    def _event_of_item(self, kind: str, **fields: Any) -> ResponseEvent:
        assert self._open is not None
        return self._event(kind, output_index=self._index, item_id=self._open.id, **fields)

    def _event(self, kind: str, **fields: Any) -> ResponseEvent:
        self._num_events += 1
        return ResponseEvent(type=kind, sequence_number=self._num_events - 1, **fields)


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
