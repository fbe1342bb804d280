"""What llguidance lets a model write where it has to call a function."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer

from server.chat.tools import use_tools
from server.errors import ToolError, ValidationError
from server.requests.grammar import GrammarCompiler
from server.requests.grammar_check import Check
from server.requests.openai import ChatRequest
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import chat_format_of

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"$ref": "#/$defs/Unit"}, "near": {"properties": {}}},
    "required": ["city"],
    "$defs": {"Unit": {"enum": ["°C", "K"]}},
}
ODD = {"properties": {"a": {"type": "string", "format": "odd", "default": 1}}}


@pytest.fixture(params=[True, False], ids=["marks are tokens", "marks are text"])
def vocabulary(request: pytest.FixtureRequest, model_folder: Path) -> tokenizers.Tokenizer:
    vocabulary = tokenizers.Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    if request.param:
        tokens = ["<tool_call>", "</tool_call>"]
        vocabulary.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in tokens])
    return vocabulary


def grammar_of(
    vocabulary: tokenizers.Tokenizer, schemas: dict[str, Any], *, is_strict: bool = False, **body: Any
) -> Check:
    tools = [{"type": "function", "function": {"name": name} | function} for name, function in schemas.items()]
    body = {"messages": [], "tools": tools, "tool_choice": "required"} | body
    request = ChatRequest.model_validate(body, context={"is_strict": is_strict})
    tokenizer = TextTokenizer(vocabulary, frozenset(), chat_format_of(None), 1, Path())
    grammar = use_tools(request, tokenizer, is_strict=is_strict).grammar
    assert grammar is not None
    return grammar


COMPILER = GrammarCompiler()


@pytest.fixture(scope="module", autouse=True)
def compiler() -> Iterator[GrammarCompiler]:
    """The compiler of every test in this file."""
    yield COMPILER
    COMPILER.close()


async def accepts(vocabulary: tokenizers.Tokenizer, grammar: Check, text: str) -> bool:
    """Whether a model held to `grammar` can write exactly `text`."""
    checked = await COMPILER.compile_tools(grammar)
    matcher = LLMatcher(LLTokenizer(vocabulary.to_str(), eos_token=2), checked.grammar)
    token_ids = vocabulary.encode(text, add_special_tokens=False).ids
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def written(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


CITY = written("get_weather", '{"city": "Paris"}')
UNIT = written("get_weather", '{"city": "é", "unit": "°C", "near": {}}')
SCHEMAS = {"get_weather": {"parameters": WEATHER}, "bare": {}}


@pytest.mark.parametrize(
    ("text", "is_accepted"),
    [
        (CITY, True),
        (UNIT, True),
        (written("bare", "{}"), True),
        (f"{CITY}\n{written('bare', '{}')}\n{UNIT}", True),
        ("", False),
        ("Hello", False),
        (f" {CITY}", False),
        (f"{CITY}\n", True),
        (f"{CITY}\n\n", False),
        (f"{CITY} ", False),
        (CITY[:-1], False),
        (written("other", "{}"), False),
        (written("bare", '{"a": 1}'), False),
        (written("get_weather", "{}"), False),
        (written("get_weather", '{"city": "Paris", "unit": "F"}'), False),
        (written("get_weather", '{"city": "Paris", "country": "France"}'), False),
        (written("get_weather", '{"city":"Paris"}'), False),
    ],
)
async def test_required_calls(vocabulary: tokenizers.Tokenizer, text: str, is_accepted: bool) -> None:
    assert await accepts(vocabulary, grammar_of(vocabulary, SCHEMAS), text) == is_accepted


async def test_choices(vocabulary: tokenizers.Tokenizer) -> None:
    named = grammar_of(vocabulary, SCHEMAS, tool_choice="bare")
    assert await accepts(vocabulary, named, written("bare", "{}"))
    assert not await accepts(vocabulary, named, CITY)
    single = grammar_of(vocabulary, SCHEMAS, parallel_tool_calls=False)
    assert await accepts(vocabulary, single, CITY)
    assert not await accepts(vocabulary, single, f"{CITY}\n{CITY}")


JSON_ANSWER = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"properties": {"a": {"type": "int"}}}}}
REGEX_ANSWER = {"type": "regex", "value": r"a/b\\/[/]c{1,2}\n?"}


async def test_calls_or_an_answer(vocabulary: tokenizers.Tokenizer) -> None:
    either = grammar_of(vocabulary, SCHEMAS, tool_choice="auto", response_format=JSON_ANSWER)
    for text in (CITY, f"{CITY}\n{CITY}", '{"a": 1}', "{}"):
        assert await accepts(vocabulary, either, text)
    for text in ("Hello", '{"a": "b"}', f'{CITY}\n{{"a": 1}}'):
        assert not await accepts(vocabulary, either, text)
    either = grammar_of(vocabulary, SCHEMAS, tool_choice="auto", response_format=REGEX_ANSWER)
    for text in (CITY, "a/b\\//c", "a/b\\//cc\n"):
        assert await accepts(vocabulary, either, text)
    assert not await accepts(vocabulary, either, "a/b")
    calls = grammar_of(vocabulary, SCHEMAS, response_format=JSON_ANSWER)
    assert await accepts(vocabulary, calls, CITY) and not await accepts(vocabulary, calls, "{}")
    with pytest.raises(ValidationError, match="a regex is a string"):
        grammar_of(vocabulary, SCHEMAS, tool_choice="auto", response_format={"type": "regex", "value": 3})


async def test_a_schema_that_cannot_be_held_to(vocabulary: tokenizers.Tokenizer) -> None:
    lenient = grammar_of(vocabulary, {"f": {"parameters": ODD}})
    assert await accepts(vocabulary, lenient, written("f", '{"a": "b"}'))
    with pytest.raises(ValidationError, match="^cannot compile regex from schema: .*odd"):
        await COMPILER.compile_tools(grammar_of(vocabulary, {"f": {"parameters": ODD, "strict": True}}))
    wrong = {"f": {"parameters": {"type": "nothing"}}}
    assert await accepts(vocabulary, grammar_of(vocabulary, wrong), written("f", "{}"))
    with pytest.raises(ValidationError, match="^cannot compile regex from schema: .*anyOf is empty"):
        await COMPILER.compile_tools(grammar_of(vocabulary, {"f": {"parameters": {"type": []}, "strict": True}}))
    with pytest.raises(ToolError, match="^The parameters of f are not a JSON schema$"):
        grammar_of(vocabulary, {"f": {"parameters": "none"}})


def tgi_written(name: str, **arguments: Any) -> str:
    return json.dumps({"function": {"_name": name, **arguments}}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "is_accepted"),
    [
        (tgi_written("get_weather", city="Paris", unit="K"), True),
        (tgi_written("bare"), True),
        (tgi_written("no_tool"), True),
        (tgi_written("no_tool", content="x"), False),
        (tgi_written("get_weather"), False),
        (tgi_written("other"), False),
        ("{}", False),
    ],
)
async def test_calls_of_tgi(vocabulary: tokenizers.Tokenizer, text: str, is_accepted: bool) -> None:
    schemas = SCHEMAS | {"bare": {"parameters": None}}
    grammar = grammar_of(vocabulary, schemas, is_strict=True, tool_choice="auto")
    assert await accepts(vocabulary, grammar, text) == is_accepted
    if "no_tool" in text:
        required = grammar_of(vocabulary, schemas, is_strict=True)
        assert not await accepts(vocabulary, required, text)
