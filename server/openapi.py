"""The renderer of the API's description, OpenAPI 3.1: routes' operations in, a document out, made once at start.

It knows no route: types of bodies and answers come with the operations. The document tells how requests are read
without `--strict-tgi`; with it, the fields that TGI does not know are ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import pydantic
from pydantic.json_schema import models_json_schema

from server.answers.json import VERSION
from server.answers.openai import TgiStreamErrorBody
from server.config import ServerConfig
from server.errors import AnthropicErrorBody, ErrorBody, OpenAIErrorBody, error_type
from server.operation import Operation, described_path, path_parameters
from server.requests.dialects import limits_of
from server.requests.messages import OpenAIModel
from server.requests.rows import Dialect
from server.requests.serde import WireModel, spellings_of

REF = "#/components/schemas/{}"
TEXT = "text/plain; charset=utf-8"

Schema = dict[str, Any]

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
    "x-schema-left-open": ("string", "Places of the request's schemas that the model is not held to, if there are any"),
}
"""Name -> type and description. Which of them an answer has depends on the route and on whether it streams."""

_STATUS_TEXTS = {
    200: "Success",
    303: "See there",
    400: "Not JSON; on OpenAI's routes any request that cannot be answered",
    401: "API key absent or wrong",
    404: "No such model or file",
    408: "The body comes too slowly",
    413: "The body is too large",
    415: "The body is not announced as JSON",
    422: "The request cannot be answered: of the wrong shape (in plain text), or not acceptable; on OpenAI's routes "
    "400, except with `--strict-tgi`",
    424: "Generation failed",
    429: "The model is overloaded",
    500: "The answer is incomplete, or the server has failed",
    503: "Unhealthy",
}


@functools.cache
def build_openapi(operations: tuple[Operation, ...], config: ServerConfig) -> Schema:
    """The document, to be read only: it takes 50 ms, and tests make many applications with the same configuration."""
    components = _request_components(operations, config)
    answers = _Answers(operations, config)
    assert components.keys().isdisjoint(answers.components), "a body and an answer have the same name"
    paths: dict[str, Schema] = {}
    for operation in operations:
        methods = paths.setdefault(described_path(operation.path), {})
        methods[operation.method.lower()] = _operation(operation, answers)
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

    def __init__(self, operations: Iterable[Operation], config: ServerConfig) -> None:
        self.is_strict = config.is_strict_tgi
        self.has_key = config.api_key is not None
        types: list[Any] = [ErrorBody, OpenAIErrorBody, AnthropicErrorBody, TgiStreamErrorBody]
        for operation in operations:
            types += (*operation.answers, *operation.events)
        schemas, components = msgspec.json.schema_components(types, ref_template=REF.format("{name}"))
        self._schemas = dict(zip(map(str, types), schemas, strict=True))
        self.components = {name: _tidied(schema) for name, schema in components.items()}

    def of(self, *types: Any) -> Schema:
        schemas = [self._schemas[str(type_)] for type_ in types]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    def has_plain_refusals(self, path: str) -> bool:
        return error_type(path, is_strict=self.is_strict) is ErrorBody

    def error(self, path: str) -> Schema:
        return self.of(error_type(path, is_strict=self.is_strict))

    def event(self, operation: Operation) -> Schema:
        """An error that comes late is an event as well."""
        late_errors = [self._late_error(error) for error in operation.late_errors]
        return self.of(*operation.events, *late_errors)

    def _late_error(self, error: type[msgspec.Struct]) -> type[msgspec.Struct]:
        return TgiStreamErrorBody if error is OpenAIErrorBody and self.is_strict else error


def _request_components(operations: Iterable[Operation], config: ServerConfig) -> dict[str, Schema]:
    """The schemas of what the server reads, with the limits of single values."""
    bodies = {operation.body for operation in operations if operation.body is not None}
    components = _body_components(sorted(bodies, key=lambda body: body.__name__))
    for dialect in Dialect:
        limits, properties = limits_of(dialect, config), components.get(dialect.value, {}).get("properties", {})
        for field in limits.keys() & properties.keys():
            properties[field] = _limited(properties[field], limits[field])
    return components


def _body_components(bodies: Iterable[type[pydantic.BaseModel]]) -> dict[str, Schema]:
    pairs = [(body, "validation") for body in bodies]
    _, document = models_json_schema(pairs, ref_template=REF.format("{model}"))  # type: ignore[arg-type]
    models = {model.__name__: model for model in _subclasses(WireModel)}
    components = {}
    for name, schema in document.get("$defs", {}).items():
        schema = _tidied(schema)
        components[name] = _as_read(models[name], schema) if name in models else schema
    return components


def _subclasses(model: type[WireModel]) -> Iterator[type[WireModel]]:
    for child in model.__subclasses__():
        yield child
        yield from _subclasses(child)


def _tidied(schema: Schema) -> Schema:
    """The schema without titles, which only repeat the names."""
    tidied = {key: value for key, value in schema.items() if key != "title"}
    if "properties" in tidied:
        tidied["properties"] = {
            name: {key: value for key, value in field.items() if key != "title"}
            for name, field in tidied["properties"].items()
        }
    return tidied


def _as_read(model: type[WireModel], schema: Schema) -> Schema:
    """Add what pydantic does not know of a WireModel: other spellings of a field, and null as the default."""
    properties, required = schema["properties"], schema.get("required", [])
    for _, (first, *others) in spellings_of(model):
        if first not in properties:  # made of other fields
            continue
        if issubclass(model, OpenAIModel) and first not in required:
            properties[first] = _or_null(properties[first])
        for other in others:
            properties[other] = properties[first]
            if not issubclass(model, OpenAIModel):
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
        is_empty = status == 404 and answers.has_plain_refusals(operation.path)
        responses[status] = _response(status, {} if is_empty else {"application/json": answers.error(operation.path)})
    if names := path_parameters(operation.path):
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.body is not None:
        reference = {"$ref": REF.format(operation.body.__name__)}
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
        responses |= _refusals(operation, answers)
    if operation.is_protected(is_strict=answers.is_strict):
        described["security"] = [{"key": []}] if answers.has_key else [{}, {"key": []}]
        is_empty = answers.has_plain_refusals(operation.path)
        responses[401] = _response(401, {} if is_empty else {"application/json": answers.error(operation.path)})
    return described | {"responses": {str(status): response for status, response in sorted(responses.items())}}


def _operation_id(operation: Operation) -> str:
    words = described_path(operation.path).replace("{", "").replace("}", "").replace("/", " ").replace(".", " ").split()
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
    if operation.has_headers:
        response["headers"] = {
            name: {"description": words, "schema": {"type": kind}}
            for name, (kind, words) in _HEADERS.items()
            if operation.events or name != "x-accel-buffering"
        }
    return response


def _refusals(operation: Operation, answers: _Answers) -> dict[int, Schema]:
    plain: Schema = {TEXT: {"type": "string"}}
    error: Schema = {"application/json": answers.error(operation.path)}
    refused = plain if answers.has_plain_refusals(operation.path) else error
    refusals = {status: _response(status, refused) for status in (400, 408, 413, 415)}
    refusals |= {422: _response(422, plain | error), 429: _response(429, error)}
    if operation.is_generating:
        refusals |= {status: _response(status, error) for status in (424, 500)}
    return refusals


def _response(status: int, content: dict[str, Schema]) -> Schema:
    response: Schema = {"description": _STATUS_TEXTS[status]}
    if content:
        response["content"] = {media: {"schema": schema} for media, schema in content.items()}
    return response
