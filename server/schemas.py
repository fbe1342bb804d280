"""Request bodies of the wire, field by field as TGI reads them (reference `tgi-http.md` 1.1, 1.2, 1.9, 3.4, 3.6, 3.7).

A field that may be `null` is `X | None`; the others refuse an explicit null even where they have a default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from server.serde import F32, I32, U32, U64, Usize, WireModel, untagged, wrong


class Grammar(WireModel):
    """A constraint on the output."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: Any


class GenerateParameters(WireModel):
    """`parameters` of a native request; the OpenAI routes are mapped to it as well."""

    best_of: Usize | None = None
    temperature: F32 | None = None
    repetition_penalty: F32 | None = None
    frequency_penalty: F32 | None = None
    top_k: I32 | None = None
    top_p: F32 | None = None
    typical_p: F32 | None = None
    do_sample: bool = False
    max_new_tokens: U32 | None = None
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: Usize | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: U64 | None = None
    top_n_tokens: U32 | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None


def _absent_parameters() -> GenerateParameters:
    return GenerateParameters(do_sample=True)


class GenerateRequest(WireModel):
    """Body of /generate and /generate_stream."""

    inputs: str
    parameters: GenerateParameters = Field(default_factory=_absent_parameters)
    """Left out altogether it means sampling, while `{}` means greedy (quirk 1)."""


class CompatGenerateRequest(GenerateRequest):
    """Body of POST /."""

    stream: bool = False


class TextPart(WireModel):
    type: Literal["text"]
    text: str


class ImageUrl(WireModel):
    url: str


class ImagePart(WireModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class ToolFunction(WireModel):
    """A function that is offered, or that was called."""

    name: str
    description: str | None = None
    arguments: Any = Field(validation_alias=AliasChoices("arguments", "parameters"))


class ToolCall(WireModel):
    id: str
    type: str
    function: ToolFunction


class Tool(WireModel):
    type: str
    function: ToolFunction


class FunctionName(WireModel):
    name: str


class NamedToolChoice(WireModel):
    function: FunctionName


class ContentBody(WireModel):
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class ToolCallBody(WireModel):
    tool_calls: list[ToolCall]


_MESSAGE_BODY: TypeAdapter[ContentBody | ToolCallBody] = TypeAdapter(
    Annotated[ContentBody | ToolCallBody, Field(union_mode="left_to_right")]
)


class Message(WireModel):
    """One message of a chat; `content` wins over `tool_calls` where both are usable."""

    role: str
    name: str | None = None
    body: ContentBody | ToolCallBody

    @model_validator(mode="before")
    @classmethod
    def _read_body(cls, data: Any) -> Any:
        # TGI flattens an untagged enum into the message: its error names the message, not the field
        if not isinstance(data, dict):
            return data
        try:
            data["body"] = _MESSAGE_BODY.validate_python(data)
        except ValidationError:
            raise wrong("data did not match any variant of untagged enum MessageBody") from None
        return data


class StreamOptions(WireModel):
    include_usage: bool = False


def _drop_text_format(value: Any) -> Any:
    """OpenAI's `{"type": "text"}` asks for what happens anyway."""
    return None if isinstance(value, dict) and value.get("type") == "text" else value


class ChatRequest(WireModel):
    """Body of /v1/chat/completions."""

    messages: list[Message]
    model: str | None = None
    max_tokens: U32 | None = Field(None, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    temperature: F32 | None = None
    top_p: F32 | None = None
    frequency_penalty: F32 | None = None
    presence_penalty: F32 | None = None
    stop: list[str] | None = None
    seed: U64 | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: list[Tool] | None = None
    tool_choice: Annotated[str | NamedToolChoice | None, untagged("ToolTypeDeserializer")] = None
    tool_prompt: str | None = None
    response_format: Annotated[Grammar | None, BeforeValidator(_drop_text_format)] = None
    n: U32 | None = None
    """Read and ignored, as `logit_bias`: always one choice."""
    logit_bias: list[F32] | None = None
