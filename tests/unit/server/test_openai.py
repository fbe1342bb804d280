"""The OpenAI-shaped routes, by their bytes and with OpenAI's own client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from engine.link.messages import FinishReason
from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, events_of, make_config, one_by_one, write_model_folder

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "hey"}]
SDK_USER: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hey"}]
PROMPT = "<|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\n"


async def chat(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post(PATH, json={"messages": USER} | body)


async def test_plain_answer(client: httpx.AsyncClient, engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    response = await chat(client, model="any/name")
    answer = response.json()
    created = answer["created"]
    num_prompt = len(engine.requests[0].prompt_token_ids)
    assert response.text == (
        f'{{"object":"chat.completion","id":"{answer["id"]}","created":{created},"model":"any/name",'
        '"system_fingerprint":"3.3.6-dev0-native","choices":[{"index":0,"message":{"role":"assistant",'
        '"content":"Hello, world!"},"logprobs":null,"finish_reason":"stop"}],'
        f'"usage":{{"prompt_tokens":{num_prompt},"completion_tokens":5,"total_tokens":{num_prompt + 5},'
        '"prompt_tokens_details":{"cached_tokens":0}}}'
    )
    assert tokenizer.decode(engine.requests[0].prompt_token_ids) == PROMPT
    assert response.headers["x-compute-characters"] == str(len(PROMPT))
    assert response.headers["x-generated-tokens"] == "5"


@pytest.mark.parametrize(("asked", "told"), [(None, "org/model"), ("tgi", "org/model"), ("", ""), ("dummy", "dummy")])
async def test_model_is_echoed(client: httpx.AsyncClient, asked: str | None, told: str) -> None:
    assert (await chat(client, model=asked)).json()["model"] == told


@pytest.mark.parametrize(("reason", "told"), [(FinishReason.LENGTH, "length"), (FinishReason.EOS_TOKEN, "stop")])
async def test_finish_reasons(client: httpx.AsyncClient, engine: FakeEngine, reason: FinishReason, told: str) -> None:
    engine.script.events[-1].finish_reason = reason
    assert (await chat(client)).json()["choices"][0]["finish_reason"] == told


async def test_stop_string(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    choice = (await chat(client, stop=["wor"])).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello, ", "stop")
    assert len(engine.aborted) == 1


async def test_logprobs(client: httpx.AsyncClient) -> None:
    content = (await chat(client, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert [item["token"] for item in content] == ["Hello", ",", " world", "!", "<|im_end|>"]
    assert content[0] == {"token": "Hello", "logprob": -0.5, "bytes": [*b"Hello"], "top_logprobs": []}


async def test_logit_bias(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """A `logit_bias` was an internal error once, because the map was read twice."""
    assert (await chat(client, logit_bias={"5": -2})).status_code == 200
    assert engine.requests[0].sampling.logit_bias == {5: -2.0}


async def test_stream_bytes(client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]]) -> None:
    engine.script.events = one_by_one(ids_of("Hello<|im_end|>"))
    response = await chat(client, stream=True, stream_options={"include_usage": True})
    events = events_of(response.content)
    num_prompt = len(engine.requests[0].prompt_token_ids)
    num_total = num_prompt + 2
    tails = [
        '"choices":[{"index":0,"delta":{"role":"assistant","content":"Hello"},"logprobs":null,"finish_reason":null}],'
        '"usage":null}',
        '"choices":[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop"}],"usage":null}',
        f'"choices":[],"usage":{{"prompt_tokens":{num_prompt},"completion_tokens":2,"total_tokens":{num_total},'
        '"prompt_tokens_details":{"cached_tokens":0}}}',
    ]
    expected = "".join(
        f'data: {{"object":"chat.completion.chunk","id":"{event["id"]}","created":{event["created"]},'
        '"model":"org/model",'
        f'"system_fingerprint":"3.3.6-dev0-native",{tail}\n\n'
        for event, tail in zip(events, tails, strict=True)
    )
    assert response.content.decode() == expected + "data: [DONE]\n\n"
    assert response.headers["content-type"] == "text/event-stream"


async def test_stream_logprobs_show_the_hidden_token(client: httpx.AsyncClient) -> None:
    last = events_of((await chat(client, stream=True, logprobs=True)).content)[-1]["choices"][0]
    assert last["delta"]["content"] == ""
    assert last["logprobs"]["content"] == [
        {"token": "<|im_end|>", "logprob": -0.5, "bytes": [*b"<|im_end|>"], "top_logprobs": []}
    ]


async def test_stream_fails_midway(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.events = one_by_one([5], None)
    engine.script.error = "boom"
    body = (await chat(client, stream=True)).content
    assert body.endswith(
        b'data: {"error":{"message":"Request failed during generation: Server error: boom",'
        b'"type":"server_error","code":"generation","param":null}}\n\ndata: [DONE]\n\n'
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_template_error_comes_before_the_stream(engine: FakeEngine, tmp_path: Any, stream: bool) -> None:
    write_model_folder(tmp_path, "{{ raise_exception('no system role') }}")
    tokenizer = TextTokenizer.from_folder(str(tmp_path), 1)
    async with client_of(create_app(engine, make_config(), tokenizer)) as client:
        response = await chat(client, stream=stream)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"] == "Template error: no system role"
    assert error["code"] == "template_error"


@pytest.fixture
async def sdk(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="any", max_retries=0) as client:
        yield client


async def test_sdk_plain(sdk: openai.AsyncOpenAI) -> None:
    completion = await sdk.chat.completions.create(model="", messages=SDK_USER, logprobs=True)
    assert completion.choices[0].message.content == "Hello, world!"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None and completion.usage.completion_tokens == 5
    assert [model.id async for model in sdk.models.list()] == ["org/model"]


async def test_sdk_stream(sdk: openai.AsyncOpenAI, engine: FakeEngine, ids_of: Callable[[str], list[int]]) -> None:
    engine.script.events = one_by_one(ids_of("你好 👩‍👩‍👧<|im_end|>"))
    stream = await sdk.chat.completions.create(
        model="",
        messages=SDK_USER,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "你好 👩‍👩‍👧"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None


async def test_sdk_sees_refusals(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        await sdk.chat.completions.create(model="", messages=SDK_USER, temperature=-1)
    assert "`temperature` must be >= 0.0" in raised.value.response.text


async def test_sdk_sees_refusals_before_the_stream(sdk: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="`temperature` must be >= 0.0"):
        await sdk.chat.completions.create(model="", messages=SDK_USER, temperature=-1, stream=True)


async def test_sdk_sees_failures_in_the_stream(sdk: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.script.events = one_by_one([5], None)
    engine.script.error = "boom"
    stream = await sdk.chat.completions.create(model="", messages=SDK_USER, stream=True)
    with pytest.raises(openai.APIError, match="Server error: boom"):
        async for _ in stream:
            pass
