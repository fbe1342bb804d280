"""A chat's messages as bodies have them (`docs/wire.md`, 3.4).

Without `--strict-tgi` the content may also be null, and have parts of kinds that TGI does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import CoreSchema

from server.requests.serde import (
    INVALID_TYPE,
    ListOf,
    WireModel,
    is_strict,
    missing,
    reading,
    unexpected,
    wrong,
    wrong_at,
)

MEDIA = frozenset(
    "image_url image input_image audio_url audio input_audio video_url video input_video file input_file".split()
)
"""Types of parts that are no text. A part of any other type without a text says nothing, like an annotation."""


class OpenAIModel(WireModel):
    is_null_absent: ClassVar[bool] = True


class TextPart(WireModel):
    type: Literal["text"]
    text: str


class ImageUrl(WireModel):
    url: str


class ImagePart(WireModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class MediaPart(WireModel):
    """A part that no text model can read."""

    type: str


Part = TextPart | ImagePart | MediaPart


class CalledFunction(OpenAIModel):
    name: str
    description: str | None = None
    arguments: Any = Field(None, validation_alias=AliasChoices("arguments", "parameters"))

    @model_validator(mode="before")
    @classmethod
    def _require_arguments(cls, data: Any, info: ValidationInfo) -> Any:
        if is_strict(info) and isinstance(data, dict) and data.keys().isdisjoint(("arguments", "parameters")):
            raise wrong("missing field `arguments`")
        return data


class ToolCall(OpenAIModel):
    id: str | None = None
    type: str = "function"
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _require_all(cls, data: Any, info: ValidationInfo) -> Any:
        if is_strict(info) and isinstance(data, dict):
            missing = next((name for name in ("id", "type") if data.get(name) is None), None)
            if missing:
                raise wrong(f"missing field `{missing}`")
        return data


class ContentBody(WireModel):
    content: str | Sequence[Part]


class TgiContentBody(ContentBody):
    """A content as TGI reads it."""

    content: str | ListOf[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class ToolCallBody(WireModel):
    tool_calls: ListOf[ToolCall]


_MESSAGE_BODY: TypeAdapter[ContentBody | ToolCallBody] = TypeAdapter(
    Annotated[TgiContentBody | ToolCallBody, Field(union_mode="left_to_right")]
)


class Message(OpenAIModel):
    """One message of a chat. Read strictly, `content` wins over `tool_calls` where both are usable."""

    role: str
    name: str | None = None
    body: ContentBody | ToolCallBody
    tool_calls: ListOf[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None
    sent: SkipJsonSchema[dict[str, Any]]
    """The message as the client sent it, for templates that look at more."""

    extensions: ClassVar[frozenset[str]] = frozenset({"tool_calls", "tool_call_id"})

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The fields of `body` are the message's own."""
        schema = handler.resolve_ref_schema(handler(core))
        schema["required"].remove("body")
        schema["anyOf"] = schema["properties"].pop("body")["anyOf"]
        return schema

    @model_validator(mode="before")
    @classmethod
    def _read_body(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict):
            return data
        if not is_strict(info):
            _read_older_call(data)
        sent = dict(data)
        for key in ("body", "sent"):  # ours, from another reading of the same object
            sent.pop(key, None)
        body = (_read_strictly if is_strict(info) else _read_freely)(sent, info.context)
        if isinstance(body, ToolCallBody):  # they are read once
            data["tool_calls"] = body.tool_calls
        data["body"], data["sent"] = body, sent
        return data


def _read_older_call(message: dict[str, Any]) -> None:
    """OpenAI's older `function_call` and role become a call and its answer, which have no id."""
    if message.get("role") == "function":
        message["role"] = "tool"
    call = message.pop("function_call", None)
    if call is None or message.get("tool_calls"):
        return
    with reading("function_call"):
        CalledFunction.model_validate(call)
    message["tool_calls"] = [{"type": "function", "function": call}]


def _read_strictly(message: dict[str, Any], context: dict[str, Any] | None) -> ContentBody | ToolCallBody:
    try:
        return _MESSAGE_BODY.validate_python(message, context=context)
    except ValidationError:
        # TGI flattens an untagged enum into the message: its error names the message, not the field
        raise wrong("data did not match any variant of untagged enum MessageBody") from None


def _read_freely(message: dict[str, Any], context: dict[str, Any] | None) -> ContentBody | ToolCallBody:
    """The content, or without one the calls. Nothing at all is a message that has no calls."""
    content = message.get("content")
    if content is None:
        content = message.get("refusal")
    if isinstance(content, str):
        return ContentBody.model_construct(content=content)
    if isinstance(content, list):
        parts = [_read_part(part, place) for place, part in enumerate(content)]
        return ContentBody.model_construct(content=[part for part in parts if part is not None])
    if content is not None:
        reason = f"invalid type: {unexpected(content)}, expected a string or a list of parts"
        raise wrong_at("content", reason, INVALID_TYPE)
    if message.get("tool_calls"):
        with reading(""):
            return ToolCallBody.model_validate(message, context=context)
    if "content" in message or message.get("role") == "assistant":
        return ToolCallBody(tool_calls=[])
    raise missing("", "content")


def _read_part(value: Any, place: int) -> Part | None:
    """A part of a content; None: it says nothing. A refusal is what the assistant said."""
    if isinstance(value, str):
        return TextPart(type="text", text=value)
    if not isinstance(value, dict) or value.get("type") == "text":
        with reading(f"content[{place}]"):
            return TextPart.model_validate(value)
    if isinstance(kind := value.get("type"), str) and kind in MEDIA:
        return MediaPart(type=kind)
    text = next((value[key] for key in ("text", "refusal") if isinstance(value.get(key), str)), None)
    return None if text is None else TextPart(type="text", text=text)
