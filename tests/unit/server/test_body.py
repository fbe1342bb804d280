"""Refusals before any handler: status, media type and text."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import BodyError
from server.requests.body import _parse
from tests.unit.server.harness import FakeEngine

JSON = {"content-type": "application/json"}
BAD_JSON = "Failed to parse the request body as JSON: "
BAD_SHAPE = "Failed to deserialize the JSON body into the target type: "


async def post(client: httpx.AsyncClient, body: str | bytes, path: str = "/generate") -> httpx.Response:
    return await client.post(path, content=body, headers=JSON)


def assert_refused(response: httpx.Response, status: int, text: str) -> None:
    assert (response.status_code, response.text) == (status, text)
    assert response.headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-json", "application/jsonx", "é/*"])
async def test_media_type_is_required(client: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {b"content-type": content_type.encode()}
    response = await client.post("/generate", content=b'{"inputs":"x"}', headers=headers)
    assert_refused(response, 415, "Expected request with `Content-Type: application/json`")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"])
async def test_media_types_that_are_json(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post("/generate", content=b'{"inputs":"x"}', headers={"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{", "EOF while parsing an object at line 1 column 1"),
        ('{"inputs"', "EOF while parsing an object at line 1 column 9"),
        ('{"inputs":', "EOF while parsing a value at line 1 column 10"),
        ('{"inputs":"x"', "EOF while parsing an object at line 1 column 13"),
        ('{"inputs":"x', "EOF while parsing a string at line 1 column 10"),
        ("{\n  inputs: 1}", "key must be a string at line 2 column 2"),
        ("nonsense", "expected value at line 1 column 0"),
        ('{"inputs" "x"}', "expected `:` at line 1 column 10"),
        ('{"a":1 "b":2}', "expected `,` or `}` at line 1 column 7"),
        ('{"a":"\\x"}', "invalid escape at line 1 column 6"),
        ('{"a":"\n"}', "control character (\\u0000-\\u001F) found while parsing a string at line 1 column 6"),
        ('{"a":NaN}', "expected value at line 1 column 0"),
        ('{"a":1e999}', "number out of range at line 1 column 0"),
        ('{"a":"\\ud800"}', "invalid unicode code point at line 1 column 0"),
        ('{"\\ud800":1}', "invalid unicode code point at line 1 column 0"),
        (b'{"a":"\xff"}', "invalid unicode code point at line 1 column 0"),
        ("[" * 5000, "recursion limit exceeded at line 1 column 0"),
        ("[" * 200 + "]" * 200, "recursion limit exceeded at line 1 column 0"),
    ],
)
async def test_not_json(client: httpx.AsyncClient, body: str | bytes, reason: str) -> None:
    assert_refused(await post(client, body), 400, BAD_JSON + reason)


@pytest.mark.parametrize("tail", [" garbage", "}", b"\xff", '{"inputs":1}'])
async def test_what_follows_the_first_value_is_not_read(client: httpx.AsyncClient, tail: str | bytes) -> None:
    tail = tail if isinstance(tail, bytes) else tail.encode()
    assert (await post(client, b' \n{"inputs":"x"}' + tail)).status_code == 200


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: invalid value: integer `-1`, expected u32"),
        ({"max_new_tokens": 20.5}, "max_new_tokens: invalid type: floating point `20.5`, expected u32"),
        ({"max_new_tokens": 20.0}, "max_new_tokens: invalid type: floating point `20.0`, expected u32"),
        ({"max_new_tokens": "20"}, 'max_new_tokens: invalid type: string "20", expected u32'),
        ({"max_new_tokens": 2**32}, "max_new_tokens: invalid value: integer `4294967296`, expected u32"),
        ({"max_new_tokens": 10**30}, "max_new_tokens: invalid type: floating point `1e+30`, expected u32"),
        ({"seed": 2**64}, "seed: invalid value: integer `18446744073709551616`, expected u64"),
        ({"best_of": True}, "best_of: invalid type: boolean `true`, expected usize"),
        ({"top_k": -(2**31) - 1}, "top_k: invalid value: integer `-2147483649`, expected i32"),
        ({"temperature": "a"}, 'temperature: invalid type: string "a", expected f32'),
        ({"temperature": False}, "temperature: invalid type: boolean `false`, expected f32"),
        ({"do_sample": None}, "do_sample: invalid type: null, expected a boolean"),
        ({"do_sample": 1}, "do_sample: invalid type: integer `1`, expected a boolean"),
        ({"stop": None}, "stop: invalid type: null, expected a sequence"),
        ({"stop": "x"}, 'stop: invalid type: string "x", expected a sequence'),
        ({"stop": ["x", 1]}, "stop[1]: invalid type: integer `1`, expected a string"),
        ({"adapter_id": {}}, "adapter_id: invalid type: map, expected a string"),
        ({"grammar": {"type": "regex"}}, "grammar: missing field `value`"),
        (
            {"grammar": {"type": "text", "value": 1}},
            "grammar.type: unknown variant `text`, expected one of `json`, `json_object`, `json_schema`, `regex`",
        ),
    ],
)
async def test_wrong_parameters(client: httpx.AsyncClient, parameters: dict[str, Any], reason: str) -> None:
    body = json.dumps({"inputs": "x", "parameters": parameters})
    assert_refused(await post(client, body), 422, f"{BAD_SHAPE}parameters.{reason} at line 1 column {len(body)}")


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/generate", "{}", "missing field `inputs`"),
        ("/generate", '{"inputs":null}', "inputs: invalid type: null, expected a string"),
        (
            "/generate",
            '{"inputs":"x","parameters":null}',
            "parameters: invalid type: null, expected struct GenerateParameters",
        ),
        ("/generate", "[]", "invalid type: sequence, expected struct GenerateRequest"),
        ("/generate", '{"inputs":"x","inputs":"y"}', "duplicate field `inputs`"),
        ("/", '{"inputs":"x","stream":null}', "stream: invalid type: null, expected a boolean"),
        ("/v1/chat/completions", "{}", "missing field `messages`"),
        ("/v1/chat/completions", '{"messages":[5]}', "messages[0]: invalid type: integer `5`, expected struct Message"),
        ("/v1/chat/completions", '{"messages":[{"content":"x"}]}', "messages[0]: missing field `role`"),
        (
            "/v1/chat/completions",
            '{"messages":[{"role":"user","role":"user","content":""}]}',
            "messages[0]: duplicate field `role`",
        ),
        (
            "/v1/chat/completions",
            '{"messages":[{"role":"user","content":5}]}',
            "messages[0].content: invalid type: integer `5`, expected a string or a list of parts",
        ),
        (
            "/v1/chat/completions",
            '{"messages":[{"role":"assistant","content":null,"tool_calls":[{"id":"0"}]}]}',
            "messages[0].tool_calls[0]: missing field `function`",
        ),
        (
            "/v1/chat/completions",
            '{"messages":[],"max_tokens":1,"max_tokens":2}',
            "duplicate field `max_tokens`",
        ),
        (
            "/v1/chat/completions",
            '{"messages":[],"tool_choice":5}',
            'tool_choice: invalid value, expected "none", "auto", "required", '
            '{"type": "function", "function": {"name": NAME}} or '
            '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}',
        ),
    ],
)
async def test_wrong_shapes(client: httpx.AsyncClient, path: str, body: str, reason: str) -> None:
    text = f"{BAD_SHAPE}{reason} at line 1 column {len(body)}"
    response = await post(client, body, path)
    if path.startswith("/v1/"):
        assert (response.status_code, response.json()["error"]["message"]) == (400, text)
    else:
        assert_refused(response, 422, text)


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ('"stop":"x"', 'stop: invalid type: string "x", expected a sequence'),
        ('"stream":null', "stream: invalid type: null, expected a boolean"),
        ('"stream_options":null', "stream_options: invalid type: null, expected struct StreamOptions"),
        ('"logit_bias":{}', "logit_bias: invalid type: map, expected a sequence"),
        ('"response_format":{"type":"json_object"}', "response_format: missing field `value`"),
    ],
)
async def test_what_openai_allows_is_wrong_to_tgi(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, field: str, reason: str
) -> None:
    body = f'{{"messages":[{{"role":"user","content":"hey"}}],{field}}}'
    response = await post(strict_client, body, "/v1/chat/completions")
    assert_refused(response, 422, f"{BAD_SHAPE}{reason} at line 1 column {len(body)}")
    assert (await post(client, body, "/v1/chat/completions")).status_code == 200


@pytest.mark.parametrize(
    ("bias", "reason"),
    [
        ([0.5], "logit_bias: invalid type: sequence, expected a map"),
        ({"x": 1}, 'logit_bias: invalid value: string "x", expected a token id'),
        ({"-1": 1}, 'logit_bias: invalid value: string "-1", expected a token id'),
        ({"5": "1"}, 'logit_bias: invalid type: string "1", expected f32'),
    ],
)
async def test_wrong_logit_bias(client: httpx.AsyncClient, bias: Any, reason: str) -> None:
    body = json.dumps({"messages": [], "logit_bias": bias})
    response = await post(client, body, "/v1/chat/completions")
    message = f"{BAD_SHAPE}{reason} at line 1 column {len(body)}"
    error = {"message": message, "type": "invalid_request_error", "param": "logit_bias"}
    assert response.status_code == 400
    assert {key: value for key, value in response.json()["error"].items() if key != "code"} == error


async def test_unknown_keys_are_ignored_even_twice(client: httpx.AsyncClient) -> None:
    body = '{"inputs":"x","user":1,"user":2,"parameters":{"foo":null},"stream":"not read here"}'
    assert (await post(client, body)).status_code == 200


async def test_nulls_that_are_allowed(client: httpx.AsyncClient) -> None:
    names = "best_of temperature repetition_penalty frequency_penalty top_k top_p typical_p max_new_tokens"
    names += " return_full_text truncate seed top_n_tokens grammar adapter_id"
    response = await client.post("/generate", json={"inputs": "x", "parameters": dict.fromkeys(names.split())})
    assert response.status_code == 200


@given(st.text('{}[]":,\\ntrue0123.-eu\n \ud800é', max_size=30) | st.text(max_size=30))
def test_anything_is_parsed_or_refused(text: str) -> None:
    try:
        _, end = _parse(text)
    except BodyError as error:
        assert error.status == 400
        assert str(error).startswith(BAD_JSON)
    else:
        json.loads(text[:end])


async def test_many_repeated_keys_take_no_time(client: httpx.AsyncClient) -> None:
    body = "{" + ",".join(f'"{index % 900}":0' for index in range(1800)) + ',"inputs":"x"}'
    assert (await post(client, body)).status_code == 200


async def test_body_too_large(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post("/generate", json={"inputs": "x" * 20_000})
    assert_refused(response, 413, "Failed to buffer the request body: length limit exceeded")
    assert engine.requests == []


async def test_body_too_large_without_a_length_is_not_read_to_its_end(client: httpx.AsyncClient) -> None:
    num_sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_sent
        while True:
            num_sent += 1
            yield b" " * 1000

    response = await client.post("/generate", content=endless(), headers=JSON)
    assert_refused(response, 413, "Failed to buffer the request body: length limit exceeded")
    assert num_sent < 30


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nope", 404, None),
        ("GET", "/info/", 404, None),
        ("GET", "/doc", 404, None),
        ("GET", "/embeddings", 404, None),
        ("GET", "/generate", 405, "POST"),
        ("POST", "/info", 405, "GET,HEAD"),
        ("DELETE", "/generate_stream", 405, "POST"),
    ],
)
async def test_no_such_route(client: httpx.AsyncClient, method: str, path: str, status: int, allow: str | None) -> None:
    response = await client.request(method, path)
    assert (response.status_code, response.content, response.headers.get("allow")) == (status, b"", allow)
