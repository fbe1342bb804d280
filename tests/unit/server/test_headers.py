"""The x- headers (`docs/wire.md`, 1.12): which of them an answer has, and what they say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.telemetry.request_ids import HEADER
from tests.unit.server.harness import FakeEngine, one_by_one

MESSAGES = [{"role": "user", "content": "hey"}]
SUMMED = {
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
    "x-prompt-tokens",
    "x-generated-tokens",
    "x-compute-characters",
}
PLAIN = SUMMED | {"x-compute-type", "x-compute-time"}
STREAM = {"x-compute-type", "x-compute-characters", "x-accel-buffering"}
REQUESTS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("/generate", {"inputs": "What"}, PLAIN),
    ("/", {"inputs": "What"}, PLAIN),
    ("/", {"inputs": "What", "stream": True}, STREAM),
    ("/generate_stream", {"inputs": "What"}, STREAM),
    ("/v1/chat/completions", {"messages": MESSAGES}, PLAIN),
    ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}, STREAM),
    ("/v1/completions", {"prompt": ["What", "x"]}, SUMMED | {"x-compute-type"}),
    ("/v1/completions", {"prompt": ["What", "x"], "stream": True}, STREAM),
    ("/invocations", {"inputs": "What"}, PLAIN),
    ("/vertex", {"instances": [{"inputs": "What"}]}, set()),
    ("/tokenize", {"inputs": "What"}, set()),
    ("/chat_tokenize", {"messages": MESSAGES}, set()),
    ("/detokenize", {"tokens": [5]}, set()),
]


def x_headers(response: httpx.Response) -> dict[str, str]:
    """All but the request's id, which every answer of OpenAI's routes has."""
    return {name: value for name, value in response.headers.items() if name.startswith("x-") and name != HEADER}


@pytest.mark.parametrize(("path", "body", "names"), REQUESTS)
async def test_which_headers(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, path: str, body: dict[str, Any], names: set[str]
) -> None:
    for one in (client, strict_client):
        headers = x_headers(await one.post(path, json=body))
        assert headers.keys() == names
        if "x-accel-buffering" in headers:
            assert headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize(("path", "body", "names"), REQUESTS)
async def test_none_with_an_error(client: httpx.AsyncClient, path: str, body: dict[str, Any], names: set[str]) -> None:
    assert x_headers(await client.post(path, content=b"{", headers={"content-type": "application/json"})) == {}


@pytest.mark.parametrize("path", ["/info", "/health", "/v1/models", "/v1/models/org/model", "/openapi.json", "/docs/"])
async def test_none_on_get(client: httpx.AsyncClient, path: str) -> None:
    assert x_headers(await client.get(path)) == {}


async def test_values(client: httpx.AsyncClient) -> None:
    headers = x_headers(await client.post("/generate", json={"inputs": "你好"}))
    assert re.fullmatch(r"0\.\d{9}", headers["x-compute-time"]), "seconds"
    assert all(headers[name].isdecimal() for name in SUMMED), "milliseconds and counts"
    assert headers["x-compute-characters"] == "2", "code points"
    assert headers["x-queue-time"] == "1"


async def test_sums_over_prompts(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]]
) -> None:
    texts = ["one", "two words", "three", "four"]
    engine.script.scripts = [one_by_one(ids_of(text + "<|im_end|>")) for text in texts]
    headers = x_headers(await client.post("/v1/completions", json={"prompt": ["你好", "What is"], "n": 2}))
    assert headers["x-compute-type"] == "test"
    assert headers["x-compute-characters"] == str(len("你好") + len("What is"))
    assert headers["x-prompt-tokens"] == str(len(ids_of("你好")) + len(ids_of("What is"))), "a prompt counts once"
    assert headers["x-generated-tokens"] == str(sum(len(ids_of(text + "<|im_end|>")) for text in texts))
    assert headers["x-queue-time"] == "4"
