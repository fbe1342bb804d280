"""`tool_choice` with some of the tools (`allowed_tools`), in the shapes of /v1/chat/completions and /v1/responses."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, one_by_one

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
NAMES = ("clock", "news", "weather")


def flat(name: str) -> dict[str, Any]:
    return {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}}


def nested(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def nested_choice(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [nested(name) for name in names]}}


def flat_choice(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": name} for name in names]}


SHAPES = [(CHAT, nested_choice), (CHAT, flat_choice), (RESPONSES, flat_choice), (RESPONSES, nested_choice)]
shapes = pytest.mark.parametrize(("path", "choice"), SHAPES)


async def ask(client: httpx.AsyncClient, path: str, choice: Any, names: tuple[str, ...] = NAMES) -> httpx.Response:
    body: dict[str, Any] = {"input": "hey", "tools": [flat(name) for name in names]}
    if path == CHAT:
        tools = [{"type": "function", "function": flat(name)} for name in names]
        body = {"messages": [{"role": "user", "content": "hey"}], "tools": tools}
    return await client.post(path, json=body | {"tool_choice": choice})


def called(path: str, answer: httpx.Response) -> list[str]:
    body = answer.json()
    if path == CHAT:
        return [call["function"]["name"] for call in body["choices"][0]["message"].get("tool_calls", [])]
    return [item["name"] for item in body["output"] if item["type"] == "function_call"]


def says_calls(engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    calls = [f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>\n' for name in NAMES]
    engine.script.events = one_by_one(tokenizer._encode("".join(calls) + "<|im_end|>", False))


@shapes
async def test_where_some_may_be_called_only_those_are(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: TextTokenizer, path: str, choice: Any
) -> None:
    says_calls(engine, tokenizer)
    for allowed in (["news"], ["weather", "clock"], list(NAMES)):
        answer = await ask(client, path, choice("auto", *allowed))
        assert answer.status_code == 200, answer.text
        assert called(path, answer) == [name for name in NAMES if name in allowed]
        prompt = tokenizer.decode(engine.requests[-1].prompt_token_ids)
        assert [name for name in NAMES if f'"{name}"' in prompt] == called(path, answer), "and only those are shown"
        assert engine.requests[-1].grammar is None


@shapes
async def test_where_a_call_is_required_it_is_one_of_those(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, choice: Any
) -> None:
    assert (await ask(client, path, choice("required", "clock", "news"))).status_code == 200
    grammar = engine.requests[0].grammar
    assert grammar is not None
    assert [name for name in NAMES if name in grammar] == ["clock", "news"]


@shapes
async def test_none_of_the_tools(client: httpx.AsyncClient, engine: FakeEngine, path: str, choice: Any) -> None:
    answer = await ask(client, path, choice("auto"))
    assert (answer.status_code, called(path, answer), engine.requests[0].grammar) == (200, [], None)
    refused = await ask(client, path, choice("required"))
    assert refused.status_code == 400 and "there are no `tools`" in refused.json()["error"]["message"]


@shapes
async def test_choices_that_make_no_sense(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, choice: Any
) -> None:
    unknown = await ask(client, path, choice("auto", "clock", "maps"))
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (
        400,
        "Tool error: Tool with name maps not found",
    )
    for wrong in (
        choice("none", "clock"),
        choice("clock"),
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}},
        {"type": "auto"} if path == CHAT else choice("clock"),
        {"type": "function"},
        {"type": "function", "function": {"name": 5}},
        {"type": "function", "name": 5},
    ):
        answer = await ask(client, path, wrong)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "tool_choice")
        assert 'tool_choice: invalid value, expected "none", "auto", "required"' in error["message"]
    assert not engine.requests


@pytest.mark.parametrize("name", ["auto", "none", "required", "named"])
@pytest.mark.parametrize("choice", [nested, flat, nested_choice, flat_choice])
async def test_a_function_may_be_called_like_a_mode(
    client: httpx.AsyncClient, engine: FakeEngine, name: str, choice: Any
) -> None:
    asked = choice(name) if choice in (nested, flat) else choice("required", name)
    assert (await ask(client, CHAT, asked, ("clock", name))).status_code == 200
    grammar = engine.requests[0].grammar
    assert grammar is not None and name in grammar and "clock" not in grammar


async def test_tgi_has_no_such_choice(strict_client: httpx.AsyncClient) -> None:
    for choice in (nested_choice("auto", "clock"), flat_choice("auto", "clock"), {"type": "function", "name": "clock"}):
        answer = await ask(strict_client, CHAT, choice)
        assert answer.status_code == 422
        assert "data did not match any variant of untagged enum ToolTypeDeserializer" in answer.text
