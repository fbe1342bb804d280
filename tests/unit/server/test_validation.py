"""Each refusal's exact text and status, in TGI's order; and what reaches the engine."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest

from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import LIMITS, FakeEngine, client_of, events_of, make_config

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hey"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


async def generate(client: httpx.AsyncClient, inputs: str = "x", **parameters: Any) -> httpx.Response:
    return await client.post("/generate", json={"inputs": inputs, "parameters": parameters})


def openai_error(text: str, code: str, param: str) -> dict[str, Any]:
    return {"error": {"message": text, "type": "invalid_request_error", "code": code, "param": param}}


def assert_invalid(response: httpx.Response, text: str) -> None:
    assert response.json() == {"error": f"Input validation error: {text}", "error_type": "validation"}
    assert (response.status_code, response.headers["content-type"]) == (422, "application/json")
    assert not any(name.startswith("x-") for name in response.headers)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 2, "temperature": 1.0, "seed": 0}, "`seed` must not be set when `best_of` > 1"),
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
        ({"temperature": 1e-50}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 1}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 0.99999999}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_k": -1}, "`top_k` must be strictly positive"),
        ({"min_p": 1.1}, "`min_p` must be >= 0.0 and <= 1.0"),
        ({"presence_penalty": -3}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"logit_bias": {"5": 101}}, "`logit_bias` must be >= -100.0 and <= 100.0"),
        ({"logit_bias": {"1000000": 1}}, "`logit_bias` token 1000000 is not in the model's vocabulary"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"stop": ["a", "#" * 4097]}, "`stop` supports texts of up to 4096 characters"),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 1023. Given: 0"),
        ({"truncate": 1024}, "`truncate` must be strictly positive and less than 1023. Given: 1024"),
        (
            {"max_new_tokens": 1024},
            "`inputs` tokens + `max_new_tokens` must be <= 1024. Given: 1 `inputs` tokens and 1024 `max_new_tokens`",
        ),
        (
            {"max_new_tokens": 9999},
            "`inputs` tokens + `max_new_tokens` must be <= 1024. Given: 1 `inputs` tokens and 1024 `max_new_tokens`",
        ),
    ],
)
async def test_parameters_refused(client: httpx.AsyncClient, parameters: dict[str, Any], text: str) -> None:
    assert_invalid(await generate(client, **parameters), text)


async def test_empty_input(client: httpx.AsyncClient) -> None:
    assert_invalid(await generate(client, ""), "`inputs` cannot be empty")


async def test_prompt_of_the_whole_window(client: httpx.AsyncClient) -> None:
    assert_invalid(await generate(client, "龘" * 341 + "a"), "`inputs` must have less than 1023 tokens. Given: 1024")


async def test_prompt_longer_than_the_window(client: httpx.AsyncClient) -> None:
    text = "`inputs` tokens + `max_new_tokens` must be <= 1024. Given: 1026 `inputs` tokens and 0 `max_new_tokens`"
    assert_invalid(await generate(client, "龘" * 342), text)


async def test_first_failure_wins(client: httpx.AsyncClient) -> None:
    assert_invalid(await generate(client, "", top_k=0, temperature=0), "`temperature` must be strictly positive")
    response = await generate(client, "龘" * 342, grammar={"type": "json", "value": "{"})
    assert "1026 `inputs` tokens" in response.text


async def test_best_of_where_only_one_is_allowed(engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    async with client_of(create_app(engine, make_config(max_best_of=1), tokenizer)) as client:
        assert_invalid(await generate(client, best_of=2), "`best_of` != 1 is not allowed for this endpoint")


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"best_of": 2}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ],
)
async def test_stream_refused_in_the_stream(client: httpx.AsyncClient, parameters: dict[str, Any], text: str) -> None:
    response = await client.post("/generate_stream", json={"inputs": "x", "parameters": parameters})
    event = {"error": f"Input validation error: {text}", "error_type": "validation"}
    assert (response.status_code, events_of(response.content)) == (200, [event])


@pytest.mark.parametrize(
    "parameters",
    [
        {"best_of": 0},
        {"best_of": 1},
        {"repetition_penalty": 1.0},
        {"frequency_penalty": 0.0},
        {"top_n_tokens": 0},
        {"watermark": False},
        {"decoder_input_details": True},
        {"adapter_id": "unknown"},
        {"stop": list("abcd")},
        {"stop": ["#" * 4096]},
        {"truncate": 1023},
    ],
)
async def test_values_without_effect_are_accepted(client: httpx.AsyncClient, parameters: dict[str, Any]) -> None:
    assert (await generate(client, **parameters)).status_code == 200


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"temperature": -1.0}, "`temperature` must be >= 0.0"),
        ({"top_p": 1.5}, "`top_p` must be >= 0.0 and <= 1.0"),
        ({"top_k": -2}, "`top_k` must be >= -1"),
        ({"typical_p": 0}, "`typical_p` must be > 0.0 and <= 1.0"),
        ({"max_tokens": 0}, "`max_tokens` must be strictly positive"),
        ({"max_completion_tokens": 0}, "`max_completion_tokens` must be strictly positive"),
        ({"frequency_penalty": 3}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_logprobs": 21}, "`top_logprobs` must be >= 0 and <= 20. Given: 21"),
        ({"n": 0}, "`n` must be > 0 and <= 128. Given: 0"),
        ({"n": 129}, "`n` must be > 0 and <= 128. Given: 129"),
    ],
)
async def test_chat_refused(client: httpx.AsyncClient, body: dict[str, Any], text: str) -> None:
    for stream in (False, True):
        response = await client.post(CHAT, json={"messages": USER, "stream": stream} | body)
        assert (response.status_code, response.headers["content-type"]) == (400, "application/json")
        error = response.json()["error"]
        assert (error["message"], [error["param"]]) == (f"Input validation error: {text}", [*body][-1:])


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"tools": [TOOL], "tool_choice": "g"}, "Tool with name g not found"),
        ({"tools": [TOOL], "tool_choice": {"function": {"name": "g"}}}, "Tool with name g not found"),
        (
            {"tools": [{"type": "f", "function": {"name": "f", "parameters": 3}}], "tool_choice": "f"},
            "The parameters of f are not a JSON schema",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_tool_errors_come_before_the_stream(
    client: httpx.AsyncClient, body: dict[str, Any], text: str, stream: bool
) -> None:
    response = await client.post(CHAT, json={"messages": USER, "stream": stream} | body)
    assert response.status_code == 400
    assert response.json() == openai_error(f"Tool error: {text}", "tool_error", "tools")


@pytest.mark.parametrize(
    "body",
    [
        {"presence_penalty": 0, "frequency_penalty": 0, "top_p": 1, "n": 1, "logit_bias": {}},
        {"tools": [], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "top_logprobs": 0},
        {"stop": None, "max_completion_tokens": 5, "model": None, "stream": None, "stream_options": None},
    ],
)
async def test_chat_values_without_effect_are_accepted(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    assert (await client.post(CHAT, json={"messages": USER} | body)).status_code == 200


@pytest.mark.parametrize(
    ("parameters", "is_greedy"),
    [
        (None, False),  # docs/compatibility.md, row 1
        ({}, True),
        ({"temperature": 1.0}, True),
        ({"temperature": 0.99999999}, True),
        ({"temperature": 1.0, "seed": 5}, True),
        ({"temperature": 0.5}, False),
        ({"top_k": 1}, False),
        ({"top_p": 0.9}, False),
        ({"do_sample": True}, False),
    ],
)
async def test_greedy_or_sampling(
    client: httpx.AsyncClient, engine: FakeEngine, parameters: dict[str, Any] | None, is_greedy: bool
) -> None:
    body = {"inputs": "x"} if parameters is None else {"inputs": "x", "parameters": parameters}
    assert (await client.post("/generate", json=body)).status_code == 200
    assert (engine.requests[0].sampling.seed is None) == is_greedy


async def test_sampling_parameters_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await generate(client, temperature=0.7, top_k=3, top_p=0.5, seed=2**64 - 1, max_new_tokens=7)
    request = engine.requests[0]
    sampling = request.sampling
    assert (sampling.top_k, sampling.top_p, sampling.seed) == (3, 0.5, 2**64 - 1)
    assert sampling.temperature == pytest.approx(0.7, abs=1e-7)
    assert request.max_new_tokens == 7


async def test_random_seeds_differ(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await generate(client, do_sample=True)
    await generate(client, do_sample=True)
    first, second = engine.requests
    assert first.sampling.seed != second.sampling.seed
    assert first.request_id != second.request_id


async def test_chat_is_sampling_unless_temperature_is_zero(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for body in ({}, {"temperature": 0}):
        await client.post(CHAT, json={"messages": USER} | body)
    assert [request.sampling.seed is None for request in engine.requests] == [False, True]


async def test_budget_fills_the_window(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await generate(client)
    assert engine.requests[0].max_new_tokens == LIMITS.max_total_tokens - 1


async def test_budget_beyond_the_check_is_cut_to_the_window(tokenizer: TextTokenizer, engine: FakeEngine) -> None:
    engine.limits_now = msgspec.structs.replace(LIMITS, max_input_tokens=2047, max_total_tokens=2048)
    async with client_of(create_app(engine, make_config(), tokenizer)) as client:
        await generate(client, max_new_tokens=1500)
        await generate(client, max_new_tokens=100_000)
    assert [request.max_new_tokens for request in engine.requests] == [1500, 2047]


async def test_truncate_keeps_the_last_tokens(
    client: httpx.AsyncClient, engine: FakeEngine, tokenizer: TextTokenizer
) -> None:
    response = await generate(client, "Hello, world! 龘", truncate=3)
    assert tokenizer.decode(engine.requests[0].prompt_token_ids) == "龘"
    assert (response.headers["x-prompt-tokens"], response.headers["x-compute-characters"]) == ("3", "15")
