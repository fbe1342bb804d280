"""Bodies of the OpenAI-shaped routes, as TGI reads them and with what OpenAI's clients send besides.

`docs/wire.md` has TGI's side: 1.9, 1.11, 3.4, 3.6 and 3.7.
Without `--strict-tgi` null is the default, `stop` may be one string, and OpenAI's own shapes are understood.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AliasChoices,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from server.requests.dialects import parameters_of, speaking
from server.requests.functions import NEWER_KEYS, OfferedFunction, read_functions
from server.requests.guided import GUIDED_KEYS, read_guided
from server.requests.ignored import note_ignored
from server.requests.messages import Message, OpenAIModel
from server.requests.rows import Dialect
from server.requests.sampling import Parameters
from server.requests.sampling_defaults import filled
from server.requests.serde import (
    F32,
    I32,
    I64,
    INVALID_TYPE,
    U32,
    U64,
    ListOf,
    WireModel,
    is_strict,
    max_items,
    missing,
    round_to_f32,
    spellings_of,
    wrong,
    wrong_at,
)
from server.requests.tool_choice import MAX_TOOLS, ReadToolChoice
from server.requests.values import Grammar, LogitBias

MAX_MESSAGES = 16_384
FORMAT_KEY = "response_format"
LENGTH_KEYS = ("max_tokens", "max_completion_tokens")
"""Keys of a chat for the number of new tokens; of two the last counts."""


class Tool(WireModel):
    type: str
    function: OfferedFunction
    sent: SkipJsonSchema[dict[str, Any]]
    """The tool as the client sent it, which templates show to the model."""

    @model_validator(mode="before")
    @classmethod
    def _keep(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data["sent"] = dict(data)
        return data


class StreamOptions(OpenAIModel):
    include_usage: bool = False


def _read_stop(value: Any, info: ValidationInfo) -> Any:
    """Forms send an empty text where nobody has written one. To TGI it ends every answer at once."""
    if is_strict(info):
        return value
    texts = [value] if isinstance(value, str) else value
    return [text for text in texts if text != ""] if isinstance(texts, list) else texts


def _read_bias(value: Any, info: ValidationInfo) -> Any:
    """The map. TGI reads a list of numbers and does nothing with it."""
    if not is_strict(info):
        return value
    _BIAS_LIST.validate_python(value)
    return None


_BIAS_LIST: TypeAdapter[list[float] | None] = TypeAdapter(ListOf[F32] | None)

Stop = Annotated[ListOf[str] | None, BeforeValidator(_read_stop, json_schema_input_type=str | list[str] | None)]


class OpenAIFormat(OpenAIModel):
    """`response_format` in OpenAI's shape; read here only to be described."""

    type: Literal["text", "json_object", "json_schema", "grammar"]
    json_schema: Any = None
    grammar: Any = None
    """A text in GBNF or in llguidance's form of Lark, with the type that has its name; not looked at with others."""


def _read_response_format(value: Any, info: ValidationInfo) -> Any:
    """OpenAI's shapes become TGI's (`docs/wire.md`, 3.7); `{"type": "text"}` asks for what happens anyway."""
    if is_strict(info) or not isinstance(value, dict):
        return value
    match value.get("type"):
        case "text":
            return None
        case "json_object" if "value" not in value:
            schema = value.get("schema")  # as llama.cpp and hosted services have it
            return {"type": "json_object", "value": schema if isinstance(schema, dict) else None}
        case "json_schema" if "value" not in value:
            schema = value.get("json_schema")
            if schema is None:
                raise missing("", "json_schema")
            if isinstance(schema, dict) and schema.get("schema") is None:
                raise missing("json_schema", "schema")
            return {"type": "json_schema", "value": schema}
        case "grammar":  # as vLLM and hosted services take it; TGI's own shape does not know the type
            if not isinstance(value.get("grammar"), str):
                raise wrong_at("grammar", "a grammar is a string", INVALID_TYPE)
            return Grammar.model_construct(type="grammar", value=value["grammar"])
    return value


ResponseFormat = Annotated[
    Grammar | None, BeforeValidator(_read_response_format, json_schema_input_type=Grammar | OpenAIFormat | None)
]


def _read_seed(value: Any, info: ValidationInfo) -> Any:
    """A seed that is negative counts from the end of the unsigned ones, but -1 asks for a random one."""
    if is_strict(info) or type(value) is not int or not -(2**63) <= value < 0:
        return value
    return None if value == -1 else value % 2**64


_AnyInteger = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
Seed = Annotated[U64 | None, BeforeValidator(_read_seed, json_schema_input_type=_AnyInteger | None)]


class OpenAIBody(OpenAIModel):
    """A whole body, of whose fields without effect the log tells."""

    further_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that have an effect and are no fields."""

    @model_validator(mode="wrap")
    @classmethod
    def _note_ignored(cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        body = handler(data)  # first: some routes take bodies of several shapes, and this may be another
        if isinstance(data, dict) and not is_strict(info):
            note_ignored({key for key, value in data.items() if value is not None} - _keys_with_effect(cls))
        return body


@functools.cache
def _keys_with_effect(body: type[OpenAIBody]) -> frozenset[str]:
    return body.further_keys.union(*(spellings for _, spellings in spellings_of(body)))


class GenerationBody(OpenAIBody):
    """A body that may have vLLM's constraints on the output."""

    further_keys: ClassVar[frozenset[str]] = GUIDED_KEYS

    format_key: SkipJsonSchema[str] = FORMAT_KEY
    """The key that the request has for its `response_format`."""

    @model_validator(mode="before")
    @classmethod
    def _read_guided(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict):
            return data
        data = copy.copy(data)
        data["format_key"] = FORMAT_KEY
        return data if is_strict(info) else read_guided(data)


@speaking(Dialect.CHAT)
class ChatRequest(GenerationBody):
    """Body of /v1/chat/completions."""

    further_keys: ClassVar[frozenset[str]] = GUIDED_KEYS.union(NEWER_KEYS)

    messages: Annotated[ListOf[Message], max_items(MAX_MESSAGES)]
    model: str | None = None
    max_tokens: U32 | None = Field(None, validation_alias=AliasChoices(*LENGTH_KEYS))
    temperature: F32 | None = None
    top_p: F32 | None = None
    frequency_penalty: F32 | None = None
    presence_penalty: F32 | None = None
    stop: Stop = None
    seed: Seed = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logprobs: bool | None = None
    top_logprobs: U32 | None = None
    tools: Annotated[ListOf[Tool] | None, max_items(MAX_TOOLS)] = None
    tool_choice: ReadToolChoice = None
    tool_prompt: str | None = None
    response_format: ResponseFormat = None
    n: U32 | None = None
    logit_bias: Annotated[LogitBias | None, BeforeValidator(_read_bias)] = None
    top_k: I32 | None = None
    min_p: F32 | None = None
    typical_p: F32 | None = None
    repetition_penalty: F32 | None = None
    ignore_eos: bool = False
    parallel_tool_calls: bool = True
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What else the chat template may look at, such as `enable_thinking`."""
    reasoning_effort: str | None = None
    include_reasoning: bool = True
    """The answer has its thoughts."""
    length_key: SkipJsonSchema[str] = "max_tokens"
    """The key that the request has for its length."""

    extensions: ClassVar[frozenset[str]] = frozenset(
        (
            "parallel_tool_calls continue_final_message add_generation_prompt chat_template_kwargs reasoning_effort "
            "include_reasoning"
        ).split()
    )

    @property
    def template_variables(self) -> dict[str, Any]:
        """Further variables of the template. As in vLLM an effort is one, and says whether the model thinks at all."""
        effort = self.reasoning_effort
        switches = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return switches | self.chat_template_kwargs

    @model_validator(mode="before")
    @classmethod
    def _read_older_keys(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict) or is_strict(info):
            return data
        if data.get("chat_template") is not None:
            reason = "chats are rendered with the model's own template"
            raise wrong_at("chat_template", reason, "unsupported_parameter")
        return read_functions(data)

    @model_validator(mode="before")
    @classmethod
    def _keep_length_key(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = copy.copy(data)  # the body may yet turn out to be of another shape
            data["length_key"] = next((key for key in reversed(LENGTH_KEYS) if data.get(key) is not None), "max_tokens")
        return data


Prompts = list[str | list[int]]
"""Prompts of one request, each as text or as token ids."""

_STRICT = ConfigDict(strict=True)
_TEXTS: TypeAdapter[list[str]] = TypeAdapter(ListOf[str], config=_STRICT)
_IDS: TypeAdapter[list[int]] = TypeAdapter(ListOf[U32], config=_STRICT)
_LISTS_OF_IDS: TypeAdapter[list[list[int]]] = TypeAdapter(ListOf[ListOf[U32]], config=_STRICT)


def _read_prompts(value: object, info: ValidationInfo) -> Prompts:
    """TGI takes a string or several. OpenAI also takes token ids, as one list or as several."""
    if isinstance(value, str):
        return [value]
    if value == [] or (isinstance(value, list) and not is_strict(info) and any(item == [] for item in value)):
        raise wrong("Empty array detected. Do not use an empty array for the prompt.")
    first = value[0] if isinstance(value, list) else None
    try:
        if isinstance(first, str):
            return list(_TEXTS.validate_python(value))
        if isinstance(first, int) and not is_strict(info):
            return [_IDS.validate_python(value)]
        if isinstance(first, list) and not is_strict(info):
            return list(_LISTS_OF_IDS.validate_python(value))
    except ValidationError:
        pass
    raise wrong("data did not match any variant of untagged enum PromptDeserializer")


@speaking(Dialect.COMPLETIONS)
class CompletionRequest(GenerationBody):
    """Body of /v1/completions."""

    prompt: Annotated[
        Prompts, PlainValidator(_read_prompts, json_schema_input_type=str | list[str] | list[U32] | list[list[U32]])
    ]
    model: str | None = None
    max_tokens: U32 | None = None
    temperature: F32 | None = None
    top_p: F32 | None = None
    repetition_penalty: F32 | None = None
    frequency_penalty: F32 | None = None
    seed: Seed = None
    stop: Stop = None
    stream: bool = False
    suffix: str | None = None
    stream_options: StreamOptions = StreamOptions()
    n: U32 | None = None
    best_of: U32 | None = None
    echo: bool = False
    logprobs: U32 | None = None
    """Number of the likeliest tokens to report beside each chosen one; 0 reports the chosen ones alone."""
    presence_penalty: F32 | None = None
    logit_bias: LogitBias | None = None
    top_k: I32 | None = None
    min_p: F32 | None = None
    typical_p: F32 | None = None
    ignore_eos: bool = False
    response_format: ResponseFormat = None
    prompt_logprobs: I64 | None = None

    extensions: ClassVar[frozenset[str]] = frozenset({"stream_options", "n", "best_of", "echo"})


def openai_parameters(
    request: ChatRequest | CompletionRequest, defaults: Mapping[str, float], *, is_strict: bool
) -> Parameters:
    """The parameters of an OpenAI-shaped request: tokens are drawn unless the temperature, or top_p, is exactly 0.

    `defaults` are values of parameters that the request leaves out.
    """
    dialect = Dialect.CHAT if isinstance(request, ChatRequest) else Dialect.COMPLETIONS
    parameters = filled(parameters_of(dialect, request), defaults)
    is_greedy = parameters.temperature == 0 or (parameters.top_p == 0 and not is_strict)
    presence, repetition = parameters.presence_penalty, parameters.repetition_penalty
    if is_strict and presence is not None:  # `docs/compatibility.md`, row 5
        repetition, presence = round_to_f32(presence + 2), None
    return dataclasses.replace(
        parameters,
        do_sample=not is_greedy,
        temperature=parameters.temperature or None,
        # `docs/compatibility.md`, row 3
        top_p=None if parameters.top_p in (0, 1) and not is_strict else parameters.top_p,
        typical_p=None if parameters.typical_p == 1 else parameters.typical_p,
        top_k=None if parameters.top_k in (-1, 0) else parameters.top_k,  # either is off to some server
        presence_penalty=presence,
        repetition_penalty=repetition,
        details=True,
        adapter_id=request.model,
    )
