"""Values that OpenAI's clients send and TGI refuses, and what the engine is asked for then."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.unit.server.harness import FakeEngine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hey"}]},
    COMPLETIONS: {"prompt": "x"},
}
both_routes = pytest.mark.parametrize("path", BODIES)


async def ask(client: httpx.AsyncClient, path: str, **said: Any) -> httpx.Response:
    return await client.post(path, json=BODIES[path] | said)


@both_routes
@pytest.mark.parametrize(
    "said",
    [
        {"top_p": 0},
        {"top_p": 0.0, "temperature": 0.7},
        {"temperature": 0, "top_p": 0.9},
        {"temperature": 0, "top_k": 40, "min_p": 0.1, "typical_p": 0.5},
        {"temperature": 0, "seed": 7},
    ],
)
async def test_the_likeliest_token(client: httpx.AsyncClient, engine: FakeEngine, path: str, said: Any) -> None:
    assert (await ask(client, path, **said)).status_code == 200
    assert engine.requests[0].sampling.seed is None


@both_routes
@pytest.mark.parametrize("stop", ["", [""], ["", "world"]])
async def test_an_empty_stop_string_ends_nothing(client: httpx.AsyncClient, path: str, stop: Any) -> None:
    [choice] = (await ask(client, path, stop=stop)).json()["choices"]
    text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    assert text == ("Hello, " if "world" in stop else "Hello, world!")


@both_routes
@pytest.mark.parametrize("said", [{"temperature": 0, "top_p": 7}, {"top_p": 0, "top_k": -5}, {"top_p": -0.1}])
async def test_values_without_effect_are_checked(client: httpx.AsyncClient, path: str, said: Any) -> None:
    assert (await ask(client, path, **said)).status_code == 400


@both_routes
async def test_filters_that_are_off(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    assert (await ask(client, path, top_p=1, typical_p=1, top_k=0, min_p=0)).status_code == 200
    sampling = engine.requests[0].sampling
    assert sampling.seed is not None
    assert (sampling.top_p, sampling.typical_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)


@both_routes
@pytest.mark.parametrize(
    ("seed", "expected"), [(-2, 2**64 - 2), (-(2**63), 2**63), (0, 0), (5, 5), (2**63, 2**63), (2**64 - 1, 2**64 - 1)]
)
async def test_seeds(client: httpx.AsyncClient, engine: FakeEngine, path: str, seed: int, expected: int) -> None:
    assert (await ask(client, path, seed=seed)).status_code == 200
    assert engine.requests[0].sampling.seed == expected


@both_routes
async def test_a_seed_of_minus_one_is_a_random_one(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    for _ in range(2):
        assert (await ask(client, path, seed=-1)).status_code == 200
    first, second = (request.sampling.seed for request in engine.requests)
    assert None not in (first, second)
    assert first != second


@both_routes
@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64, 1.5, "1", True])
async def test_what_is_no_seed(client: httpx.AsyncClient, path: str, seed: Any) -> None:
    response = await ask(client, path, seed=seed)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "seed")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"max_tokens": None, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": None}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 7, "max_completion_tokens": 5}, 5),
        ({"max_completion_tokens": 5, "max_tokens": 7}, 5),
    ],
)
async def test_both_names_of_the_length(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, engine: FakeEngine, said: Any, expected: int
) -> None:
    assert (await ask(client, CHAT, **said)).status_code == 200
    assert engine.requests[0].max_new_tokens == expected
    assert (await ask(strict_client, CHAT, **said)).status_code == 422


@pytest.mark.parametrize(("path", "key"), [(CHAT, "top_logprobs"), (COMPLETIONS, "logprobs")])
async def test_twenty_likeliest_tokens(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, engine: FakeEngine, path: str, key: str
) -> None:
    assert (await ask(client, path, **{key: 20})).status_code == 200
    assert engine.requests[0].sampling.num_top_tokens == 20
    refused = await ask(client, path, **{key: 21})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, key)
    assert "<= 20" in refused.text
    native = {"inputs": "x", "parameters": {"top_n_tokens": 6}}
    assert (await client.post("/generate", json=native)).status_code == 422
    assert (await ask(strict_client, CHAT, top_logprobs=6)).status_code == 422


@both_routes
@pytest.mark.parametrize("said", [{"top_p": 0}, {"top_p": 1}, {"seed": -1}, {"seed": -2}])
async def test_tgi_refuses_them(strict_client: httpx.AsyncClient, path: str, said: Any) -> None:
    assert (await ask(strict_client, path, **said)).status_code == 422
