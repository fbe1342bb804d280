"""Tools and response formats with the clients that people run, over real HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import openai
import pydantic
import pytest
from huggingface_hub import InferenceClient

from tests.unit.server.harness import FakeEngine, one_by_one

IdsOf = Callable[[str], list[int]]

USER: list[Any] = [{"role": "user", "content": "Weather?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY, "strict": True}},
]
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ROME = PARIS.replace("Paris", "Rome")
BOTH = f"Let me look.\n{PARIS}\n{ROME}"
CHOICES: list[Any] = ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}]


class Weather(pydantic.BaseModel):
    city: str
    degrees: list[int]


@pytest.fixture
async def sdk(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def hub(base_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceClient]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it would not ask our server either
    with InferenceClient(base_url=base_url) as client:
        yield client


@pytest.fixture
def says(engine: FakeEngine, ids_of: IdsOf) -> Callable[[str], None]:
    def say(text: str) -> None:
        engine.script.events = one_by_one(ids_of(f"{text}<|im_end|>"))

    return say


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]


@pytest.mark.parametrize("choice", CHOICES)
async def test_openai(sdk: openai.AsyncOpenAI, says: Callable[[str], None], choice: Any) -> None:
    says(f"{PARIS}\n{ROME}")
    completion = await sdk.chat.completions.create(model="", messages=USER, tools=TOOLS, tool_choice=choice)
    answer = completion.choices[0]
    assert answer.finish_reason == ("tool_calls" if choice in ("auto", "required") else "stop")
    assert answer.message.content is None
    assert calls_of(answer.message) == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})]


async def test_openai_joins_a_stream(sdk: openai.AsyncOpenAI, says: Callable[[str], None]) -> None:
    says(BOTH)
    options: Any = {"tools": TOOLS, "stream_options": {"include_usage": True}}
    async with sdk.chat.completions.stream(model="", messages=USER, **options) as stream:
        done = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
        completion = await stream.get_final_completion()
    assert [(event.name, event.arguments) for event in done] == [
        ("get_weather", '{"city": "Paris"}'),
        ("get_weather", '{"city": "Rome"}'),
    ]
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Let me look.")
    assert calls_of(choice.message) == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})]
    assert all(call.id.startswith("call_") and call.type == "function" for call in choice.message.tool_calls or [])
    assert choice.finish_reason == "tool_calls"
    assert completion.usage is not None and completion.usage.completion_tokens > 1


async def test_openai_parses(sdk: openai.AsyncOpenAI, engine: FakeEngine, says: Callable[[str], None]) -> None:
    says('{"city": "Paris", "degrees": [17, 18]}')
    completion = await sdk.chat.completions.parse(model="", messages=USER, response_format=Weather)
    assert completion.choices[0].message.parsed == Weather(city="Paris", degrees=[17, 18])
    grammar = engine.requests[0].grammar
    assert grammar is not None and "degrees" in grammar
    async with sdk.chat.completions.stream(model="", messages=USER, response_format=Weather) as stream:
        streamed = await stream.get_final_completion()
    assert streamed.choices[0].message.parsed == Weather(city="Paris", degrees=[17, 18])


async def test_openai_parses_calls(sdk: openai.AsyncOpenAI, says: Callable[[str], None]) -> None:
    weather = Weather(city="Paris", degrees=[18])
    says(f'<tool_call>\n{{"name": "Weather", "arguments": {weather.model_dump_json()}}}\n</tool_call>')
    tool = openai.pydantic_function_tool(Weather)
    completion = await sdk.chat.completions.parse(model="", messages=USER, tools=[tool])
    (call,) = completion.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == weather


@pytest.mark.parametrize("choice", CHOICES)
def test_huggingface_hub(hub: InferenceClient, says: Callable[[str], None], choice: Any) -> None:
    says(PARIS)
    answer = hub.chat_completion(USER, tools=TOOLS, tool_choice=choice).choices[0]
    assert answer.finish_reason == ("tool_calls" if choice in ("auto", "required") else "stop")
    assert calls_of(answer.message) == [("get_weather", {"city": "Paris"})]


def test_huggingface_hub_streams(hub: InferenceClient, says: Callable[[str], None]) -> None:
    says(BOTH)
    content, arguments = "", ["", ""]
    for chunk in hub.chat_completion(USER, tools=TOOLS, stream=True):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            arguments[call.index] += call.function.arguments
    assert (content, arguments) == ("Let me look.", ['{"city": "Paris"}', '{"city": "Rome"}'])
    assert choice.finish_reason == "tool_calls"


RESPONSE_FORMATS: list[Any] = [
    {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
    {"type": "json_object"},
    {"type": "json", "value": CITY},
    {"type": "regex", "value": r'\{"city": "[A-Z][a-z]+"\}'},
    {"type": "text"},
]


@pytest.mark.parametrize("response_format", RESPONSE_FORMATS, ids=lambda value: value["type"])
def test_response_formats(
    hub: InferenceClient, engine: FakeEngine, says: Callable[[str], None], response_format: Any
) -> None:
    says('{"city": "Paris"}')
    answer = hub.chat_completion(USER, response_format=response_format)
    assert answer.choices[0].message.content == '{"city": "Paris"}'
    assert (engine.requests[0].grammar is None) == (response_format["type"] == "text")
