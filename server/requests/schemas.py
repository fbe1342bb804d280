"""JSON schemas as clients send them: read off the wire, and made ready for llguidance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from server.errors import ValidationError
from server.requests.values import GrammarSpec

MAX_GRAMMAR_CHARS = 1 << 18
TOO_LONG = f"it is longer than {MAX_GRAMMAR_CHARS} characters"

_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "additionalItems")
_INTERSECTING = ("allOf", "anyOf", "oneOf", "$ref")


def read_schema(grammar: GrammarSpec, *, is_strict: bool) -> dict[str, Any]:
    """The schema that a grammar of the wire holds. Raises ValidationError."""
    value = grammar.value
    if grammar.type == "json_schema":
        if not isinstance(value, dict) or "schema" not in value:
            raise ValidationError("grammar is not valid: missing field `schema`")
        value = value["schema"]
    if grammar.type == "json_object" and value is None and not is_strict:  # OpenAI's JSON mode
        return {"type": "object"}
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise ValidationError("grammar is not supported")  # text 21
    if len(value) > MAX_GRAMMAR_CHARS:
        raise ValidationError(f"cannot compile regex from schema: {TOO_LONG}")
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"grammar is not valid: {error}", logged="grammar is not valid") from error  # text 22
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValidationError("grammar is not valid: a schema that can be followed is an object or `true`")  # text 22
    return schema


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with no other keys than the declared ones, wherever it says nothing of others, as in TGI.

    A model would otherwise be free to add any. Where objects are intersected, all would refuse each other's keys, so
    such a schema stays as it is.
    """
    try:
        if not any(_is_intersecting(part) for part in _walk(schema)):
            schema = json.loads(json.dumps(schema))
            for part in _walk(schema):
                if "properties" in part:
                    part.setdefault("additionalProperties", False)
    except RecursionError:
        raise ValidationError("grammar is not valid: it is nested too deeply") from None
    return schema


def _is_intersecting(part: dict[str, Any]) -> bool:
    members = part.get("allOf")
    is_refined = "properties" in part and any(key in part for key in _INTERSECTING)
    return is_refined or (isinstance(members, list) and len(members) > 1)


def _walk(schema: Any) -> Iterator[dict[str, Any]]:
    """The schema and every schema within it; constants and examples are not schemas."""
    stack = [schema]
    while stack:
        part = stack.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for key, value in part.items():
            if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
                stack += value.values()
            elif key in _SCHEMA_LISTS and isinstance(value, list):
                stack += value
            elif key in _SCHEMAS:
                stack.append(value)
