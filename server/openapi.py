"""The description of the API: OpenAPI 3.1, made once at start out of the types that bodies and answers are made of.

It tells how requests are read without `--strict-tgi`; with it, the fields that TGI does not know are ignored.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic
from pydantic.json_schema import models_json_schema

from server.answers.json import VERSION
from server.answers.openai import TgiStreamErrorBody
from server.config import ServerConfig
from server.edge.access import is_protected
from server.errors import ErrorBody, OpenAIErrorBody
from server.requests.cloud import SagemakerRequest, VertexRequest
from server.requests.native import CompatGenerateRequest, DetokenizeRequest, GenerateRequest
from server.requests.openai import ChatRequest, CompletionRequest, OpenAIModel
from server.requests.serde import WireModel, spellings_of
from server.requests.validation import MAX_CHOICES
from server.routes.chat import ChatCompletion, ChatCompletionChunk
from server.routes.cloud import VertexResponse
from server.routes.completions import CompletionChunk, CompletionFinal
from server.routes.generate import GenerateResponse, StreamResponse
from server.routes.info import Info
from server.routes.models import Model, ModelList
from server.routes.tokenize import ChatTokenizeResponse, DetokenizeResponse
from server.text.tokenizer import SimpleToken

REF = "#/components/schemas/{}"
TEXT = "text/plain; charset=utf-8"

Schema = dict[str, Any]

_FOR_DEVELOPERS = re.compile(r" \((reference|quirk)[^)]*\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    body: type[pydantic.BaseModel] | None = None
    answers: tuple[Any, ...] = ()
    """What a plain 200 may hold, as JSON; none: an empty body, or what `text` says."""
    text: str | None = None
    """The media type of an answer that is not JSON."""
    events: tuple[type[msgspec.Struct], ...] = ()
    """What the data of an event is, in a stream that goes well."""
    is_generating: bool = False
    """Runs the model: may be refused as overloaded and may fail, and tells x- headers unless it is /vertex."""
    status: int = 200
    errors: tuple[int, ...] = ()
    """Further statuses with an error object."""


OPERATIONS = (
    Operation(
        method="POST",
        path="/",
        summary="Text for a prompt, in an array of one or as events",
        body=CompatGenerateRequest,
        answers=(list[GenerateResponse],),
        events=(StreamResponse,),
        is_generating=True,
    ),
    Operation(
        method="POST",
        path="/generate",
        summary="Text for a prompt",
        body=GenerateRequest,
        answers=(GenerateResponse,),
        is_generating=True,
    ),
    Operation(
        method="POST",
        path="/generate_stream",
        summary="Text for a prompt, an event per token",
        body=GenerateRequest,
        events=(StreamResponse,),
        is_generating=True,
    ),
    Operation(
        method="POST",
        path="/v1/chat/completions",
        summary="The next message of a chat",
        body=ChatRequest,
        answers=(ChatCompletion,),
        events=(ChatCompletionChunk,),
        is_generating=True,
    ),
    Operation(
        method="POST",
        path="/v1/completions",
        summary="Texts for one or several prompts",
        body=CompletionRequest,
        answers=(CompletionFinal,),
        events=(CompletionChunk, CompletionFinal),
        is_generating=True,
    ),
    Operation(
        method="POST",
        path="/invocations",
        summary="For SageMaker: what POST /, chat or completions answer, as the body's shape says",
        body=SagemakerRequest,
        answers=(list[GenerateResponse], ChatCompletion, CompletionFinal),
        events=(StreamResponse, ChatCompletionChunk, CompletionChunk, CompletionFinal),
        is_generating=True,
    ),
    Operation(
        method="POST",
        path="/vertex",
        summary="For Vertex AI: texts for several prompts or chats",
        body=VertexRequest,
        answers=(VertexResponse,),
        is_generating=True,
    ),
    Operation(
        method="POST",
        path="/tokenize",
        summary="The tokens of a text",
        body=GenerateRequest,
        answers=(list[SimpleToken],),
    ),
    Operation(
        method="POST",
        path="/chat_tokenize",
        summary="The prompt that a chat becomes, and its tokens",
        body=ChatRequest,
        answers=(ChatTokenizeResponse,),
    ),
    Operation(
        method="POST",
        path="/detokenize",
        summary="The text of tokens",
        body=DetokenizeRequest,
        answers=(DetokenizeResponse,),
    ),
    Operation(method="GET", path="/info", summary="The model and the limits", answers=(Info,)),
    Operation(method="GET", path="/v1/models", summary="The models: one", answers=(ModelList,)),
    Operation(method="GET", path="/v1/models/{model_id}", summary="One model", answers=(Model,), errors=(404,)),
    *(
        Operation(method="GET", path=path, summary="Whether the server can answer", errors=(503,))
        for path in ("/", "/health", "/ping", "/readyz")
    ),
    Operation(method="GET", path="/livez", summary="Whether the engine lives", errors=(503,)),
    Operation(method="GET", path="/metrics", summary="Metrics for Prometheus", text=TEXT),
    Operation(method="GET", path="/docs", summary="Leads to /docs/", status=303),
    Operation(method="GET", path="/docs/", summary="This description, to be read", text="text/html; charset=utf-8"),
    *(
        Operation(method="GET", path=path, summary="This description", answers=(dict[str, Any],))
        for path in ("/openapi.json", "/api-doc/openapi.json")
    ),
)

_HEADERS = {
    "x-compute-type": ("string", "The hardware"),
    "x-compute-characters": ("integer", "Characters of the prompt"),
    "x-compute-time": ("number", "Seconds from the request to the answer"),
    "x-total-time": ("integer", "Milliseconds from the request to the answer"),
    "x-validation-time": ("integer", "Milliseconds until the request was found valid"),
    "x-queue-time": ("integer", "Milliseconds of waiting"),
    "x-inference-time": ("integer", "Milliseconds of generating"),
    "x-time-per-token": ("integer", "Milliseconds of generating per token"),
    "x-prompt-tokens": ("integer", "Tokens of the prompt"),
    "x-generated-tokens": ("integer", "Tokens of the answer"),
    "x-accel-buffering": ("string", "`no`: proxies pass events on at once"),
}
"""Reference 1.12. Which of them an answer has depends on the route and on whether it streams."""

_WORDS = {
    200: "Success",
    303: "See there",
    400: "Not JSON",
    401: "API key absent or wrong",
    404: "No such model",
    413: "The body is too large",
    415: "The body is not announced as JSON",
    422: "The request cannot be answered: of the wrong shape (in plain text), or not acceptable",
    424: "Generation failed",
    429: "The model is overloaded",
    500: "The answer is incomplete, or the server has failed",
    503: "Unhealthy",
}


def _limits(config: ServerConfig) -> dict[str, dict[str, Schema]]:
    """What reference 2.2 says of single values, by body and field."""
    share = {"exclusiveMinimum": 0, "exclusiveMaximum": 1}
    both = {
        "frequency_penalty": {"minimum": -2, "maximum": 2},
        "presence_penalty": {"minimum": -2, "maximum": 2},
        "repetition_penalty": {"exclusiveMinimum": 0},
        "typical_p": share,
        "min_p": {"minimum": 0, "maximum": 1},
    }
    top_tokens = {"maximum": config.max_top_n_tokens}
    openai = both | {
        "temperature": {"minimum": 0},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"minimum": -1},
        "max_tokens": {"minimum": 1},
        "max_completion_tokens": {"minimum": 1},
        "n": {"minimum": 1, "maximum": MAX_CHOICES},
    }
    return {
        "GenerateParameters": both
        | {
            "best_of": {"maximum": config.max_best_of},
            "temperature": {"exclusiveMinimum": 0},
            "top_p": share,
            "top_k": {"minimum": 1},
            "max_new_tokens": {"minimum": 1},
            "top_n_tokens": top_tokens,
            "truncate": {"minimum": 1},
            "stop": {"maxItems": config.max_stop_sequences},
        },
        "ChatRequest": openai | {"top_logprobs": top_tokens},
        "CompletionRequest": openai | {"logprobs": top_tokens},
    }


@functools.cache
def build_openapi(config: ServerConfig) -> Schema:
    """The document, to be read only: it takes 50 ms, and tests make many applications with the same configuration."""
    bodies = {operation.body for operation in OPERATIONS if operation.body is not None}
    components = _request_components(sorted(bodies, key=lambda body: body.__name__))
    for name, limits in _limits(config).items():
        properties = components[name]["properties"]
        for field in limits.keys() & properties.keys():
            properties[field] = _limited(properties[field], limits[field])
    answers = _Answers(config)
    assert components.keys().isdisjoint(answers.components), "a body and an answer have the same name"
    paths: dict[str, Schema] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, answers)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pytgi",
            "description": "A pure-Python, wire-compatible successor of Text Generation Inference for Qwen2 models.",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
            "version": VERSION,
        },
        "paths": paths,
        "components": {
            "schemas": dict(sorted((components | answers.components).items())),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


class _Answers:
    """The schemas of what the server writes."""

    def __init__(self, config: ServerConfig) -> None:
        self._is_strict = config.is_strict_tgi
        self.has_key = config.api_key is not None
        types: list[Any] = [ErrorBody, OpenAIErrorBody, TgiStreamErrorBody]
        for operation in OPERATIONS:
            types += (*operation.answers, *operation.events)
        schemas, components = msgspec.json.schema_components(types, ref_template=REF.format("{name}"))
        self._schemas = dict(zip(map(str, types), schemas, strict=True))
        self.components = {name: _tidied(schema) for name, schema in components.items()}

    def of(self, *types: Any) -> Schema:
        schemas = [self._schemas[str(type_)] for type_ in types]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    def error(self, path: str) -> Schema:
        return self.of(OpenAIErrorBody if path.startswith("/v1/") and not self._is_strict else ErrorBody)

    def event(self, operation: Operation) -> Schema:
        """An error that comes late is an event as well."""
        types: list[type[msgspec.Struct]] = [*operation.events]
        if StreamResponse in operation.events:
            types.append(ErrorBody)
        if operation.events != (StreamResponse,):
            types.append(TgiStreamErrorBody if self._is_strict else OpenAIErrorBody)
        return self.of(*types)


def _request_components(bodies: Iterable[type[pydantic.BaseModel]]) -> dict[str, Schema]:
    pairs = [(body, "validation") for body in bodies]
    _, document = models_json_schema(pairs, ref_template=REF.format("{model}"))  # type: ignore[arg-type]
    models = {model.__name__: model for model in _subclasses(WireModel)}
    components = {}
    for name, schema in document["$defs"].items():
        schema = _tidied(schema)
        components[name] = _as_read(models[name], schema) if name in models else schema
    return components


def _subclasses(model: type[WireModel]) -> Iterator[type[WireModel]]:
    for child in model.__subclasses__():
        yield child
        yield from _subclasses(child)


def _tidied(schema: Schema) -> Schema:
    """Without titles, which only say the names once more, and without what docstrings say to developers."""
    tidied = {key: value for key, value in schema.items() if key != "title"}
    if "description" in tidied:
        tidied["description"] = _FOR_DEVELOPERS.sub("", tidied["description"])
    if "properties" in tidied:
        tidied["properties"] = {
            name: {key: value for key, value in field.items() if key != "title"}
            for name, field in tidied["properties"].items()
        }
    return tidied


def _as_read(model: type[WireModel], schema: Schema) -> Schema:
    """What pydantic does not know of a WireModel: other spellings of a field, and null as the default."""
    properties, required = schema["properties"], schema.get("required", [])
    for _, (first, *others) in spellings_of(model):
        if first not in properties:  # made of other fields
            continue
        if issubclass(model, OpenAIModel) and first not in required:
            properties[first] = _or_null(properties[first])
        for other in others:
            properties[other] = properties[first]
            schema.setdefault("allOf", []).append({"not": {"required": [first, other]}})
        if others and first in required:
            required.remove(first)
            schema["anyOf"] = [{"required": [name]} for name in (first, *others)]
    return schema


def _or_null(schema: Schema) -> Schema:
    default = {"default": schema["default"]} if "default" in schema else {}
    rest = {key: value for key, value in schema.items() if key != "default"}
    is_null_among = {"type": "null"} in rest.get("anyOf", ())
    return schema if is_null_among else {"anyOf": [rest, {"type": "null"}]} | default


def _limited(schema: Schema, limits: Schema) -> Schema:
    if "anyOf" not in schema:
        return schema | limits
    return schema | {"anyOf": [one if one == {"type": "null"} else one | limits for one in schema["anyOf"]]}


def _operation(operation: Operation, answers: _Answers) -> Schema:
    described: Schema = {"summary": operation.summary, "operationId": _operation_id(operation)}
    responses = {operation.status: _success(operation, answers)}
    for status in operation.errors:
        responses[status] = _response(status, {"application/json": answers.error(operation.path)})
    if "{model_id}" in operation.path:
        parameter = {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}
        described["parameters"] = [parameter]
    if operation.body is not None:
        reference = {"$ref": REF.format(operation.body.__name__)}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
        responses |= _refusals(operation, answers)
    if is_protected(operation.path, operation.method):
        described["security"] = [{"key": []}] if answers.has_key else [{}, {"key": []}]
        responses[401] = _response(401, {})
    return described | {"responses": {str(status): response for status, response in sorted(responses.items())}}


def _operation_id(operation: Operation) -> str:
    words = operation.path.replace("{", "").replace("}", "").replace("/", " ").replace(".", " ").split()
    slash = ["slash"] if operation.path.endswith("/") else []
    return "_".join([operation.method.lower(), *words, *slash])


def _success(operation: Operation, answers: _Answers) -> Schema:
    content: dict[str, Schema] = {}
    if operation.answers:
        content["application/json"] = answers.of(*operation.answers)
    if operation.text is not None:
        content[operation.text] = {"type": "string"}
    if operation.events:
        content["text/event-stream"] = answers.event(operation)
    response = _response(operation.status, content)
    if operation.is_generating and operation.answers != (VertexResponse,):
        response["headers"] = {
            name: {"description": words, "schema": {"type": kind}}
            for name, (kind, words) in _HEADERS.items()
            if operation.events or name != "x-accel-buffering"
        }
    return response


def _refusals(operation: Operation, answers: _Answers) -> dict[int, Schema]:
    plain: Schema = {TEXT: {"type": "string"}}
    error: Schema = {"application/json": answers.error(operation.path)}
    refusals = {status: _response(status, plain) for status in (400, 413, 415)}
    refusals[422] = _response(422, plain | error)
    if operation.is_generating:
        refusals |= {status: _response(status, error) for status in (424, 429, 500)}
    return refusals


def _response(status: int, content: dict[str, Schema]) -> Schema:
    response: Schema = {"description": _WORDS[status]}
    if content:
        response["content"] = {media: {"schema": schema} for media, schema in content.items()}
    return response
