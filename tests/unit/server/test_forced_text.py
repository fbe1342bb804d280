"""How much text a grammar can force: the bound is never too small, and grammars of everyday stay as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from engine.link.config import MAX_FORCED_CHARS
from server.requests import grammar_check
from server.requests.forced_text import forced_chars, unforced
from server.requests.grammar_check import JSON_OPTIONS

TOKENIZER = LLTokenizer("byte")
TEXT = "the quick brown fox jumps, "
ALL = [f"k{index}" for index in range(300)]


def grammar_of(value: str | dict[str, Any]) -> str:
    if isinstance(value, str):
        return LLMatcher.grammar_from_regex(value)
    return LLMatcher.grammar_from_json_schema(value, overrides=JSON_OPTIONS)  # type: ignore[arg-type]


def record(value: dict[str, Any], names: list[str] = ALL) -> dict[str, Any]:
    return {"type": "object", "properties": dict.fromkeys(names, value), "required": names}


LONG: dict[str, tuple[str, str | dict[str, Any]]] = {
    "a literal": ("", TEXT * 600),
    "a count": ("", "a{20000}"),
    "a count of a group": ("", "(abc){5000}"),
    "nested counts": ("", "((ab{10}){40}){40}"),
    "a count of a count": ("", "(?:(?:a{100}){200})"),
    "a count that is spelled apart": ("", "(?x)(abc)  {5000}"),
    "behind a choice": ("y", "x|y(abc){5000}"),
    "a constant": ("", {"const": TEXT * 600}),
    "a value of two": ('"a', {"enum": ["a" + TEXT * 600, "b"]}),
    "a list that is constant": ("", {"const": [1] * 4000}),
    "an object that is constant": ("", {"const": dict.fromkeys((f"k{index}" for index in range(2000)), 1)}),
    "items": ("", {"type": "array", "items": {"const": 1}, "minItems": 4000}),
    "items of items": (
        "",
        {
            "type": "array",
            "minItems": 70,
            "items": {"type": "array", "minItems": 70, "maxItems": 70, "items": {"const": 1}},
        },
    ),
    "items one by one": ("", {"type": "array", "prefixItems": [{"const": TEXT}] * 400, "minItems": 400}),
    "properties": ("", record({"const": TEXT})),
    "references": ("", {"$defs": {"a": {"const": TEXT}}, **record({"$ref": "#/$defs/a"})}),
    "a name": ("", record({"const": 1}, ["x" * 9000])),
    "a pattern and a length": ("", {"type": "string", "pattern": "^a*$", "minLength": 9000}),
    "only one alternative": ("", {"anyOf": [{"const": TEXT * 600}]}),
    "alternatives of which one cannot be": (
        "",
        {"type": "array", "minItems": 900, "items": {"anyOf": [{"const": TEXT}, {"type": "string", "enum": []}]}},
    ),
}
"""Kinds of grammars that force more than MAX_FORCED_CHARS, and the beginning of an output that is followed by it."""

EVERYDAY: dict[str, str | dict[str, Any]] = {
    "a short text": TEXT,
    "an identifier": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "a time": r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{3})?Z",
    "a number of letters": r"\p{L}{1,3000}",
    "a text of a few kilobytes": {"const": TEXT * 200},
    "5,000 values": {"enum": [f"value {index} of this enumeration" for index in range(5000)]},
    "300 properties": record({"type": "string"}),
    "2,000 properties": record({"type": "integer", "minimum": 0}, [f"name_{index}" for index in range(2000)]),
    "properties that may be null": record({"anyOf": [{"type": "string"}, {"type": "null"}]}),
    "choices": record({"enum": ["red", "green", "blue"]}),
    "bounds": record({"type": "string", "minLength": 1, "maxLength": 100_000, "format": "email"}),
    "lists": record({"type": "array", "items": {"type": "number"}, "minItems": 1000}, ["a", "b"]),
    "records by reference": {"$defs": {"a": record({"type": "number"}, ["x", "y"])}, **record({"$ref": "#/$defs/a"})},
    "a tree": {"type": "object", "properties": {"value": {}, "left": {"$ref": "#"}, "right": {"$ref": "#"}}},
    "64 KB": record(record({"type": "string", "description": TEXT * 4}, ALL[:20]), ALL[:25]),
}


@pytest.mark.parametrize(("begin", "value"), LONG.values(), ids=LONG)
def test_what_forces_long_texts_is_made_to_force_none(begin: str, value: str | dict[str, Any]) -> None:
    grammar = grammar_of(value)
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0)
    if begin:
        assert matcher.consume_tokens(list(begin.encode()))
    forced = matcher.compute_ff_bytes()
    assert 3000 < len(forced) <= forced_chars(grammar), "llguidance itself gives up after some thousands of items"
    assert forced_chars(grammar) > MAX_FORCED_CHARS
    free = LLMatcher(TOKENIZER, unforced(grammar), log_level=0)
    assert not free.is_error(), free.get_error()
    assert free.consume_tokens(list(begin.encode() + forced[:200])) and free.compute_ff_tokens() == []


@pytest.mark.parametrize("value", EVERYDAY.values(), ids=EVERYDAY)
def test_grammars_of_everyday_stay_as_they_are(value: str | dict[str, Any]) -> None:
    grammar = grammar_of(value)
    assert unforced(grammar) == grammar
    forced = LLMatcher(TOKENIZER, grammar, log_level=0).compute_ff_bytes()
    assert len(forced) <= forced_chars(grammar) <= MAX_FORCED_CHARS


def test_the_grammars_of_tools_are_measured_too() -> None:
    def lark(schema: dict[str, Any]) -> str:
        text = json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}})
        return f'start: body\nbody: "%json {{x" <[257]> %json {text} "}}"'

    short, long = (lark({"const": TEXT * count}) for count in (1, 600))
    assert unforced(short) == short and unforced(long) == '%llguidance {"no_forcing": true}\n' + long


KEPT = """
import sys
from server.requests import grammar_check
from server.requests.grammar_check import Check, Checker, HeldSchema

grammar_check.MAX_GRAMMAR_MEMORY = int(sys.argv[1])
print(Checker().check(Check(schemas=(HeldSchema({"type": "integer", "multipleOf": 86_400}, "strict"),))).error)
"""


@pytest.mark.parametrize(
    ("limit", "error"),
    [(grammar_check.MAX_GRAMMAR_MEMORY, None), (100_000, "it is too complex: it takes too much memory")],
)
def test_the_check_measures_what_the_engine_will_keep(limit: int, error: str | None) -> None:
    """The lexer for multiples takes time and memory only where it is built; to validate the schema is nothing.

    Each check has a process of its own, as it has in use: memory that another has freed would hide what it takes.
    """
    command = [sys.executable, "-c", KEPT, str(limit)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{error}\n"
