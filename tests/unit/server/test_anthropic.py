"""POST /v1/messages and its count of tokens: blocks, events, refusals in Anthropic's shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.link.messages import FinishReason
from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config, one_by_one, write_model_folder

PATH = "/v1/messages"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"name": "get_weather", "description": "Looks outside.", "input_schema": CITY}
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
BODY = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "Weather?"}]}

IdsOf = Callable[[str], list[int]]


def says(engine: FakeEngine, ids_of: IdsOf, text: str, reason: FinishReason = FinishReason.EOS_TOKEN) -> None:
    engine.script.events = one_by_one(ids_of(text + ("<|im_end|>" if reason is FinishReason.EOS_TOKEN else "")), reason)


@pytest.fixture
def prompt_of(client: httpx.AsyncClient, engine: FakeEngine) -> Callable[[], str]:
    """The prompt of the last request."""
    app = client._transport.app  # type: ignore[attr-defined]
    return lambda: app.state.service.tokenizer._decode_all(engine.requests[-1].prompt_token_ids)


async def ask(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await http.post(PATH, json=BODY | body)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    return whole


async def stream(http: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    answer = await http.post(PATH, json=BODY | {"stream": True} | body)
    events = []
    for frame in filter(None, answer.text.split("\n\n")):
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


async def test_words(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    message = await ask(client, temperature=0.5, top_k=7)
    assert message.pop("id").startswith("msg_")
    prompt, generated = len(engine.requests[0].prompt_token_ids), len(engine.script.events)
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "Hello, world!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": prompt, "cache_read_input_tokens": 0, "output_tokens": generated},
    }
    sampling = engine.requests[0].sampling
    assert (engine.requests[0].max_new_tokens, sampling.temperature, sampling.top_k) == (50, 0.5, 7)


@pytest.mark.parametrize(
    ("thinking", "shown"),
    [(None, ""), ({"type": "disabled"}, "False"), ({"type": "enabled", "budget_tokens": 1024}, "True")],
)
async def test_templates_see_whether_the_model_is_to_think(
    engine: FakeEngine, tmp_path: Path, thinking: dict[str, Any] | None, shown: str
) -> None:
    write_model_folder(tmp_path, "{{ messages[0]['content'] }} think: {{ enable_thinking }}")
    tokenizer = TextTokenizer.from_folder(str(tmp_path), 1)
    async with client_of(create_app(engine, make_config(), tokenizer)) as client:
        await ask(client, thinking=thinking)
        prompt_token_ids = engine.requests[0].prompt_token_ids
        assert tokenizer.decode(prompt_token_ids) == f"Weather? think: {shown}"
        body = {"messages": BODY["messages"], "thinking": thinking}
        counted = (await client.post(f"{PATH}/count_tokens", json=body)).json()
    assert counted == {"input_tokens": len(prompt_token_ids)}


async def test_tokens_of_the_prefix_cache_are_counted_apart(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Anthropic's `input_tokens` are those that had to be computed."""
    engine.script.events[0].num_cached_tokens = 4
    usage = (await ask(client))["usage"]
    events = await stream(client)
    assert usage["cache_read_input_tokens"] == 4 and events[-2]["usage"] == usage
    assert usage["input_tokens"] == len(engine.requests[0].prompt_token_ids) - 4
    assert events[0]["message"]["usage"]["input_tokens"] == len(engine.requests[0].prompt_token_ids)


async def test_a_stream_says_what_the_whole_message_says(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf
) -> None:
    says(engine, ids_of, f"Let me look.\n{PARIS}\n{PARIS}")
    whole = await ask(client, tools=[WEATHER])
    events = await stream(client, tools=[WEATHER])
    started, ended = events[0]["message"], events[-2]
    assert (events[0]["type"], ended["type"], events[-1]) == (
        "message_start",
        "message_delta",
        {"type": "message_stop"},
    )
    assert started["content"] == [] and started["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    blocks: list[dict[str, Any]] = []
    for event in events[1:-2]:
        match event["type"]:
            case "content_block_start":
                blocks.append(event["content_block"] | {"json": ""})
            case "content_block_delta" if event["delta"]["type"] == "text_delta":
                blocks[event["index"]]["text"] += event["delta"]["text"]
            case "content_block_delta":
                blocks[event["index"]]["json"] += event["delta"]["partial_json"]
    assert [(block["type"], block.get("text"), block["json"]) for block in blocks] == [
        ("text", "Let me look.", ""),
        ("tool_use", None, '{"city": "Paris"}'),
        ("tool_use", None, '{"city": "Paris"}'),
    ]
    assert [block.get("input") for block in whole["content"]] == [None, {"city": "Paris"}, {"city": "Paris"}]
    assert ended["delta"] == {"stop_reason": "tool_use", "stop_sequence": None} and ended["usage"] == whole["usage"]
    assert whole["stop_reason"] == "tool_use" and len({block.get("id") for block in whole["content"]}) == 3


@pytest.mark.parametrize(
    ("text", "reason", "stop_reason", "stop"),
    [
        ("Hello", FinishReason.LENGTH, "max_tokens", None),
        ("one two END three", FinishReason.EOS_TOKEN, "stop_sequence", "END"),
        ("one two", FinishReason.EOS_TOKEN, "end_turn", None),
        ('<tool_call>\n{"name": "get_weather", "arguments": {"ci', FinishReason.LENGTH, "max_tokens", None),
    ],
)
async def test_stop_reasons(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    ids_of: IdsOf,
    text: str,
    reason: FinishReason,
    stop_reason: str,
    stop: str | None,
) -> None:
    says(engine, ids_of, text, reason)
    message = await ask(client, stop_sequences=["never", "END"], tools=[WEATHER])
    assert (message["stop_reason"], message["stop_sequence"]) == (stop_reason, stop)
    if text.startswith("<"):
        assert message["content"][0]["input"] == {}, "half of an input is none"


async def test_a_conversation_comes_back_whole(client: httpx.AsyncClient, prompt_of: Callable[[], str]) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "And tomorrow?"},
            ],
        },
        {"role": "assistant", "content": "It will"},
    ]
    await ask(client, messages=messages, system=[{"type": "text", "text": "Be brief."}])
    prompt = prompt_of()
    assert "system\nBe brief.<|im_end|>" in prompt
    assert 'assistant\nI look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}' in prompt
    assert "tool\nrain<|im_end|>" in prompt and "user\nAnd tomorrow?<|im_end|>" in prompt
    assert prompt.endswith("assistant\nIt will"), "the model goes on with its last words"


@pytest.mark.parametrize(
    ("choice", "is_held"),
    [({"type": "auto"}, False), ({"type": "any"}, True), ({"type": "tool", "name": "get_weather"}, True)],
)
async def test_tool_choices(
    client: httpx.AsyncClient, engine: FakeEngine, choice: dict[str, Any], is_held: bool
) -> None:
    await ask(client, tools=[WEATHER], tool_choice=choice)
    assert (engine.requests[0].grammar is not None) is is_held


async def test_tokens_are_counted_and_nothing_is_generated(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    asked = {key: value for key, value in BODY.items() if key != "max_tokens"}
    count = await client.post(f"{PATH}/count_tokens", json=asked)
    assert not engine.requests
    assert count.json() == {"input_tokens": (await ask(client))["usage"]["input_tokens"]}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools of type `bash_20250124`"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "content blocks of type `document`"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content blocks of type `image`"),
        ({"tool_choice": {"type": "maybe"}}, "tool choices of type `maybe`"),
        ({"top_p": 5}, "top_p"),
        ({"tool_choice": {"type": "any"}}, "`tool_choice` asks for a call, and there are no `tools`"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice: missing field `name`"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: invalid type"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]: invalid type"),
        ({"system": 5}, "system: invalid type"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], words: str) -> None:
    answer = await client.post(PATH, json=BODY | body)
    error = answer.json()
    assert answer.status_code == 400
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert words in error["error"]["message"]
    assert not engine.requests


@pytest.mark.parametrize("choice", ["auto", "none"])
async def test_a_choice_that_needs_no_tools(client: httpx.AsyncClient, choice: str) -> None:
    assert (await ask(client, tool_choice={"type": choice}, stop_sequences=[""]))["stop_reason"] == "end_turn"


async def test_a_failing_stream_ends_in_words(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    engine.script.events, engine.script.error = one_by_one(ids_of("Hello"), None), "boom"
    last = (await stream(client))[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "api_error")
    assert "boom" in last["error"]["message"]
