"""`python -m server.requests.grammar_check`: compiles grammars to say what is wrong with them, a line of JSON for each.

A process of its own, because a schema can be made for which llguidance takes days, or all memory.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from engine.link.config import MAX_LEXER_STATES
from server.piped_process import prepare_child

MAX_MEMORY = 1 << 30
"""Address space of this process, in bytes. The process ends when it needs more."""

JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
"""White space is as `json.dumps` writes it, which Qwen2.5's tool calls have, too. TGI lets the model choose between one
space and none at each place: this is among its choices, and speculation knows what comes. `oneOf` is `anyOf`, as in
TGI."""


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """A thing to compile: a regular expression, a grammar of llguidance's own, or else a schema."""

    regex: str | None = None
    lark: str | None = None
    schema: dict[str, Any] | None = None
    is_lenient: bool = False
    """Ignore keywords that llguidance does not know."""


class Checked(msgspec.Struct, frozen=True, omit_defaults=True):
    """The grammar that the engine reads, or the error."""

    grammar: str = ""
    error: str | None = None


def check(request: Check) -> Checked:
    from llguidance import LLMatcher, LLParserLimits

    if request.regex is not None:
        grammar = LLMatcher.grammar_from_regex(request.regex)
    elif request.lark is not None:
        grammar = LLMatcher.grammar_from_lark(request.lark)
    else:
        # x-guidance are options of llguidance's own, and not part of a schema.
        schema = {key: value for key, value in (request.schema or {}).items() if key != "x-guidance"}
        overrides: Any = {**JSON_OPTIONS, "lenient": request.is_lenient}
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=overrides)
    error = LLMatcher.validate_grammar(grammar, limits=LLParserLimits(max_lexer_states=MAX_LEXER_STATES))
    return Checked(error=error) if error else Checked(grammar)


def main() -> None:
    prepare_child(MAX_MEMORY)
    for line in sys.stdin.buffer:
        try:
            checked = check(msgspec.json.decode(line, type=Check))
        except (ValueError, RecursionError) as error:
            checked = Checked(error=str(error))
        sys.stdout.buffer.write(msgspec.json.encode(checked) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
