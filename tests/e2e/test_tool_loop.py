"""A loop with tools on the real demo model, by OpenAI's client, that ends by itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import OpenAI

from tests.e2e.launched import launched

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
}
CLOTHES = {"type": "object", "properties": {"degrees": {"type": "integer"}}, "required": ["degrees"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "find_clothes", "parameters": CLOTHES}},
]
ANSWERS = {"get_weather": '{"degrees": 18}', "find_clothes": '["a light jacket"]'}
MAX_TURNS = 5


@pytest.fixture(scope="module")
def client(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with launched(demo_model, tmp_path_factory.mktemp("logs")) as server:
        with OpenAI(base_url=f"{server.url}/v1/", api_key="-", timeout=120) as client:
            yield client


def test_three_turns(client: OpenAI) -> None:
    """The first two turns must call, so that there is something to answer; the model ends the third."""
    messages: list[Any] = [{"role": "user", "content": "What shall I wear in Paris? Look at the weather in celsius."}]
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "find_clothes"}}]
    called = []
    for turn in range(MAX_TURNS):
        with client.chat.completions.stream(
            model="",
            messages=messages,
            tools=TOOLS,
            tool_choice=choices[turn] if turn < len(choices) else "auto",
            parallel_tool_calls=False,
            temperature=0,
            max_tokens=64,
        ) as stream:
            choice = stream.get_final_completion().choices[0]
        messages.append(choice.message.model_dump(exclude_none=True, exclude={"parsed"}))
        if choice.finish_reason != "tool_calls":
            break
        for call in choice.message.tool_calls or []:
            called.append((call.function.name, json.loads(call.function.arguments)))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": ANSWERS[call.function.name]})
    assert choice.finish_reason == "stop" and choice.message.content
    assert len(called) >= 2 and called[1][0] == "find_clothes"
    for name, arguments in called:
        jsonschema.validate(arguments, {"get_weather": WEATHER, "find_clothes": CLOTHES}[name])
    assert len({message["tool_call_id"] for message in messages if message["role"] == "tool"}) == len(called)
