"""Completions that echo a prompt with its logprobs: a stream says what the plain answer says, the prompt first."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import ObligingEngine, client_of, events_of, make_config

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@pytest.fixture
async def client(model_folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    tokenizer = TextTokenizer.from_folder(str(model_folder), 1)
    engine = ObligingEngine(tokenizer._encode("Hello, 你!<|im_end|>", False))
    async with client_of(create_app(engine, make_config(), tokenizer)) as client:
        yield client


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post("/v1/completions", json=body | {"stream": True})
    assert response.status_code == 200, response.text
    return [choice for event in events_of(response.content) for choice in event["choices"]]


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The choice that is made of its chunks."""
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    logprobs = {key: [item for part in parts for item in part[key]] for key in LISTS if parts[0][key] is not None}
    return {
        "index": chunks[0]["index"],
        "text": "".join(chunk["text"] for chunk in chunks),
        "logprobs": dict.fromkeys(LISTS) | logprobs,
        "finish_reason": chunks[-1]["finish_reason"],
    }


@pytest.mark.parametrize(
    "prompts", ["What is", ["What is", "x", "你好 naïve"], [[5, 6, 7]], [[200], [5, 230, 6]], [[7] * 300]]
)
@pytest.mark.parametrize(
    "said", [{}, {"n": 2}, {"max_tokens": 0}, {"max_tokens": 2}, {"stream_options": {"include_usage": True}}]
)
@pytest.mark.parametrize("logprobs", [0, 2])
async def test_the_same_as_the_plain_answer(client: httpx.AsyncClient, prompts: Any, said: Any, logprobs: int) -> None:
    body = {"prompt": prompts, "echo": True, "logprobs": logprobs} | said
    plain = await client.post("/v1/completions", json={k: v for k, v in body.items() if k != "stream_options"})
    assert plain.status_code == 200, plain.text
    chunks = await streamed(client, body)
    for choice in plain.json()["choices"]:
        own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert joined(own) == choice
        assert own[0]["logprobs"]["token_logprobs"][0] is None, "the prompt's first token comes first"
        assert own[0]["finish_reason"] is None
        assert all(len(chunk["logprobs"]["tokens"]) == 1 for chunk in own[1:] if chunk["logprobs"] is not None)


async def test_a_prompt_that_fails_ends_the_stream_with_an_error(model_folder: Path) -> None:
    tokenizer = TextTokenizer.from_folder(str(model_folder), 1)
    engine = ObligingEngine(tokenizer._encode("Hello<|im_end|>", False))
    engine.error = "out of memory"
    async with client_of(create_app(engine, make_config(), tokenizer)) as client:
        body = {"prompt": "What is", "echo": True, "logprobs": 1, "stream": True}
        events = events_of((await client.post("/v1/completions", json=body)).content)
    assert events[0]["choices"][0]["text"] == "What is"
    assert "out of memory" in events[-1]["error"]["message"]


async def test_logprobs_of_a_prompt_that_a_stream_does_not_have(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "stream": True, "prompt_logprobs": 1}
    refused = await client.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")
    native = await client.post("/generate_stream", json={"inputs": "x", "parameters": {"decoder_input_details": True}})
    assert "`decoder_input_details` == true is not supported when streaming tokens" in native.text
