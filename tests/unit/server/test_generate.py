"""The native routes: shapes, key order, headers, the bytes of a stream, errors on the way."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from engine.link.logs import JsonFormatter
from engine.link.messages import FinishReason, TokenEvent
from server.answers.sse import EventStream
from server.app import create_app
from server.edge.admission import Admission
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, events_of, make_config, one_by_one, running_server, url_of

HEADERS = {
    "x-compute-type",
    "x-compute-time",
    "x-compute-characters",
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
    "x-prompt-tokens",
    "x-generated-tokens",
}
OVERLOADED = {"error": "Model is overloaded", "error_type": "overloaded"}
FAILED = {
    "error": "Request failed during generation: Server error: logits are not finite",
    "error_type": "generation",
}


def names(response: httpx.Response) -> set[str]:
    return {name for name in response.headers if name.startswith("x-")}


async def stream(client: httpx.AsyncClient, **parameters: Any) -> list[dict[str, Any]]:
    response = await client.post("/generate_stream", json={"inputs": "x", "parameters": parameters})
    return events_of(response.content)


async def test_plain_answer(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post("/generate", json={"inputs": "Hello", "parameters": {}})
    assert (response.status_code, response.text) == (200, '{"generated_text":"Hello, world!"}')
    assert response.headers["content-type"] == "application/json"
    assert names(response) == HEADERS
    assert response.headers["x-compute-type"] == "test"
    assert response.headers["x-compute-characters"] == "5"
    assert (response.headers["x-prompt-tokens"], response.headers["x-generated-tokens"]) == ("1", "5")
    assert response.headers["x-queue-time"] == "1"
    assert engine.aborted == []


async def test_details(client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]]) -> None:
    ids = ids_of(" world<|im_end|>")
    engine.script.events = one_by_one(ids, logprob=-0.65478515625)
    response = await client.post("/generate", json={"inputs": "x", "parameters": {"details": True}})
    assert response.text == (
        '{"generated_text":" world","details":{"finish_reason":"eos_token","generated_tokens":2,"seed":null,'
        f'"prefill":[],"tokens":[{{"id":{ids[0]},"text":" world","logprob":-0.65478516,"special":false}},'
        f'{{"id":{ids[1]},"text":"<|im_end|>","logprob":-0.65478516,"special":true}}]}}}}'
    )


async def test_prompt_logprobs(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]]
) -> None:
    ids = ids_of("a 龘")
    engine.script.events[0].prompt_logprobs = [-0.5, -1.25, -2.0, -0.125][: len(ids) - 1]
    body = {"inputs": "a 龘", "parameters": {"decoder_input_details": True}}
    details = (await client.post("/generate", json=body)).json()["details"]
    assert [item["id"] for item in details["prefill"]] == ids
    assert [item["logprob"] for item in details["prefill"]] == [None, *engine.script.events[0].prompt_logprobs]
    assert [set(item) for item in details["prefill"]] == [{"id", "text", "logprob"}] * len(ids)
    assert details["prefill"][-1]["text"] == "\ufffd"
    strict = (await strict_client.post("/generate", json=body)).json()["details"]
    assert strict["prefill"] == []  # docs/compatibility.md, row 33
    assert [request.has_prompt_logprobs for request in engine.requests] == [True, False]


async def test_best_of(client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]]) -> None:
    worse, better = (one_by_one(ids_of(f"{word}<|im_end|>"), logprob=-1.0) for word in ("Hello", " world"))
    better[0].logprobs = [-0.25]
    engine.script.scripts = [worse, better]
    parameters = {"best_of": 2, "do_sample": True, "details": True, "top_n_tokens": 1}
    for events in (worse, better):
        for item in events:
            item.top_token_ids, item.top_logprobs = [[5, 6]], [[-0.125, -0.125]]
    answer = (await client.post("/generate", json={"inputs": "x", "parameters": parameters})).json()
    assert answer["generated_text"] == " world"
    details = answer["details"]
    assert list(details) == [
        "finish_reason",
        "generated_tokens",
        "seed",
        "prefill",
        "tokens",
        "best_of_sequences",
        "top_tokens",
    ]
    (other,) = details["best_of_sequences"]
    assert (other["generated_text"], other["generated_tokens"]) == ("Hello", len(worse))
    assert [len(tokens) for tokens in other["top_tokens"]] == [2] * len(worse)
    first, second = engine.requests
    assert first.request_id != second.request_id
    assert [details["seed"], other["seed"]] == [second.sampling.seed, first.sampling.seed]


async def test_a_failing_sequence_ends_the_others(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.scripts = [one_by_one([5] * 3, None), one_by_one([5] * 900)]
    engine.script.errors = ["boom", None]
    parameters = {"best_of": 2, "do_sample": True}
    response = await client.post("/generate", json={"inputs": "x", "parameters": parameters})
    assert response.status_code == 424
    assert engine.aborted == [engine.requests[1].request_id]


@pytest.mark.parametrize(
    ("path", "parameters", "text"),
    [
        ("/generate", {}, "Hello, world!"),
        ("/generate", {"return_full_text": True}, "Say: Hello, world!"),
        ("/", {}, "Say: Hello, world!"),  # docs/compatibility.md, row 2
        ("/", {"return_full_text": None}, "Say: Hello, world!"),
        ("/", {"return_full_text": False}, "Hello, world!"),
    ],
)
async def test_return_full_text(client: httpx.AsyncClient, path: str, parameters: dict[str, Any], text: str) -> None:
    response = await client.post(path, json={"inputs": "Say: ", "parameters": parameters})
    answer = response.json()
    assert (answer[0] if path == "/" else answer) == {"generated_text": text}
    assert names(response) == HEADERS


async def test_compat_route_without_parameters_samples_and_echoes(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    response = await client.post("/", json={"inputs": "Say: "})
    assert response.json() == [{"generated_text": "Say: Hello, world!"}]
    assert engine.requests[0].sampling.seed is not None


async def test_stream_bytes(client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]]) -> None:
    hello, end = ids_of("Hello<|im_end|>")
    engine.script.events = one_by_one([hello, end])
    engine.script.events[1].logprobs = [-0.01]
    body = {"inputs": "Hello", "parameters": {"details": True}}
    response = await client.post("/generate_stream", json=body)
    assert response.content.decode() == (
        f'data: {{"index":1,"token":{{"id":{hello},"text":"Hello","logprob":-0.5,"special":false}},'
        '"generated_text":null,"details":null}\n\n'
        f'data: {{"index":2,"token":{{"id":{end},"text":"<|im_end|>","logprob":-0.01,"special":true}},'
        '"generated_text":"Hello","details":{"finish_reason":"eos_token","generated_tokens":2,"seed":null,'
        '"input_length":1}}\n\n'
    )
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert names(response) == {"x-compute-type", "x-compute-characters", "x-accel-buffering"}


async def test_compat_stream_is_generate_stream(client: httpx.AsyncClient) -> None:
    response = await client.post("/", json={"inputs": "Say: ", "stream": True, "parameters": {}})
    last = events_of(response.content)[-1]
    assert (last["generated_text"], last["details"]) == ("Say: Hello, world!", None)


async def test_stream_and_plain_agree(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]]
) -> None:
    text = "naïve 你好 👩‍👩‍👧 龘"
    engine.script.events = one_by_one(ids_of(text), FinishReason.LENGTH)
    events = await stream(client)
    assert "".join(event["token"]["text"] for event in events) == text
    assert events[-1]["generated_text"] == text
    assert (await client.post("/generate", json={"inputs": "x"})).json() == {"generated_text": text}


async def test_several_tokens_in_one_engine_event(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]]
) -> None:
    ids = ids_of("Hello, world!<|im_end|>")
    engine.script.events = [
        TokenEvent(request_id="", token_ids=ids[:2], logprobs=[-0.5] * 2),
        TokenEvent(request_id="", token_ids=ids[2:], logprobs=[-0.5] * 3, finish_reason=FinishReason.EOS_TOKEN),
    ]
    events = await stream(client)
    assert [event["index"] for event in events] == [1, 2, 3, 4, 5]
    assert [event["generated_text"] for event in events] == [None] * 4 + ["Hello, world!"]


async def test_character_left_incomplete_is_dropped_and_not_the_text(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]]
) -> None:
    engine.script.events = one_by_one(ids_of("ok") + ids_of("龘")[:2], FinishReason.LENGTH)
    answer = await client.post("/generate", json={"inputs": "x"})
    assert answer.json() == {"generated_text": "ok"}  # docs/compatibility.md, row 13


async def test_stop_string_ends_and_aborts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    events = await stream(client, stop=["lo, w"], details=True)
    assert [event["token"]["text"] for event in events] == ["Hello", ",", " w"]
    assert events[-1]["generated_text"] == "Hello, w"
    assert events[-1]["details"]["finish_reason"] == "stop_sequence"
    assert engine.aborted == [engine.requests[0].request_id]


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.EOS_TOKEN])
async def test_engines_reason_wins_over_a_stop_string(
    client: httpx.AsyncClient, engine: FakeEngine, ids_of: Callable[[str], list[int]], reason: FinishReason
) -> None:
    engine.script.events = one_by_one(ids_of("Hello, world!"), reason)
    events = await stream(client, stop=["!"], details=True)
    assert events[-1]["details"]["finish_reason"] == reason
    assert engine.aborted == []


async def test_overload(engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    engine.script.pause_s = 0.05
    async with client_of(create_app(engine, make_config(max_concurrent_requests=1), tokenizer)) as client:
        running = asyncio.create_task(client.post("/generate", json={"inputs": "x"}))
        await asyncio.sleep(0.05)
        invalid = {"inputs": "", "parameters": {"temperature": 0}}
        refused = [
            await client.post("/generate", json=invalid),  # nothing is looked at before a permit is there
            await client.post("/generate_stream", json={"inputs": "x"}),
            await client.post("/", json={"inputs": "x", "stream": True}),
            await client.post("/v1/chat/completions", json={"messages": [], "stream": True}),
        ]
        for response in refused:
            assert response.status_code == 429
            assert "retry-after" not in response.headers
        assert [response.json() for response in refused[:3]] == [OVERLOADED] * 3
        assert refused[3].json()["error"]["code"] == "overloaded"
        assert (await running).status_code == 200
        for _ in range(2):  # the permit of a stream comes back as well
            assert (await client.post("/generate_stream", json={"inputs": "x"})).status_code == 200


async def test_strict_overload_of_a_stream_is_an_event(engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    engine.script.pause_s = 0.05
    app = create_app(engine, make_config(max_concurrent_requests=1, is_strict_tgi=True), tokenizer)
    async with client_of(app) as client:
        running = asyncio.create_task(client.post("/generate", json={"inputs": "x"}))
        await asyncio.sleep(0.05)
        streamed = await client.post("/generate_stream", json={"inputs": "x"})
        chat = await client.post("/v1/chat/completions", json={"messages": [], "stream": True})
        assert (streamed.status_code, events_of(streamed.content)) == (200, [OVERLOADED])
        error = b'data: {"error":{"message":"Model is overloaded","http_status_code":422}}\n\ndata: [DONE]\n\n'
        assert (chat.status_code, chat.content) == (200, error)
        assert (await running).status_code == 200
        assert (await client.post("/generate", json={"inputs": "x"})).status_code == 200


async def test_a_stream_nobody_reads_gives_its_permit_back(engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    """The client has left before the first event is asked for: the generator that would release it never starts."""
    admission = Admission(1)
    stream = EventStream(_never(), {}, admission.permit(1).release)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        await stream({"type": "http", "method": "POST", "asgi": {"spec_version": "2.4"}}, receive, send)
    assert admission.num_free == 1


async def _never() -> AsyncIterator[bytes]:
    raise AssertionError("started")
    yield b""


async def test_permits_come_back_after_refusals_and_failures(engine: FakeEngine, tokenizer: TextTokenizer) -> None:
    engine.script.error = "boom"
    engine.script.events = []
    async with client_of(create_app(engine, make_config(max_concurrent_requests=1), tokenizer)) as client:
        statuses = [
            (await client.post("/generate", json={"inputs": inputs})).status_code for inputs in ("", "x", "", "x")
        ]
    assert statuses == [422, 424, 422, 424]


async def test_engine_fails_midway(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.events = one_by_one([5, 6], None)
    engine.script.error = "logits are not finite"
    response = await client.post("/generate", json={"inputs": "x"})
    assert (response.status_code, response.json()) == (424, FAILED)
    events = await stream(client)
    assert [event.get("index") for event in events] == [1, 2, None]
    assert events[-1] == FAILED


async def test_engine_ends_without_a_last_token(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.script.events = one_by_one([5, 6], None)
    error = {"error": "Incomplete generation", "error_type": "incomplete_generation"}
    response = await client.post("/generate", json={"inputs": "x"})
    assert (response.status_code, response.json()) == (500, error)
    assert (await stream(client))[-1] == error


async def test_unforeseen_error(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script.events = [TokenEvent(request_id="", token_ids=[1, 2], logprobs=[])]
    error = {"error": "Internal server error", "error_type": "internal"}
    response = await client.post("/generate", json={"inputs": "x"})
    assert (response.status_code, response.json()) == (500, error)
    assert await stream(client) == [error]
    assert caplog.records[-1].levelname == "ERROR"
    assert caplog.records[-1].exc_info is not None


async def test_log_lines(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "server"):
        await client.post("/generate", json={"inputs": "secret", "parameters": {"seed": 42, "do_sample": True}})
        await client.post("/generate", json={"inputs": "secret", "parameters": {"top_k": 0}})
    success, failure = (record for record in caplog.records if record.name.startswith("server"))
    assert (success.levelname, success.getMessage()) == ("INFO", "Success")
    span = success.span  # type: ignore[attr-defined]
    times = ["total_time", "validation_time", "queue_time", "inference_time", "time_per_token"]
    own = ["route", "request_id", "prompt_tokens", "generated_tokens"]
    assert list(span) == ["name", "parameters", *times, "seed", *own]
    assert (span["parameters"], span["seed"]) == ("{'do_sample': True, 'seed': 42}", "Some(42)")
    assert all(re.fullmatch(r"[\d.]+(ns|µs|ms|s)", span[name]) for name in times)
    assert (failure.levelname, failure.getMessage()) == ("WARNING", "`top_k` must be strictly positive")
    assert failure.span.keys() == {"name", "route", "request_id"}  # type: ignore[attr-defined]
    assert "secret" not in caplog.text


CHAT = {"messages": [{"role": "user", "content": "secret"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/", {"inputs": "secret"}),
        ("/generate", {"inputs": "secret"}),
        ("/generate_stream", {"inputs": "secret"}),
        ("/invocations", {"inputs": "secret"}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/completions", {"prompt": "secret"}),
        ("/v1/responses", {"input": "secret"}),
        ("/v1/messages", {**CHAT, "max_tokens": 5}),
        ("/vertex", {"instances": [{"inputs": "secret"}]}),
    ],
)
async def test_the_line_of_a_request_says_where_it_came_and_how_long_it_was(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    with caplog.at_level(logging.INFO, "server"):
        response = await client.post(path, json=body)
    assert response.status_code == 200
    (line,) = (json.loads(JsonFormatter().format(record)) for record in caplog.records if record.msg == "Success")
    span = line["span"]
    assert span["route"] == path
    assert span["request_id"].startswith("req_")
    assert span["prompt_tokens"] > 0 and span["generated_tokens"] == 5


@pytest.mark.parametrize(
    ("error", "body"),
    [
        ("`top_k` must be strictly positive", b'{"inputs": "secret", "parameters": {"top_k": 0}}'),
        (
            "the request body has not the fields and types of this route",
            b'{"inputs": "secret", "parameters": {"top_k": "secret"}}',
        ),
        ("the request body is not JSON", b'{"inputs": "secret"'),
    ],
)
async def test_a_clients_mistake_is_one_warning(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, error: str, body: bytes
) -> None:
    with caplog.at_level(logging.INFO, "server"):
        for path in ("/generate", "/generate_stream"):
            await client.post(path, content=body, headers={"content-type": "application/json"})
    lines = [(record.levelname, record.getMessage(), vars(record)["span"]["route"]) for record in caplog.records]
    own = [line for line in lines if line[1] == error]
    assert own == [("WARNING", error, path) for path in ("/generate", "/generate_stream")]
    assert "secret" not in caplog.text


async def test_with_tgi_lines_have_its_fields_and_mistakes_are_errors(
    strict_client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "server"):
        await strict_client.post("/generate", json={"inputs": "x"}, headers={"x-request-id": "a"})
        await strict_client.post("/generate", json={"inputs": "x", "parameters": {"top_k": 0}})
        await strict_client.post("/generate", json={"inputs": "x", "parameters": {"top_k": "0"}})
    success, failure = (record for record in caplog.records if record.name.startswith("server"))
    assert list(success.span)[-1] == "seed"  # type: ignore[attr-defined]
    assert (failure.levelname, failure.span) == ("ERROR", {"name": "generate"})  # type: ignore[attr-defined]


async def test_a_dropped_request_has_its_line_too(
    app: FastAPI, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script.stall_after = 2
    with caplog.at_level(logging.INFO, "server"), running_server(app) as server:
        async with (
            httpx.AsyncClient(base_url=url_of(server)) as client,
            client.stream("POST", "/generate_stream", json={"inputs": "secret"}) as response,
        ):
            await anext(response.aiter_lines())
        while not engine.aborted:
            await asyncio.sleep(0.01)
    (record,) = (record for record in caplog.records if record.name.startswith("server"))
    assert record.getMessage() == "Cancelled"
