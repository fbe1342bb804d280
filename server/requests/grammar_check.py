"""`python -m server.requests.grammar_check`: compiles grammars to say what is wrong with them, a line of JSON for each.

A process of its own, because a schema can be made for which llguidance takes days, or all memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import quote

import msgspec

from engine.link.config import MAX_LEXER_STATES
from server.piped_process import prepare_child
from server.schemas.closing import closed
from server.schemas.opening import Opening
from server.schemas.repair import repaired

MAX_MEMORY = 1 << 30
"""Address space of this process, in bytes. The process ends when it needs more."""

TOO_DEEP = "it is nested too deeply"
REPAIR_S = 2.0
"""Seconds to find out what llguidance refuses in a schema; after that all of it is left open."""

JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
"""White space is as `json.dumps` writes it, which Qwen2.5's tool calls have, too. TGI lets the model choose between one
space and none at each place: this is among its choices, and speculation knows what comes. `oneOf` is `anyOf`, as in
TGI."""


Mode = Literal["open", "strict", "tgi"]
"""What happens to a schema that says more than a model can be held to: that part is left open, the schema is refused,
or, as in TGI, keywords that are not known are ignored and the rest is refused."""


class HeldSchema(msgspec.Struct, frozen=True, omit_defaults=True):
    """A schema as it was sent."""

    schema: dict[str, Any]
    mode: Mode = "open"
    name: str = ""
    """The function whose arguments it describes, if it does."""


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """A thing to compile: a regular expression, or schemas.

    Several schemas are parts of a grammar of llguidance's own, which calls them `schema_0`, `schema_1`, ...
    """

    regex: str | None = None
    lark: str | None = None
    schemas: tuple[HeldSchema, ...] = ()


class Checked(msgspec.Struct, frozen=True, omit_defaults=True):
    """The grammar that the engine reads, or the error."""

    grammar: str = ""
    error: str | None = None
    left_open: tuple[str, ...] = ()
    """Places of the schemas that the model is not held to."""


Prepared = tuple[Any, list[str]]
"""A schema as llguidance gets it, and the places that are left open in it."""


def check(request: Check) -> Checked:
    if request.regex is not None:
        from llguidance import LLMatcher

        return _compiled(LLMatcher.grammar_from_regex(request.regex))
    prepared = [_prepared(held) for held in request.schemas]
    checked = _checked(request, prepared)
    if checked.error is not None and any(held.mode == "open" for held in request.schemas):
        prepared = [_repaired(*pair) for pair in zip(request.schemas, prepared, strict=True)]
        checked = _checked(request, prepared)
    return checked


def _checked(request: Check, prepared: Sequence[Prepared]) -> Checked:
    pairs = list(zip(request.schemas, prepared, strict=True))
    left_open = tuple(quote(held.name) + place for held, (_, places) in pairs for place in places)
    if request.lark is None:
        (held, (schema, _)) = pairs[0]
        return _compiled(_grammar_of(schema, held.mode), left_open)
    from llguidance import LLMatcher

    rules = [request.lark]
    for index, (held, (schema, _)) in enumerate(pairs):
        options = {"x-guidance": _options(held.mode)}
        rules.append(f"schema_{index}: %json {json.dumps(closed(schema) | options, ensure_ascii=False)}")
    return _compiled(LLMatcher.grammar_from_lark("\n".join(rules)), left_open)


def _prepared(held: HeldSchema) -> Prepared:
    # x-guidance are options of llguidance's own, and not part of a schema.
    schema = {key: value for key, value in held.schema.items() if key != "x-guidance"}
    if held.mode != "open":
        return schema, []
    opening = Opening(schema, is_object=bool(held.name))
    opened = opening.opened()
    return (opened, opening.left_open) if isinstance(opened, dict) else ({}, ["#"])  # nothing would be allowed


def _repaired(held: HeldSchema, prepared: Prepared) -> Prepared:
    schema, places = prepared
    if held.mode != "open":
        return prepared
    deadline = time.monotonic() + REPAIR_S

    def fits(attempt: Any) -> bool:
        if time.monotonic() > deadline:
            raise TimeoutError
        return not _error(_grammar_of(attempt, held.mode))

    try:
        schema, more = repaired(schema, fits)
    except TimeoutError:
        schema, more = {"type": "object"} if held.name else {}, ["#"]
    return schema, places + more


def _grammar_of(schema: dict[str, Any], mode: Mode) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(closed(schema), overrides=_options(mode))


def _options(mode: Mode) -> Any:
    return JSON_OPTIONS | {"lenient": mode != "strict"}


def _compiled(grammar: str, left_open: tuple[str, ...] = ()) -> Checked:
    error = _error(grammar)
    return Checked(error=error) if error else Checked(grammar, left_open=left_open)


def _error(grammar: str) -> str:
    from llguidance import LLMatcher, LLParserLimits

    return LLMatcher.validate_grammar(grammar, limits=LLParserLimits(max_lexer_states=MAX_LEXER_STATES))


def main() -> None:
    prepare_child(MAX_MEMORY)
    for line in sys.stdin.buffer:
        try:
            checked = check(msgspec.json.decode(line, type=Check))
        except RecursionError:
            checked = Checked(error=TOO_DEEP)
        except ValueError as error:
            checked = Checked(error=str(error))
        sys.stdout.buffer.write(msgspec.json.encode(checked) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
