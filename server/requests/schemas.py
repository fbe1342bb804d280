"""JSON schemas on the wire: where a request has them, and how far the model is to be held to them."""

from __future__ import annotations

import json
from typing import Any

from server.errors import ValidationError
from server.requests.grammar_check import HeldSchema
from server.requests.values import GrammarSpec

MAX_GRAMMAR_CHARS = 1 << 18
TOO_LONG = f"it is longer than {MAX_GRAMMAR_CHARS} characters"


def read_schema(grammar: GrammarSpec, *, is_strict: bool) -> HeldSchema:
    """The schema that a grammar of the wire holds. Raises ValidationError."""
    value = grammar.value
    is_refused = False
    if grammar.type == "json_schema":
        if not isinstance(value, dict) or "schema" not in value:
            raise ValidationError("grammar is not valid: missing field `schema`")
        is_refused = value.get("strict") is True
        value = value["schema"]
    if grammar.type == "json_object" and value is None and not is_strict:  # OpenAI's JSON mode
        value = {"type": "object"}
    schema = value if isinstance(value, dict) else _parsed(value)
    return HeldSchema(schema, "tgi" if is_strict else "strict" if is_refused else "open")


def _parsed(value: Any) -> dict[str, Any]:
    """The schema that stands in a text. Raises ValidationError."""
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
