"""Grammars on the wire: accepted in both modes, or refused with TGI's texts (`docs/wire.md`, 2.2 and 3.7)."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from server.errors import ValidationError
from server.requests.grammar import GrammarCompiler
from server.requests.grammar_pool import PoolLimits
from server.requests.schemas import MAX_GRAMMAR_CHARS
from server.requests.values import GrammarSpec
from server.schemas.closing import closed

TOKENIZER = LLTokenizer("byte")
POINT: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}}
ENDLESS: dict[str, Any] = {
    "allOf": [{"type": "string", "pattern": f"(.*a{{{count}}}.*b.*){{3}}"} for count in range(30)]
}
"""llguidance takes twice as long for every further pattern."""


COMPILER = GrammarCompiler()


@pytest.fixture(scope="module", autouse=True)
def compiler() -> Iterator[GrammarCompiler]:
    """The compiler of every test in this file."""
    yield COMPILER
    COMPILER.close()


async def compiled(kind: str, value: Any, *, is_strict: bool = False) -> str:
    return (await COMPILER.compile(GrammarSpec(kind, value), is_strict=is_strict)).grammar  # type: ignore[arg-type]


async def refusal(kind: str, value: Any, *, is_strict: bool = False) -> str:
    with pytest.raises(ValidationError) as caught:
        await compiled(kind, value, is_strict=is_strict)
    return str(caught.value)


def is_accepted(grammar: str, text: str) -> bool:
    """Whether `text` is a whole output under `grammar`."""
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0)
    token_ids = list(text.encode())
    return (
        matcher.validate_tokens(token_ids) == len(token_ids)
        and matcher.consume_tokens(token_ids)
        and (matcher.is_accepting())
    )


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("json", {**POINT, "required": ["x"]}, '{"x": 1, "y": 2}', '{"y": 2}'),
        ("json", json.dumps(POINT), '{"y": -3}', '{"y": "a"}'),
        ("json_object", POINT, '{"x": 1}', "1"),
        ("json_schema", {"schema": POINT, "name": "point", "strict": True}, '{"x": 1}', "1"),
        ("json_schema", {"schema": json.dumps(POINT)}, '{"x": 1}', "1"),
        ("regex", "a+b/\\d", "aab/7", "aab/7 "),
        ("regex", "^grün$", "grün", "grun"),
    ],
)
@pytest.mark.parametrize("is_strict", [False, True])
async def test_every_form_is_read(kind: str, value: Any, good: str, bad: str, is_strict: bool) -> None:
    grammar = await compiled(kind, value, is_strict=is_strict)
    assert is_accepted(grammar, good) and not is_accepted(grammar, bad)


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("json", {"type": "array", "items": {"type": "integer"}}, "[1, 2]", "1"),
        ("json", {"enum": ["grün", 1, None]}, '"grün"', '"red"'),
        ("json", "true", '{"anything": ["at", "all"]}', "nothing"),
        ("json", {}, '"text"', "nothing"),
        ("json_object", None, '{"anything": {"at": ["all"]}}', '"text"'),
    ],
)
async def test_a_schema_needs_properties_in_strict_mode_only(kind: str, value: Any, good: str, bad: str) -> None:
    grammar = await compiled(kind, value)
    assert is_accepted(grammar, good) and not is_accepted(grammar, bad)
    text = await refusal(kind, value, is_strict=True)
    row_21, row_23 = "grammar is not supported", "grammar is not valid: Grammar must have a 'properties' field"
    assert text == (row_21 if value is None else row_23)


@pytest.mark.parametrize("value", [None, 3, True, [POINT]])
@pytest.mark.parametrize("is_strict", [False, True])
async def test_neither_object_nor_string(value: Any, is_strict: bool) -> None:
    assert await refusal("json", value, is_strict=is_strict) == "grammar is not supported"
    assert await refusal("json_schema", {"schema": value}, is_strict=is_strict) == "grammar is not supported"


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("json", "{not json", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("json", "[" * 100_000, "maximum recursion depth exceeded while decoding a JSON array from a unicode string"),
        ("json", "[1]", "a schema that can be followed is an object or `true`"),
        ("json", "false", "a schema that can be followed is an object or `true`"),
        ("json_schema", {"name": "nothing"}, "missing field `schema`"),
        ("json_schema", 3, "missing field `schema`"),
        ("regex", 3, "a regex is a string"),
    ],
)
@pytest.mark.parametrize("is_strict", [False, True])
async def test_what_is_no_schema(kind: str, value: Any, reason: str, is_strict: bool) -> None:
    assert await refusal(kind, value, is_strict=is_strict) == f"grammar is not valid: {reason}"


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "foo", "properties": {}}, "Invalid type: foo"),
        ({"properties": 3}, "properties must be an object"),
        ({"properties": {"a": {"minLength": "b"}}}, "Expected positive integer for 'minLength', got \"b\""),
        ({"properties": {}, "required": "a"}, "Expected array for 'required', got \"a\""),
        ({"properties": {}, "additionalProperties": 3}, "schema must be an object or boolean"),
    ],
)
async def test_a_schema_that_is_wrong_is_refused_where_nothing_may_be_left_open(schema: Any, reason: str) -> None:
    assert await refusal("json", schema, is_strict=True) == f"grammar is not valid: {reason}"
    assert await refusal("json_schema", {"schema": schema, "strict": True}) == f"grammar is not valid: {reason}"
    assert await compiled("json", schema) and await compiled("json_schema", {"schema": schema, "strict": False})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"type": "string", "pattern": "("}, "regex parse error:\n    (\n    ^\nerror: unclosed group"),
        ({"$ref": "#/nowhere"}, "Pointer '/nowhere' does not exist"),
        ({"$ref": "https://example.com/schema"}, "Resource 'https://example.com/schema' is not present in a registry"),
        (
            {"type": "integer", "minimum": 5, "maximum": 3},
            "Unsatisfiable schema: required property 'a' is unsatisfiable",
        ),
    ],
)
async def test_what_cannot_be_compiled(changes: dict[str, Any], reason: str) -> None:
    schema = {"type": "object", "properties": {"a": changes}, "required": ["a"]}
    for text in (
        await refusal("json", schema, is_strict=True),
        await refusal("json_schema", {"schema": schema, "strict": True}),
    ):
        assert text.startswith(f"cannot compile regex from schema: {reason}")
    assert await compiled("json", schema), "what is wrong is left open"


@pytest.mark.parametrize("is_strict", [False, True])
async def test_half_a_character_is_no_json(is_strict: bool) -> None:
    text = await refusal("json", {"properties": {"a": {"enum": ["\ud800"]}}}, is_strict=is_strict)
    reason = "JSON is malformed: unexpected end of escaped utf-16 surrogate pair"
    assert text.startswith(f"cannot compile regex from schema: {reason}")


async def test_keywords_that_cannot_be_held_to_are_refused_or_ignored() -> None:
    properties = {"a": {"type": "array", "uniqueItems": True}, "b": {"type": "string", "format": "zip"}}
    for name, reason in {"a": 'Unimplemented keys: ["uniqueItems"]', "b": "Unknown format: zip"}.items():
        value = {"schema": {"type": "object", "properties": {name: properties[name]}}, "strict": True}
        assert await refusal("json_schema", value) == f"cannot compile regex from schema: {reason}"
    for is_strict in (False, True):
        grammar = await compiled("json", {"type": "object", "properties": properties}, is_strict=is_strict)
        assert is_accepted(grammar, '{"a": [1, 1], "b": "no zip"}')


async def test_a_regex_that_is_none() -> None:
    text = await refusal("regex", "(a")
    assert text.startswith("grammar is not valid: ") and "unclosed group" in text
    assert len(await refusal("regex", "(" * 100_000)) < 600


async def test_white_space_is_that_of_json_dumps() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"enum": [1, {"k": [2]}]}}}}
    # Also where the schema brings options of llguidance's own.
    for extra in ({}, {"x-guidance": {"whitespace_pattern": "[ \\n]*", "item_separator": ","}}):
        grammar = await compiled("json", {**schema, **extra})
        assert is_accepted(grammar, json.dumps({"a": [1, {"k": [2]}, 1]}))
        for text in ('{"a":[1]}', '{"a": [1,1]}', '{ "a": [1]}', '{"a":  [1]}', '{"a": [1]} ', '\n{"a": [1]}'):
            assert not is_accepted(grammar, text), text


CLOSED = {
    "plain": (POINT, '{"x": 1}', '{"z": 1}'),
    "nested": ({"items": {"anyOf": [POINT]}, "type": "array"}, '[{"x": 1}]', '[{"z": 1}]'),
    "by reference": ({"$ref": "#/$defs/p", "$defs": {"p": POINT}}, '{"x": 1}', '{"z": 1}'),
    "a property of that name": ({"type": "object", "properties": {"properties": POINT}}, "{}", '{"z": 1}'),
}
OPEN = {
    "said so": ({**POINT, "additionalProperties": True}, '{"x": 1, "z": 1}'),
    "no properties": ({"type": "object"}, '{"z": 1}'),
    "intersected": (
        {"allOf": [{**POINT, "required": ["x"]}, {"properties": {"z": {"const": 5}}, "required": ["z"]}]},
        '{"x": 1, "z": 5}',
    ),
    "refined": ({**POINT, "anyOf": [{"properties": {"z": {"const": 5}}, "required": ["z"]}]}, '{"z": 5}'),
    "a constant": ({"const": {"properties": {"z": 1}}}, '{"properties": {"z": 1}}'),
}


@pytest.mark.parametrize(("schema", "good", "bad"), CLOSED.values(), ids=CLOSED)
async def test_declared_objects_have_no_other_keys(schema: dict[str, Any], good: str, bad: str) -> None:
    before = json.dumps(schema)
    grammar = await compiled("json", schema)
    assert is_accepted(grammar, good) and not is_accepted(grammar, bad)
    assert json.dumps(schema) == before


@pytest.mark.parametrize(("schema", "good"), OPEN.values(), ids=OPEN)
async def test_other_objects_stay_open(schema: dict[str, Any], good: str) -> None:
    assert is_accepted(await compiled("json", schema), good)


def running_child(compiler: GrammarCompiler) -> subprocess.Popen[bytes]:
    child = compiler.pool.processes[0].child
    assert child is not None and child.poll() is None
    return child


async def test_a_schema_that_takes_for_ever_is_refused_and_the_next_is_not(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    await compiled("json", {"type": "integer"})
    process = running_child(compiler)
    monkeypatch.setattr(compiler.pool, "limits", PoolLimits(timeout_s=0.3))
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    for _ in range(2):
        assert await refusal("json", ENDLESS) == "cannot compile regex from schema: it is too complex"
    ticking.cancel()
    assert 5 < ticks < 60, "the event loop goes on, and the second time the answer is known"
    assert process.poll() is not None
    monkeypatch.undo()
    await compiled("json", {"type": "string"})


async def test_what_takes_long_only_where_the_lexer_is_built_is_refused_too(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler.pool, "limits", PoolLimits(timeout_s=0.5))
    multiples = [{"type": "integer", "multipleOf": factor} for factor in (101, 103, 107, 109, 113, 127, 131, 137)]
    assert (await refusal("json", {"anyOf": multiples})).endswith(": it is too complex")
    assert (await refusal("regex", ".?" * 20_000)).endswith(": it is too complex")


async def test_an_easy_grammar_is_answered_while_hard_ones_wait(compiler: GrammarCompiler) -> None:
    hard = [asyncio.create_task(compiled("json", {**ENDLESS, "title": str(index)})) for index in range(6)]
    await asyncio.sleep(0.5)
    for index in range(5):
        await asyncio.wait_for(compiled("json", {"type": "string", "title": str(index)}), 3.0)
    assert not any(task.done() for task in hard)
    for task in hard:
        task.cancel()
    await asyncio.wait(hard)


async def test_a_process_that_has_died_is_started_anew(compiler: GrammarCompiler) -> None:
    await compiled("json", {"type": "boolean"})
    process = running_child(compiler)
    process.kill()
    process.wait()
    await compiled("json", {"type": "null", "title": "new"})


async def test_long_and_deep_grammars_are_refused() -> None:
    started = time.monotonic()
    long = f"cannot compile regex from schema: it is longer than {MAX_GRAMMAR_CHARS} characters"
    assert await refusal("json", {"properties": {}, "title": "x" * MAX_GRAMMAR_CHARS}) == long
    assert await refusal("json", '{"properties":{"a":' * 100_000) == long, "it is not even parsed"
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(5_000):
        deep = {"items": deep}
    assert await refusal("json", deep) == "grammar is not valid: it is nested too deeply"
    assert time.monotonic() - started < 5.0


def test_many_nested_schemas_are_walked_once_each() -> None:
    """A generator within a generator for each level would take a hundred times as long."""
    nested: dict[str, Any] = {}
    for _ in range(200):
        nested = {"properties": {"a": nested}}
    num_calls = 0

    def count(_: FrameType, event: str, __: Any) -> None:
        nonlocal num_calls
        num_calls += event == "call"

    sys.setprofile(count)
    try:
        whole = closed({"prefixItems": [nested] * 100})
    finally:
        sys.setprofile(None)
    assert num_calls < 30 * 100 * 200, "18 calls for each part"
    assert whole["prefixItems"][49]["properties"]["a"]["additionalProperties"] is False


def test_the_checking_process_ends_with_its_input_and_refuses_what_it_cannot_read() -> None:
    command = [sys.executable, "-P", "-m", "server.requests.grammar_check"]
    done = subprocess.run(command, input=b'0 {"regex":"a"}\n0 rubbish\n', capture_output=True, check=True, timeout=60)
    ready, *answers = (json.loads(line) for line in done.stdout.splitlines())
    assert ready == {} and all(isinstance(number, int) for number in answers[::2])
    first, second = answers[1::2]
    assert list(first) == ["grammar"] and re.match("JSON is malformed", second["error"])
