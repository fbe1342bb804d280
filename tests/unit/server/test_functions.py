"""OpenAI's older `functions` and `function_call` are the newer keys in other words; a body's own template is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config, write_model_folder

CHAT = "/v1/chat/completions"
QWEN2_5 = Path(__file__).with_name("qwen2_5.jinja").read_text()
USER = {"role": "user", "content": "hey"}
F: dict[str, Any] = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {}}}}
G: dict[str, Any] = {"name": "g"}
CALL = {"name": "f", "arguments": '{"a": 1}'}


def tools(*functions: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": function} for function in functions]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


OLD_AND_NEW: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"functions": [F, G]}, {"tools": tools(F, G)}),
    ({"functions": [F], "function_call": "auto"}, {"tools": tools(F), "tool_choice": "auto"}),
    ({"functions": [F], "function_call": "none"}, {"tools": tools(F), "tool_choice": "none"}),
    ({"functions": [F, G], "function_call": {"name": "g"}}, {"tools": tools(F, G), "tool_choice": named("g")}),
    ({"functions": [F], "tools": None, "function_call": None}, {"tools": tools(F)}),
    ({"functions": None, "function_call": "none"}, {}),
    (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": CALL},
                {"role": "function", "name": "f", "content": "5"},
            ]
        },
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": tools(CALL)},
                {"role": "tool", "name": "f", "content": "5"},
            ]
        },
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": "Well.", "function_call": CALL}, USER]},
        {"messages": [USER, {"role": "assistant", "content": "Well.", "tool_calls": tools(CALL)}, USER]},
    ),
    (
        {"messages": [USER, {"role": "assistant", "function_call": G, "tool_calls": tools(CALL)}, USER]},
        {"messages": [USER, {"role": "assistant", "tool_calls": tools(CALL)}, USER]},
    ),
]


@pytest.mark.parametrize(("old", "new"), OLD_AND_NEW)
async def test_older_keys_are_other_words(engine: FakeEngine, tmp_path: Path, old: Any, new: Any) -> None:
    write_model_folder(tmp_path, QWEN2_5)
    async with client_of(create_app(engine, make_config(), TextTokenizer.from_folder(str(tmp_path), 1))) as http:
        for body in (old, new):
            response = await http.post(CHAT, json={"messages": [USER]} | body)
            assert response.status_code == 200, response.text
    older, newer = engine.requests
    assert older.prompt_token_ids == newer.prompt_token_ids
    assert older.grammar == newer.grammar


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"functions": 5}, "functions"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [F, 5]}, "functions[1]"),
        ({"functions": [F | {"strict": 5}]}, "functions[0].strict"),
        ({"functions": [F], "tools": tools(F)}, "functions"),
        ({"functions": [F], "function_call": "f"}, "function_call"),
        ({"functions": [F], "function_call": {}}, "function_call"),
        ({"functions": [F], "function_call": {"name": 5}}, "function_call"),
        ({"functions": [F], "function_call": "auto", "tool_choice": "none"}, "function_call"),
        ({"messages": [{"role": "assistant", "function_call": 5}]}, "messages[0].function_call"),
        ({"messages": [{"role": "assistant", "function_call": {}}]}, "messages[0].function_call.name"),
        ({"messages": [USER, {"role": "function", "name": "f"}]}, "messages[1].content"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template": ""}, "chat_template"),
        ({"chat_template": 5}, "chat_template"),
    ],
)
async def test_what_cannot_be_read(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, engine: FakeEngine, said: Any, param: str
) -> None:
    response = await client.post(CHAT, json={"messages": [USER]} | said)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert param.partition("[")[0] in error["message"]
    assert not engine.requests
    if "messages" not in said and "tools" not in said:
        assert (await strict_client.post(CHAT, json={"messages": [USER]} | said)).status_code == 200


async def test_templates_of_a_client_that_has_none(client: httpx.AsyncClient) -> None:
    assert (await client.post(CHAT, json={"messages": [USER], "chat_template": None})).status_code == 200
