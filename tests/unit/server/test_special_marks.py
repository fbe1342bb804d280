"""Tokenizers that have the marks of tool calls as special tokens: calls are read, and texts hide the marks as ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import CHATML, FakeEngine, client_of, events_of, make_config, one_by_one
from tests.unit.server.harness import write_model_folder as write_folder

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
BODY = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALL = f"<tool_call>\n{BODY}\n</tool_call>"


@pytest.fixture(params=["tokenizer.json", "tokenizer_config.json", "additional_special_tokens"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    """`<tool_call>` and its end are added tokens, which one of the files calls special."""
    write_folder(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    is_special = request.param == "tokenizer.json"
    marks = ["<tool_call>", "</tool_call>"]
    library.add_tokens([tokenizers.AddedToken(mark, special=is_special, normalized=False) for mark in marks])
    library.save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    if request.param == "tokenizer_config.json":
        ids = [library.token_to_id(mark) for mark in marks]
        entries = zip(ids, marks, strict=True)
        config["added_tokens_decoder"] = {str(id): {"content": mark, "special": True} for id, mark in entries}
    elif request.param == "additional_special_tokens":
        config["additional_special_tokens"] = marks
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return TextTokenizer.from_folder(str(tmp_path), 1)


def says(engine: FakeEngine, tokenizer: TextTokenizer, text: str) -> None:
    engine.script.events = one_by_one(tokenizer._encode(text, False))


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_calls_are_read(tokenizer: TextTokenizer, choice: Any) -> None:
    engine = FakeEngine()
    body = {"messages": [{"role": "user", "content": "?"}], "tools": [WEATHER], "tool_choice": choice}
    async with client_of(create_app(engine, make_config(), tokenizer)) as client:
        says(engine, tokenizer, f"{CALL}<|im_end|>")
        message = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
        says(engine, tokenizer, f"{CALL}<|im_end|>")
        streamed = await client.post("/v1/chat/completions", json={**body, "stream": True})
    deltas = [event["choices"][0]["delta"] for event in events_of(streamed.content)]
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"]
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'
    assert [call["name"] for call in calls if "name" in call] == ["get_weather"]
    assert "".join(call.get("arguments", "") for call in calls) == '{"city": "Paris"}'
    assert not message["content"] and not any(delta.get("content") for delta in deltas)


async def test_other_texts_hide_them(tokenizer: TextTokenizer) -> None:
    engine = FakeEngine()
    async with client_of(create_app(engine, make_config(), tokenizer)) as client:
        says(engine, tokenizer, CALL)
        body = {"inputs": "?", "parameters": {"details": True}}
        answer = (await client.post("/generate", json=body)).json()
        says(engine, tokenizer, CALL)
        chat = (await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "?"}]})).json()
    assert answer["generated_text"] == f"\n{BODY}\n"
    first = answer["details"]["tokens"][0]
    assert (first["text"], first["special"]) == ("<tool_call>", True)
    assert chat["choices"][0]["message"]["content"] == f"\n{BODY}\n"


@pytest.mark.parametrize("text", ["Hello", "é", ""])
async def test_an_end_that_is_no_special_token_is_no_text_of_openais_routes(tmp_path: Path, text: str) -> None:
    write_folder(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken("<end>", special=False, normalized=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    engine, tokenizer = FakeEngine(), TextTokenizer.from_folder(str(tmp_path), 1)
    body: dict[str, Any] = {"model": "m", "prompt": "?", "messages": [{"role": "user", "content": "?"}]}
    async with client_of(create_app(engine, make_config(), tokenizer)) as client:
        says(engine, tokenizer, f"{text}<end>")
        chat = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        completion = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        streamed = events_of((await client.post("/v1/completions", json={**body, "stream": True})).content)
        native = (await client.post("/generate", json={"inputs": "?"})).json()
    assert (chat["message"]["content"], chat["finish_reason"]) == (text, "stop")
    assert (completion["text"], completion["finish_reason"]) == (text, "stop")
    assert "".join(event["choices"][0]["text"] for event in streamed) == text
    assert native["generated_text"] == f"{text}<end>"
