"""POST /invocations for SageMaker and /vertex for Vertex AI (`docs/wire.md`, 1.7 and 1.8)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, events_of, make_config, one_by_one

MESSAGES = [{"role": "user", "content": "hey"}]
UNKNOWN = "data did not match any variant of untagged enum SagemakerRequest"


async def invoke(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/invocations", json=body)


async def predict(client: httpx.AsyncClient, *instances: Any) -> httpx.Response:
    return await client.post("/vertex", json={"instances": instances})


async def test_the_shape_of_a_body_tells_the_route(client: httpx.AsyncClient) -> None:
    assert (await invoke(client, inputs="Say ")).json() == [{"generated_text": "Say Hello, world!"}], "as POST /"
    assert (await invoke(client, messages=MESSAGES)).json()["object"] == "chat.completion"
    assert (await invoke(client, prompt="x")).json()["object"] == "text_completion"


async def test_the_first_shape_that_fits_wins(client: httpx.AsyncClient) -> None:
    assert isinstance((await invoke(client, inputs="x", messages=MESSAGES, prompt="x")).json(), list)
    assert (await invoke(client, inputs=1, messages=MESSAGES)).json()["object"] == "chat.completion"


async def test_streams(client: httpx.AsyncClient) -> None:
    native = events_of((await invoke(client, inputs="x", stream=True)).content)
    assert native[-1]["generated_text"] == "xHello, world!"
    chat = await invoke(client, messages=MESSAGES, stream=True)
    assert events_of(chat.content)[0]["object"] == "chat.completion.chunk"
    completion = await invoke(client, prompt="x", stream=True)
    assert events_of(completion.content)[0]["object"] == "text_completion"


@pytest.mark.parametrize("body", [{}, {"inputs": 1}, {"inputs": "x", "parameters": {"top_k": "a"}}, {"messages": [{}]}])
async def test_another_shape_is_refused(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    for one in (client, strict_client):
        response = await invoke(one, **body)
        assert response.status_code == 422
        assert response.text.startswith(f"Failed to deserialize the JSON body into the target type: {UNKNOWN} at line")


async def test_what_only_openai_allows_is_wrong_to_tgi(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient
) -> None:
    body = {"prompt": "x", "stop": "end"}
    assert (await invoke(client, **body)).status_code == 200
    assert (await invoke(strict_client, **body)).status_code == 422


async def test_errors_are_those_of_the_server(client: httpx.AsyncClient) -> None:
    response = await invoke(client, inputs="x", parameters={"temperature": -1})
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")


async def test_predictions(client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]]) -> None:
    engine.script.scripts = [one_by_one(ids_of(text + "<|im_end|>")) for text in ("one", "two")]
    response = await predict(client, {"inputs": "a", "parameters": None}, {"messages": MESSAGES, "stream": True})
    assert response.text == '{"predictions":["one","two"]}'
    assert not [name for name in response.headers if name.startswith("x-")]


async def test_parameters_of_an_instance(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    given = {"max_new_tokens": 3, "seed": 4, "temperature": 0.5, "return_full_text": True, "stop": ["wor"]}
    response = await predict(client, {"inputs": "Say ", "parameters": given})
    assert response.json() == {"predictions": ["Say Hello, wor"]}
    sampling = engine.requests[0].sampling
    assert (sampling.seed, sampling.temperature, engine.requests[0].max_new_tokens) == (4, 0.5, 3)


async def test_parameters_of_an_instance_to_tgi(strict_client: httpx.AsyncClient, engine: FakeEngine) -> None:
    given = {"max_new_tokens": 3, "seed": 4, "temperature": 0.5, "return_full_text": True, "stop": ["wor"]}
    response = await predict(strict_client, {"inputs": "Say ", "parameters": given | {"do_sample": False}})
    assert response.json() == {"predictions": ["Hello, world!"]}
    sampling = engine.requests[0].sampling
    assert (sampling.seed, sampling.temperature, engine.requests[0].max_new_tokens) == (4, 1.0, 3)


@pytest.mark.parametrize(("parameters", "is_greedy"), [(None, False), ({}, False), ({"do_sample": False}, True)])
async def test_sampling_unless_told_otherwise(
    client: httpx.AsyncClient, engine: FakeEngine, parameters: dict[str, Any] | None, is_greedy: bool
) -> None:
    await predict(client, {"inputs": "x", "parameters": parameters})
    assert (engine.requests[0].sampling.seed is None) == is_greedy


async def test_best_of_an_instance(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]]
) -> None:
    words = [("worse", -2.0), ("better", -1.0), ("last", -3.0)]
    engine.script.scripts = [one_by_one(ids_of(word + "<|im_end|>"), logprob=logprob) for word, logprob in words]
    response = await predict(client, {"inputs": "a", "parameters": {"best_of": 2}}, {"inputs": "b"})
    assert response.json() == {"predictions": ["better", "last"]}


async def test_a_chat_gives_one_prediction(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await predict(client, {"messages": MESSAGES, "n": 3})).json() == {"predictions": ["Hello, world!"]}
    assert len(engine.requests) == 1


async def test_no_instance(client: httpx.AsyncClient, strict_client: httpx.AsyncClient) -> None:
    for one in (client, strict_client):
        response = await predict(one)
        assert response.status_code == 422
        assert response.json() == {"error": "Input validation error", "error_type": "Input validation error"}


@pytest.mark.parametrize("instance", [{}, {"inputs": 1}, {"inputs": "x", "parameters": {"stop": None}}, 7])
async def test_another_instance_is_refused(client: httpx.AsyncClient, instance: Any) -> None:
    response = await predict(client, {"inputs": "x"}, instance)
    assert response.status_code == 422
    reason = "instances[1]: data did not match any variant of untagged enum VertexInstance"
    assert response.text.startswith(f"Failed to deserialize the JSON body into the target type: {reason} at line")


BAD = {"inputs": "x", "parameters": {"max_new_tokens": 0}}
FAILED = {"error": "Incomplete generation", "error_type": "Incomplete generation"}


async def test_a_bad_instance_fails_the_call(client: httpx.AsyncClient, strict_client: httpx.AsyncClient) -> None:
    response = await predict(client, {"inputs": "x"}, BAD)
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    response = await predict(strict_client, {"inputs": "x"}, BAD)
    assert (response.status_code, response.json()) == (500, FAILED), "whatever it was"


async def test_a_failing_generation(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.script.events, engine.script.error = one_by_one([5], None), "boom"
    response = await predict(client, {"inputs": "x"}, {"inputs": "y"})
    assert (response.status_code, response.json()["error_type"]) == (424, "generation")
    response = await predict(strict_client, {"inputs": "x"}, {"inputs": "y"})
    assert (response.status_code, response.json()) == (500, FAILED)


async def test_every_instance_takes_a_permit(engine: FakeEngine, model_folder: Path) -> None:
    app = create_app(engine, make_config(max_concurrent_requests=2), TextTokenizer.from_folder(str(model_folder), 1))
    async with client_of(app) as client:
        assert (await predict(client, *[{"inputs": "x"}] * 3)).status_code == 429
        assert (await predict(client, *[{"inputs": "x"}] * 2)).status_code == 200
