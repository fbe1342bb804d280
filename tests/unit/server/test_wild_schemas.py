"""Schemas as programs write them: what the model is held to, what is left open, and how that is told."""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from jsonschema.exceptions import SchemaError
from llguidance import LLMatcher, LLTokenizer

from server.requests.grammar_check import Check, Checked, Checker, HeldSchema, Mode
from server.schemas.opening import FORMATS, HELD, WITHOUT_EFFECT
from server.schemas.parts import MAX_NAMED_CHARS, named, pointer
from server.schemas.repair import repaired
from tests.unit.server.harness import FakeEngine
from tests.wild_schemas import DECIMAL, SCHEMAS

TOKENIZER = LLTokenizer("byte")
CHECKER = Checker()
MAX_DOCUMENT = 300


def checked(schema: Any, mode: Mode = "open", *, name: str = "") -> Checked:
    if not name:
        return CHECKER.check(Check(schemas=(HeldSchema(schema, mode),)))
    return CHECKER.check(Check(lark="start: schema_0", schemas=(HeldSchema(schema, mode, name),)))


def is_accepted(grammar: str, text: str) -> bool:
    matcher, token_ids = LLMatcher(TOKENIZER, grammar, log_level=0), list(text.encode())
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def written(grammar: str, seed: int) -> str | None:
    """A text under the grammar, byte by byte at random, with a liking for what closes; None if it does not end."""
    chance, matcher, text = random.Random(seed), LLMatcher(TOKENIZER, grammar, log_level=0), b""
    while len(text) < MAX_DOCUMENT:
        allowed = [byte for byte, bias in enumerate(matcher.compute_logit_bias()[:128]) if bias and byte >= 32]
        if matcher.is_accepting() and (not allowed or chance.random() < 0.5):
            return text.decode()
        closing = [byte for byte in allowed if byte in b'"}]']
        byte = chance.choice(closing if closing and chance.random() < 0.3 else allowed)
        assert matcher.consume_token(byte)
        text += bytes([byte])
    return None


def is_proper(schema: dict[str, Any]) -> bool:
    """Whether the schema is one by the rules of its draft, so that documents can be judged by it."""
    try:
        validator_of(schema).check_schema(schema)
    except SchemaError:
        return False
    return "nullable" not in json.dumps(schema)


def validator_of(schema: dict[str, Any]) -> Any:
    is_old = "draft-07" in schema.get("$schema", "")
    return jsonschema.Draft7Validator if is_old else jsonschema.Draft202012Validator


def test_there_are_many() -> None:
    assert len(SCHEMAS) >= 120
    proper = [name for name, schema in SCHEMAS.items() if is_proper(schema)]
    assert len(proper) > 100


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_schema_compiles_or_is_left_open(schema: dict[str, Any]) -> None:
    before = json.dumps(schema)
    answer = checked(schema)
    assert answer.error is None and json.dumps(schema) == before
    documents = [json.loads(text) for seed in range(2) if (text := written(answer.grammar, seed)) is not None]
    if not answer.left_open and is_proper(schema):
        for document in documents:
            validator_of(schema)(schema).validate(document)
    called = checked({"type": "object"} | schema, name="f")
    assert called.error is None and all(place.startswith("f#") for place in called.left_open)
    text = written(called.grammar, 0)
    assert text is None or isinstance(json.loads(text), dict)


JUNK: list[Any] = [None, 3, -1.5, 10**30, "", "str", "#", [], [None], [[]], {}, {"a": 1}, True, False, {"$ref": "#"}]


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything within `value`."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places_in(value[key], (*path, key))


def test_no_schema_is_refused_for_what_stands_in_it() -> None:
    """Junk at two places of a schema, or a keyword with junk at its top."""
    chance = random.Random(5)
    for _ in range(150):
        schema = json.loads(json.dumps(chance.choice([*SCHEMAS.values()])))
        schema[chance.choice([*HELD, "$ref", "nullable"])] = copy.deepcopy(chance.choice(JUNK))
        for _ in range(2):
            *path, last = chance.choice([*places_in(schema)])
            place = schema
            for key in path:
                place = place[key]
            place[last] = copy.deepcopy(chance.choice(JUNK))
        assert checked(schema).error is None, schema
        assert checked({"type": "object"} | schema, name="f").error is None, schema


def test_the_formats_of_the_table_are_those_that_llguidance_knows() -> None:
    for name in [*FORMATS, "path", "binary", "int32", "regex", "iri"]:
        error = checked({"type": "string", "format": name}, "strict").error
        assert (error is None) == (name in FORMATS)


@pytest.mark.parametrize(
    ("keyword", "value"), [(keyword, value) for keyword, values in WITHOUT_EFFECT.items() for value in values]
)
def test_a_keyword_that_asks_for_nothing_is_never_refused(keyword: str, value: Any) -> None:
    for part in ({"type": "array", keyword: value}, {"type": "object", "properties": {"a": {keyword: value}}}):
        assert checked(part, "strict").error is None
        assert checked(part, "strict", name="f").error is None
        assert checked(part).left_open == ()


EXAMPLES: dict[str, Any] = {
    "not": {"type": "null"},
    "dependencies": {"a": ["b"]},
    "dependentRequired": {"a": ["b"]},
    "$dynamicRef": "#",
    "$recursiveRef": "#",
}


@pytest.mark.parametrize("keyword", [key for key, is_held in HELD.items() if is_held is HELD["not"]])
def test_what_the_table_leaves_open_is_refused_by_llguidance(keyword: str) -> None:
    """So nothing is left open that could be held to."""
    value = EXAMPLES.get(keyword, {"type": "string", "minLength": 3})
    schema = {"type": "object", "properties": {"a": {}}, keyword: value}
    assert checked(schema, "strict").error is not None
    assert checked(schema).left_open == (f"#/{keyword}",)


A_STRING = {"type": "string"}
SPELLED: list[tuple[Any, list[str], list[str]]] = [
    ({"properties": {"a": A_STRING}}, ["{}", '{"a": "b"}'], ["1", '"a"', '{"c": 1}']),
    ({"type": "object", "properties": {"a": A_STRING}, "required": ["b"]}, ['{"b": [1]}'], ["{}", '{"c": 1}']),
    ({"type": "object", "properties": None, "required": None}, ["{}", '{"a": 1}'], ["1"]),
    ({"type": "object", "properties": {}}, ["{}", '{"a": {"b": 1}}'], ["[]"]),
    ({"type": "object", "properties": {}, "required": ["a"]}, ['{"a": 1}'], ["{}"]),
    ({"type": "object", "properties": {}, "additionalProperties": False}, ["{}"], ['{"a": 1}']),
    ({"type": "str"}, ['"a"'], ["1"]),
    ({"type": "STRING", "nullable": True}, ['"a"', "null"], ["1"]),
    ({"type": "typing.List[int]"}, ["[]", "[1, 2]"], ["1", '["a"]']),
    ({"type": "dict[str, list[int]]"}, ["{}", '{"a": [1]}'], ['{"a": 1}', '{"a": ["b"]}']),
    ({"type": "any", "description": "whatever"}, ["1", "null", '{"a": []}'], ["a"]),
    ({"type": "str | None"}, ['"a"', "null"], ["1"]),
    ({"type": ["int", "float", "NoneType", "bool"]}, ["1", "1.5", "null", "true"], ['"a"']),
    ({"type": "object", "properties": {"a": "int", "b": None}}, ['{"a": 1, "b": {}}'], ['{"a": "b"}']),
    ({"type": "object", "properties": {"a": {"type": "int", "required": True}}}, ['{"a": 1}'], ["{}"]),
    ({"minLength": 2}, ['"ab"'], ['"a"', "1"]),
    ({"items": {"type": "INTEGER"}, "minItems": "1"}, ["[1]"], ["[]", '["a"]', "1"]),
    ({"type": "string", "maxLength": 2.0}, ['"ab"'], ['"abc"']),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, ["4"], ["3"]),
    ({"type": "array", "items": [A_STRING, {"type": "int"}]}, ['["a", 1]'], ['[1, "a"]']),
    ({"$ref": "#/$defs/L[int]", "$defs": {"L[int]": {"type": "array"}}}, ["[]"], ["1"]),
    ({"$ref": "#/$defs/é", "$defs": {"é": {"type": "array"}}, "nullable": True}, ["[]", "null"], ["1"]),
    ({"enum": ["a"], "nullable": True}, ['"a"', "null"], ['"b"']),
    ({"const": "a", "nullable": True, "type": "string"}, ['"a"', "null"], ['"b"']),
    (
        {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": {"type": "int"}},
        ['{"a": 1}', "{}"],
        ['{"b": 1}', '{"a": "b"}'],
    ),
    (
        {"type": "object", "propertyNames": {"$ref": "#/$defs/N"}, "$defs": {"N": {"const": "a", "title": "N"}}},
        ['{"a": 1}'],
        ['{"b": 1}'],
    ),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, ['{"ab": 1}'], ['{"b": 1}']),
    ({"type": "object", "properties": {"a": {"not": {}}, "b": True}}, ['{"b": 1}', "{}"], ['{"a": 1}']),
    ({"type": "object", "properties": {"a": True}, "unevaluatedProperties": False}, ['{"a": 1}'], ['{"b": 1}']),
    ({"$schema": "https://example.com/dialect", "$id": "not a uri %%", "type": "null"}, ["null"], ["1"]),
    ({"type": "array", "uniqueItems": False}, ["[1, 1]"], ["1"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), SPELLED, ids=[json.dumps(row[0]) for row in SPELLED])
def test_every_spelling_has_its_meaning(schema: dict[str, Any], good: list[str], bad: list[str]) -> None:
    answer = checked(schema)
    assert answer.error is None and answer.left_open == ()
    assert [text for text in good if not is_accepted(answer.grammar, text)] == []
    assert [text for text in bad if is_accepted(answer.grammar, text)] == []


OPEN: list[tuple[Any, list[str], list[str], list[str]]] = [
    ({"type": "string", "pattern": DECIMAL, "maxLength": 2}, ["#/pattern"], ['"ab"'], ['"abc"']),
    ({"type": "string", "pattern": "^[^[]+$"}, ["#/pattern"], ['"[["'], ["1"]),
    ({"type": "string", "format": "path", "minLength": 2}, ["#/format"], ['"//"'], ['"/"']),
    ({"type": "array", "uniqueItems": True, "maxItems": 2}, ["#/uniqueItems"], ["[1, 1]"], ["[1, 1, 1]"]),
    (
        {
            "type": "object",
            "required": ["a"],
            "properties": {"a": {}},
            "additionalProperties": False,
            "minProperties": 9,
        },
        ["#/minProperties"],
        ['{"a": 1}'],
        ["{}"],
    ),
    (
        {"type": "object", "properties": {"a": A_STRING}, "required": ["b"], "additionalProperties": False},
        ["#/additionalProperties"],
        ['{"b": 1}'],
        ["{}", '{"c": 1, "b": 1}'],
    ),
    (
        {"type": "object", "patternProperties": {"(?!a)": {}, "^b": A_STRING}, "additionalProperties": False},
        ["#/patternProperties/%28%3F%21a%29"],
        ['{"c": 1}', '{"b": "a"}'],
        ['{"b": 1}'],
    ),
    ({"type": "foo", "minLength": 3}, ["#/type"], ["1"], ['"a"']),
    (
        {"type": "object", "properties": {"a": {"$ref": "https://example.com/a"}, "b": {"type": "int"}}},
        ["#/properties/a/$ref"],
        ['{"a": [], "b": 1}'],
        ['{"b": "c"}'],
    ),
    (
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/none", "type": "string"}}},
        ["#/properties/a/$ref"],
        ['{"a": "b"}'],
        ['{"a": 1}'],
    ),
    ({"$ref": "#"}, ["#/$ref"], ["1"], []),
    ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#"}}}, ["#/$ref", "#/$defs/A/$ref"], ["1"], []),
    ({"properties": 3, "required": "a", "type": "object"}, ["#/properties", "#/required"], ['{"a": 1}'], ["1"]),
    (
        {"type": "object", "properties": {"a": 3, "b": A_STRING}},
        ["#/properties/a"],
        ['{"a": 1, "b": "c"}'],
        ['{"b": 1}'],
    ),
    ({"type": "string", "minLength": "b", "maxLength": 1}, ["#/minLength"], ['"a"'], ['"ab"']),
    ({"type": "integer", "minimum": 5, "maximum": 3}, ["#/minimum"], ["3"], ["4"]),
    (
        {"type": "object", "properties": {"a": {"const": 1, "enum": [2]}, "b": A_STRING}, "required": ["a"]},
        ["#/properties/a/const"],
        ['{"a": 2, "b": "c"}'],
        ['{"a": 1}', '{"a": 2, "b": 1}'],
    ),
    (
        {"anyOf": [{"type": "string", "pattern": "("}, {"type": "integer"}]},
        ["#/anyOf/0/pattern"],
        ['"("', "1"],
        ["null"],
    ),
    (
        {"oneOf": [{"pattern": "("}, {"type": "integer"}, {"pattern": ")", "maxLength": 1}]},
        ["#/oneOf/0/pattern", "#/oneOf/2/pattern"],
        ['"("', "1"],
        ["null"],
    ),
    ({"type": "number", "multipleOf": 0, "maximum": 3}, ["#/multipleOf"], ["2"], ["4"]),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, ["#/allOf/1"], ['"a"'], ["1"]),
    (
        {"$ref": "#/$defs/A", "$defs": {"A": {"type": "array", "items": {"pattern": "("}}}},
        ["#/$defs/A/items/pattern"],
        ['["a"]'],
        ["1", "[1]"],
    ),
    (
        {"$defs": {"a": {"not": {}}}, "type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1},
        ["#/items/$ref"],
        ["[1]"],
        ["1", "[]"],
    ),
    ({"not": {}}, ["#"], ["1"], []),
]


@pytest.mark.parametrize(("schema", "places", "good", "bad"), OPEN, ids=[json.dumps(row[0]) for row in OPEN])
def test_a_part_is_left_open_and_the_rest_is_held_to(
    schema: dict[str, Any], places: list[str], good: list[str], bad: list[str]
) -> None:
    answer = checked(schema)
    assert answer.error is None and list(answer.left_open) == places
    assert [text for text in good if not is_accepted(answer.grammar, text)] == []
    assert [text for text in bad if is_accepted(answer.grammar, text)] == []


ARGUMENTS: list[tuple[Any, list[str], str, str]] = [
    ({"type": ["object", "null"], "properties": {"a": A_STRING}}, [], '{"a": "b"}', "null"),
    ({"type": "object", "properties": {}}, [], '{"a": 1}', "1"),
    ({"properties": {"a": {"type": "object", "properties": {}}}}, [], '{"a": {"b": 1}}', '{"a": 1}'),
    ({"type": "string"}, ["f#/type"], '{"a": 1}', '"a"'),
    ({"enum": ["a", "b"]}, ["f#/enum"], "{}", '"a"'),
    ({"enum": ["a", {"b": 1}]}, [], '{"b": 1}', "{}"),
    ({"const": "a"}, ["f#/const"], "{}", '"a"'),
    ({"anyOf": [{"properties": {"a": A_STRING}}, {"type": "null"}]}, [], '{"a": "b"}', "null"),
    ({"$ref": "#/$defs/A", "$defs": {"A": A_STRING}}, ["f#/$defs/A"], "{}", '"a"'),
    ({"type": "array", "items": A_STRING}, ["f#/type"], "{}", "[]"),
    ({"type": "OBJECT", "nullable": True, "properties": {"a": "str"}}, [], '{"a": "b"}', "null"),
]


@pytest.mark.parametrize(("schema", "places", "good", "bad"), ARGUMENTS, ids=[json.dumps(row[0]) for row in ARGUMENTS])
def test_arguments_are_an_object(schema: dict[str, Any], places: list[str], good: str, bad: str) -> None:
    answer = checked({"type": "object"} | schema, name="f")
    assert answer.error is None and list(answer.left_open) == places
    assert is_accepted(answer.grammar, good) and not is_accepted(answer.grammar, bad)


def test_repair_opens_the_whole_where_nothing_else_helps() -> None:
    assert repaired({"type": "object", "properties": {"a": {}}}, lambda part: part == {}) == ({}, ["#"])


def test_names_are_of_bounded_length_and_ascii() -> None:
    place = pointer(("properties", "größe\r\nx-evil: 1", "a/b~c"))
    assert place == "#/properties/gr%C3%B6%C3%9Fe%0D%0Ax-evil%3A%201/a~1b~0c"
    text = named([place] * 100)
    assert text.isascii() and len(text) <= MAX_NAMED_CHARS and text.endswith(f"{place}, ...")
    assert len(named(["#/" + "a" * 5000])) <= MAX_NAMED_CHARS


SCHEMA = {
    "type": "object",
    "properties": {"s": {"type": "array", "uniqueItems": True}, "p": {"type": "string", "format": "path"}},
}
HEADER = "x-schema-left-open"
PLACES = "#/properties/s/uniqueItems, #/properties/p/format"


def format_of(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


async def ask(http: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hey"}], **body})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_header_and_the_log_name_what_is_left_open(
    client: httpx.AsyncClient, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "server.requests.grammar")
    answer = await ask(client, response_format=format_of(SCHEMA), stream=stream)
    assert (answer.status_code, answer.headers[HEADER]) == (200, PLACES)
    assert [record.levelname for record in caplog.records if PLACES in record.getMessage()] == ["DEBUG"]
    assert HEADER not in (await ask(client, response_format=format_of({"type": "object"}), stream=stream)).headers
    assert HEADER not in (await ask(client, stream=stream)).headers


async def test_functions_and_native_routes_tell_it_too(client: httpx.AsyncClient) -> None:
    tools = [{"type": "function", "function": {"name": "größe", "parameters": SCHEMA}}]
    answer = await ask(client, tools=tools, tool_choice="required")
    assert answer.headers[HEADER] == PLACES.replace("#", "gr%C3%B6%C3%9Fe#")
    assert HEADER not in (await ask(client, tools=tools)).headers, "the model is free"
    for stream in (False, True):
        body = {"prompt": "a", "response_format": format_of(SCHEMA), "stream": stream}
        assert (await client.post("/v1/completions", json=body)).headers[HEADER] == PLACES
    grammar = {"type": "json", "value": SCHEMA}
    native = await client.post("/generate", json={"inputs": "a", "parameters": {"grammar": grammar}})
    assert (native.status_code, native.headers[HEADER]) == (200, PLACES)


async def test_who_asks_for_all_or_nothing_is_refused(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await ask(client, response_format=format_of(SCHEMA, strict=True))
    assert answer.status_code in (400, 422) and "uniqueItems" in answer.json()["error"]["message"]
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}]
    answer = await ask(client, tools=tools, tool_choice="required")
    assert answer.status_code in (400, 422) and "uniqueItems" in answer.json()["error"]["message"]
    assert engine.requests == []


def test_places_are_named_as_far_as_anybody_reads_them() -> None:
    """The names of places are the client's, and each place has those around it: together they would be megabytes."""
    many = {f"k{index}": {"not": {"type": "null"}} for index in range(300)}
    schema = {"type": "object", "properties": {"\u4e2d" * 20_000: {"type": "object", "properties": many}}}
    places = checked(schema).left_open
    assert len(places) == 101 and places[-1] == "..."
    assert max(map(len, places)) < 2_000
    assert len(named(places)) <= 1_000 and named(places).endswith("...")
