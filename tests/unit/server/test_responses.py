"""POST /v1/responses, read by OpenAI's own client: items, events, refusals."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest

from engine.link.messages import FinishReason
from tests.unit.server.harness import FakeEngine, one_by_one

PATH = "/v1/responses"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"type": "function", "name": "get_weather", "parameters": CITY}
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'

IdsOf = Callable[[str], list[int]]


@pytest.fixture
async def sdk(client: httpx.AsyncClient) -> AsyncIterator[openai.AsyncOpenAI]:
    yield openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", max_retries=0, http_client=client)


def says(engine: FakeEngine, ids_of: IdsOf, text: str, reason: FinishReason = FinishReason.EOS_TOKEN) -> None:
    engine.script.events = one_by_one(ids_of(text + ("<|im_end|>" if reason is FinishReason.EOS_TOKEN else "")), reason)


def prompt_of(engine: FakeEngine, text_of: Callable[[list[int]], str]) -> str:
    return text_of(engine.requests[-1].prompt_token_ids)


@pytest.fixture
def text_of(client: httpx.AsyncClient) -> Callable[[list[int]], str]:
    app = client._transport.app  # type: ignore[attr-defined]
    decode: Callable[[list[int]], str] = app.state.service.tokenizer._decode_all
    return decode


async def test_words(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    response = await sdk.responses.create(
        model="m", input="hey", instructions="Be brief.", max_output_tokens=9, temperature=0.5, metadata={"a": "b"}
    )
    assert response.output_text == "Hello, world!"
    assert (response.status, response.error, response.incomplete_details) == ("completed", None, None)
    assert (response.model, response.instructions, response.max_output_tokens) == ("m", "Be brief.", 9)
    assert (response.temperature, response.metadata, response.tools) == (0.5, {"a": "b"}, [])
    [item] = response.output
    assert (item.type, item.status) == ("message", "completed")
    assert response.usage is not None
    prompt, generated = len(engine.requests[0].prompt_token_ids), len(engine.script.events)
    assert (response.usage.input_tokens, response.usage.output_tokens) == (prompt, generated)
    assert response.usage.total_tokens == prompt + generated
    assert engine.requests[0].max_new_tokens == 9 and engine.requests[0].sampling.temperature == 0.5


async def test_usage_counts_the_tokens_that_the_prefix_cache_had(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script.events[0].num_cached_tokens = 16
    usage = (await sdk.responses.create(model="m", input="hey")).usage
    assert usage is not None and usage.input_tokens_details.cached_tokens == 16
    assert usage.input_tokens == len(engine.requests[0].prompt_token_ids)


async def test_a_stream_grows_what_its_last_event_holds(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, ids_of: IdsOf
) -> None:
    says(engine, ids_of, f"Let me look.\n{PARIS}\n{PARIS}")
    async with sdk.responses.stream(model="m", input="Weather?", tools=[WEATHER]) as stream:  # type: ignore[list-item]
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    assert final.output_text == "Let me look."
    calls = [item for item in final.output if item.type == "function_call"]
    assert {(call.name, call.arguments, call.status) for call in calls} == {
        ("get_weather", '{"city": "Paris"}', "completed")
    }
    assert len({call.call_id for call in calls} | {item.id for item in final.output}) == 5
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == "Let me look."


async def test_stream_bytes_name_their_type(client: httpx.AsyncClient) -> None:
    answer = await client.post(PATH, json={"input": "hey", "stream": True})
    assert answer.headers["content-type"] == "text/event-stream"
    frames = [frame.split("\n") for frame in answer.text.split("\n\n") if frame]
    for name, data in frames:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert frames[-1][0] == "event: response.completed"


@pytest.mark.parametrize("text", ["Hello", ""])
async def test_an_answer_cut_at_its_length_is_incomplete(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, ids_of: IdsOf, text: str
) -> None:
    says(engine, ids_of, text or "<|im_end|>", FinishReason.LENGTH)
    response = await sdk.responses.create(model="m", input="hey")
    assert response.status == "incomplete" and response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert [(item.type, item.status) for item in response.output] == [("message", "incomplete")]  # type: ignore[union-attr]
    assert response.output_text == text


async def test_a_conversation_comes_back_whole(
    sdk: openai.AsyncOpenAI, engine: FakeEngine, text_of: Callable[[list[int]], str]
) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Paris"}'}
    conversation: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather"}, {"type": "input_text", "text": "?"}]},
        {"type": "reasoning", "id": "r1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"role": "user", "content": "And tomorrow?"},
    ]
    await sdk.responses.create(model="m", input=conversation, instructions="Be brief.")
    prompt = prompt_of(engine, text_of)
    assert "system\nBe brief.<|im_end|>" in prompt and "user\nWeather?<|im_end|>" in prompt
    assert "assistant\nI look.\n<tool_call>\n" in prompt and "tool\nrain<|im_end|>" in prompt
    assert prompt.count("<|im_start|>assistant") == 2


@pytest.mark.parametrize(
    ("choice", "is_held"),
    [
        ("auto", False),
        ("required", True),
        ({"type": "function", "name": "get_weather"}, True),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}, True),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, False),
        ("none", False),
    ],
)
async def test_tool_choices(client: httpx.AsyncClient, engine: FakeEngine, choice: Any, is_held: bool) -> None:
    clock = WEATHER | {"name": "clock"}
    answer = await client.post(PATH, json={"input": "hey", "tools": [WEATHER, clock], "tool_choice": choice})
    assert answer.status_code == 200, answer.text
    grammar = engine.requests[0].grammar
    assert (grammar is not None) is is_held
    assert grammar is None or ("clock" in grammar) is (choice == "required")


async def test_tools_without_a_usable_name_are_refused_where_some_are_allowed(client: httpx.AsyncClient) -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [WEATHER, {"name": []}]}
    answer = await client.post(PATH, json={"input": "hey", "tools": [WEATHER | {"name": []}], "tool_choice": choice})
    assert answer.status_code == 400, answer.text


async def test_structured_text(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    text = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    answer = await client.post(PATH, json={"input": "hey", "text": text})
    assert answer.json()["text"] == text
    assert engine.requests[0].grammar is not None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"previous_response_id": "resp_1"}, "`previous_response_id` is not supported"),
        ({"conversation": "c"}, "`conversation` is not supported"),
        ({"background": True}, "`background` is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools of type `web_search`"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input items of type `item_reference`"),
        ({"input": [{"type": ["x"]}]}, "input items of type `unknown`"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "content parts of type `input_file`"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x/y.png"}]}]},
            "content parts of type `input_image` are not supported",
        ),
        ({"top_logprobs": 2, "include": ["message.output_text.logprobs"]}, "logprobs are not supported here"),
        ({"top_logprobs": 2}, "logprobs are not supported here"),
        ({"include": ["reasoning.encrypted_content", "message.output_text.logprobs"]}, "logprobs are not supported"),
        ({"include": 5}, "include: invalid type"),
        ({"input": [{"role": 5, "content": "x"}]}, "input[0].role: invalid type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool choices of type `mcp`"),
        ({"max_output_tokens": 0}, "`max_output_tokens` must be"),
        ({"input": 5}, "input: invalid type"),
        ({"input": ["x"]}, "input[0]: invalid type"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, engine: FakeEngine, body: dict[str, Any], words: str) -> None:
    answer = await client.post(PATH, json={"input": "hey"} | body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert not engine.requests


@pytest.mark.parametrize(
    "item",
    [
        {"type": "mcp_call"},
        {"role": "user", "content": [{"type": "input_file"}]},
        {"type": "function_call_output", "call_id": "c", "output": [5]},
    ],
)
async def test_an_item_that_is_not_supported_is_named(client: httpx.AsyncClient, item: Any) -> None:
    answer = await client.post(PATH, json={"input": [{"role": "user", "content": "hey"}, item]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[1]")


async def test_what_asks_for_no_logprobs_is_answered(client: httpx.AsyncClient) -> None:
    for said in ({"top_logprobs": 0, "include": ["reasoning.encrypted_content"]}, {"include": []}, {"include": None}):
        assert (await client.post(PATH, json={"input": "hey"} | said)).status_code == 200


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("background", True),
        ("input", 5),
        ("conversation", 5),
        ("tool_choice", 5),
        ("tool_choice", ["auto"]),
        ("tool_choice", {"type": "function"}),
        ("tool_choice", {"type": "allowed_tools"}),
        ("top_logprobs", 1),
        ("include", ["message.output_text.logprobs"]),
    ],
)
async def test_a_refusal_names_its_field(client: httpx.AsyncClient, param: str, value: Any) -> None:
    answer = await client.post(PATH, json={"input": "hey"} | {param: value})
    assert answer.json()["error"]["param"] == param


async def test_a_failing_stream_ends_in_words(client: httpx.AsyncClient, engine: FakeEngine, ids_of: IdsOf) -> None:
    engine.script.events, engine.script.error = one_by_one(ids_of("Hello"), None), "boom"
    answer = await client.post(PATH, json={"input": "hey", "stream": True})
    last = json.loads(answer.text.rstrip().rpartition("data: ")[2])
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert "boom" in last["response"]["error"]["message"]


async def test_strict_has_no_such_routes(strict_client: httpx.AsyncClient) -> None:
    for path in (PATH, "/v1/messages", "/v1/messages/count_tokens"):
        assert (await strict_client.post(path, json={"input": "hey"})).status_code == 404


async def test_long_fields_are_not_told_again(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream tells them three times, to readers that may be slow."""
    body = {"input": "hey", "metadata": {"a": "x" * 2_000}, "stream": True}
    assert (await client.post(PATH, json=body)).text.count("x" * 2_000) == 3
    monkeypatch.setattr("server.routes.responses.MAX_ECHOED_BYTES", 1_000)
    assert "xxx" not in (await client.post(PATH, json=body)).text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PATH, {"input": "hey"}),
        ("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": "hey"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hey"}]}),
        ("/v1/completions", {"prompt": "hey"}),
    ],
)
async def test_a_model_by_a_long_name_has_the_servers_in_each_chunk(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    answer = await client.post(path, json=body | {"model": "x" * 10_000, "stream": True})
    assert '"model":"org/model"' in answer.text and "xxx" not in answer.text
    answer = await client.post(path, json=body | {"model": "x" * 256})
    assert answer.json()["model"] == "x" * 256
