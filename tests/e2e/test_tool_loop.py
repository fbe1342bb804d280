"""Loops with tools on the real demo model, by OpenAI's and Anthropic's clients and what is built on them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import OpenAI

from tests.e2e.cached_environment import cached_environment
from tests.e2e.launched import launched
from tests.e2e.node import node, node_packages

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
QUESTION = "What shall I wear in Paris? Look at the weather in celsius."
MAX_TURNS = 5
CLIENTS = Path(__file__).parent / "clients"


@pytest.fixture(scope="module")
def client(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with launched(demo_model, tmp_path_factory.mktemp("logs")) as server:
        with OpenAI(base_url=f"{server.url}/v1/", api_key="-", timeout=120) as client:
            yield client


def test_three_turns(client: OpenAI) -> None:
    """The first two turns must call, so that there is something to answer; the model ends the third."""
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
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
        if not choice.message.tool_calls:
            break
        for call in choice.message.tool_calls or []:
            called.append((call.function.name, json.loads(call.function.arguments)))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": ANSWERS[call.function.name]})
    assert choice.finish_reason == "stop" and choice.message.content
    assert len({message["tool_call_id"] for message in messages if message["role"] == "tool"}) == len(called)
    check_calls(called)


def test_a_required_call_ends_by_itself(client: OpenAI) -> None:
    """A small model does not call until `max_tokens`."""
    completion = client.chat.completions.create(
        model="",
        messages=[{"role": "user", "content": QUESTION}],
        tools=TOOLS,
        tool_choice="required",
        temperature=0,
        max_tokens=100,
    )
    choice = completion.choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
    assert calls and len(set(calls)) == len(calls)


def test_three_turns_of_responses(client: OpenAI) -> None:
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    tools: list[Any] = [{"type": "function"} | tool["function"] for tool in TOOLS]
    choices: list[Any] = ["required", {"type": "function", "name": "find_clothes"}]
    called = []
    for turn in range(MAX_TURNS):
        with client.responses.stream(
            model="",
            input=items,
            tools=tools,
            tool_choice=choices[turn] if turn < len(choices) else "auto",
            parallel_tool_calls=False,
            temperature=0,
            max_output_tokens=64,
        ) as stream:
            response = stream.get_final_response()
        items += [item.to_dict() for item in response.output]
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        for call in calls:
            called.append((call.name, json.loads(call.arguments)))
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": ANSWERS[call.name]})
    assert response.status == "completed" and response.output_text
    check_calls(called)


def test_three_turns_of_messages(client: OpenAI) -> None:
    tools = [{"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in TOOLS]
    task = {"question": QUESTION, "tools": tools, "answers": ANSWERS, "second": "find_clothes"}
    python = cached_environment("anthropic") / "bin" / "python"
    url = str(client.base_url).removesuffix("/v1/")
    command = [python, CLIENTS / "anthropic_client.py", url]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["stop_reason"] == "end_turn" and results["text"] == results["streamed"] != ""
    assert results["counted"] == results["input"] > 0
    assert "top_p" in results["refusal"]
    check_calls(results["called"])


@pytest.mark.long
def test_frameworks(client: OpenAI) -> None:
    """What people build on OpenAI's and Anthropic's routes: each gets its calls, its objects and an end.

    For `make test-slow`: installing and importing the five takes longer than the calls of all other tests here.
    """
    python = cached_environment("frameworks") / "bin" / "python"
    url = str(client.base_url).removesuffix("/v1/")
    names = ["langchain", "agents", "pydantic_ai", "instructor", "litellm"]
    done = subprocess.run(
        [python, CLIENTS / "framework_clients.py", url, *names], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    anna = {"name": "Anna", "age": 31}
    chain, agents = results["langchain"], results["agents"]
    assert chain["calls"] == [["get_weather", {"city": "Paris", "unit": "celsius"}]]
    assert chain["people"] == results["instructor"]["people"] == [anna] * 3
    assert results["pydantic_ai"] == {"person": anna}
    for kind in ("responses", "chats"):
        assert agents[kind][:2] == ["tool_call_item", "tool_call_output_item"]
        assert agents[kind][-1] == "message_output_item" and agents[f"{kind} answer"]
    assert len(set(results["litellm"].values())) == 1, "three routes, one answer"


def test_vercels_ai(client: OpenAI) -> None:
    url = str(client.base_url).removesuffix("/v1/")
    command = [node(), CLIENTS / "ai_client.mjs", url, node_packages("node-ai")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results["calls"] == [{"city": "Paris", "unit": "celsius"}] and results["steps"] == 2 and results["answer"]
    assert results["person"] == {"name": "Anna", "age": 31}
    assert results["streamed"] == results["whole"] != ""


def check_calls(called: list[Any]) -> None:
    assert len(called) >= 2 and called[1][0] == "find_clothes"
    for name, arguments in called:
        jsonschema.validate(arguments, {"get_weather": WEATHER, "find_clothes": CLOTHES}[name])
