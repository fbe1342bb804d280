"""The clients that people run, over real HTTP on the small demo model: each must understand every answer.

All ask for the same greedy texts, so that each can be compared with what the plain routes say.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

from tests.e2e.cached_environment import cached_environment
from tests.e2e.launched import LaunchedServer, launched
from tests.e2e.node import node, node_packages

CLIENTS = Path(__file__).parent / "clients"
PROMPT = "The capital of France is"
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 16}


class Weather(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=12)


SCHEMA = Weather.model_json_schema()
CALLING: dict[str, Any] = GREEDY | {
    "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}],
    "tool_choice": "required",
    "max_tokens": 64,
}


@pytest.fixture(scope="module")
def server(small_demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    with launched(small_demo_model, tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def text(server: LaunchedServer) -> str:
    """The text that greedy decoding of 8 tokens adds to the prompt."""
    generated: str = server.generate(PROMPT, max_new_tokens=8)["generated_text"]
    return generated


@pytest.fixture(scope="module")
def chat(server: LaunchedServer) -> str:
    """The greedy answer to the messages."""
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=GREEDY, timeout=120).json()
    content: str = answer["choices"][0]["message"]["content"]
    return content


@pytest.fixture(scope="module")
def sdk(server: LaunchedServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture
def hub(server: LaunchedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceClient]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it would not ask our server either
    with InferenceClient(base_url=server.url, timeout=120) as client:
        yield client


def test_openai_chat(sdk: openai.OpenAI, chat: str) -> None:
    answer = sdk.chat.completions.create(model="tgi", **GREEDY, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == chat
    assert answer.usage is not None and answer.choices[0].logprobs is not None
    logprobs = answer.choices[0].logprobs.content
    assert logprobs is not None and len(logprobs) == answer.usage.completion_tokens
    for token in logprobs:  # greedy: the likeliest is the one that was taken
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)


def test_openai_streams(sdk: openai.OpenAI, chat: str) -> None:
    with sdk.chat.completions.stream(model="tgi", **GREEDY, stream_options={"include_usage": True}) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == chat
    assert final.usage is not None and final.usage.completion_tokens > 1


def test_openai_completions(sdk: openai.OpenAI, text: str) -> None:
    parameters: dict[str, Any] = {"model": "tgi", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    answer = sdk.completions.create(**parameters)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "length")
    assert "".join(chunk.choices[0].text for chunk in sdk.completions.create(**parameters, stream=True)) == text


def test_openai_calls_tools(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(model="tgi", **CALLING, parallel_tool_calls=False)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    Weather.model_validate_json(call.function.arguments)


def test_openai_parses(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.parse(model="tgi", **GREEDY | {"max_tokens": 64}, response_format=Weather)
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_openai_models_and_errors(sdk: openai.OpenAI) -> None:
    (model,) = sdk.models.list().data
    assert sdk.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("nobody/nothing")
    with pytest.raises(openai.BadRequestError, match="top_p"):
        sdk.chat.completions.create(model="tgi", **GREEDY, top_p=7)


def test_huggingface_text(hub: InferenceClient, text: str) -> None:
    answer = hub.text_generation(PROMPT, max_new_tokens=8, details=True, decoder_input_details=True, top_n_tokens=2)
    assert answer.details is not None
    assert answer.generated_text.removeprefix(PROMPT) == text
    assert len(answer.details.tokens) == answer.details.generated_tokens == 8
    assert [token.logprob is None for token in answer.details.prefill[:2]] == [True, False]
    *tokens, last = hub.text_generation(PROMPT, max_new_tokens=8, details=True, stream=True)
    assert "".join(event.token.text for event in [*tokens, last]) == text
    assert last.details is not None and last.details.finish_reason == "length"
    with pytest.raises(ValidationError, match="`temperature`"):
        hub.text_generation(PROMPT, max_new_tokens=8, temperature=-1.0)


def test_huggingface_chat(hub: InferenceClient, chat: str) -> None:
    answer = hub.chat_completion(**GREEDY, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == chat
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    chunks = hub.chat_completion(**GREEDY, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat


def test_huggingface_tools_and_formats(hub: InferenceClient) -> None:
    called = hub.chat_completion(**CALLING, extra_body={"parallel_tool_calls": False})
    (call,) = called.choices[0].message.tool_calls or []
    Weather.model_validate_json(call.function.arguments)
    json_schema = {"name": "weather", "schema": SCHEMA, "strict": True}
    wanted = GREEDY | {"max_tokens": 64, "response_format": {"type": "json_schema", "json_schema": json_schema}}
    formatted = hub.chat_completion(**wanted)
    Weather.model_validate_json(formatted.choices[0].message.content or "")


def run_client(*command: str | Path) -> dict[str, Any]:
    """The JSON in the last line of a client's output."""
    environ = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return results


def test_text_generation(server: LaunchedServer, text: str) -> None:
    python = cached_environment("text-generation") / "bin" / "python"
    results = run_client(python, CLIENTS / "text_generation_client.py", server.url)
    assert results["text"] == results["streamed"] == results["tokens"] == text
    assert results["chat"]
    assert "`stop` supports up to" in results["refusal"]


def test_node(server: LaunchedServer, text: str, chat: str) -> None:
    results = run_client(node(), CLIENTS / "node_clients.mjs", server.url, node_packages("node-clients"))
    chats = ("openaiChat", "openaiChatStream", "huggingfaceChat", "huggingfaceChatStream")
    assert {results.pop(name) for name in chats} == {chat}
    texts = ("openaiCompletion", "openaiCompletionStream", "huggingfaceText", "huggingfaceTextStream")
    assert {results.pop(name) for name in texts} == {text}
    for name in ("openaiArguments", "openaiArgumentsStream", "huggingfaceArguments"):
        Weather.model_validate_json(results.pop(name))
    Weather.model_validate(results.pop("openaiParsed"))
    assert results == {"openaiModel": True}
