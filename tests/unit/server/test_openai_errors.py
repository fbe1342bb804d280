"""What OpenAI's routes answer to a bad request: 400, with the type, code and param that OpenAI's clients branch on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.unit.server.harness import FakeEngine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def chat(**said: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hey"}]} | said


def completion(**said: Any) -> dict[str, Any]:
    return {"prompt": "x"} | said


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        (CHAT, {}, "messages", "missing_required_parameter"),
        (CHAT, {"messages": 5}, "messages", "invalid_type"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        (CHAT, chat(tools=[{"type": "function", "function": {}}]), "tools[0].function.name", None),
        (CHAT, chat(temperature="hot"), "temperature", "invalid_type"),
        (CHAT, chat(temperature=-1), "temperature", "decimal_below_min_value"),
        (CHAT, chat(top_p=1.5), "top_p", "decimal_above_max_value"),
        (CHAT, chat(max_tokens=0), "max_tokens", "integer_below_min_value"),
        (CHAT, chat(top_logprobs=100), "top_logprobs", "integer_above_max_value"),
        (CHAT, chat(stop=list("abcde")), "stop", "array_above_max_length"),
        (CHAT, chat(logit_bias={"1": 101}), "logit_bias", "decimal_above_max_value"),
        (CHAT, chat(logit_bias={str(10**7): 1}), "logit_bias", "invalid_value"),
        (CHAT, chat(n=0), "n", "invalid_value"),
        (CHAT, chat(tools=[TOOL], tool_choice="g"), "tools", None),
        (CHAT, chat(response_format={"type": "regex", "value": "("}), "response_format", "invalid_value"),
        (CHAT, chat(response_format=NO_SCHEMA), "response_format", "invalid_value"),
        (CHAT, chat(response_format=NO_SCHEMA, tools=[TOOL]), "response_format", "invalid_value"),
        (CHAT, chat(continue_final_message=True, add_generation_prompt=True), "add_generation_prompt", "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": "龘" * 1000}]}, "messages", "context_length_exceeded"),
        (CHAT, chat(max_tokens=1020), "messages", "context_length_exceeded"),
        (COMPLETIONS, {}, "prompt", "missing_required_parameter"),
        (COMPLETIONS, completion(prompt=""), "prompt", "invalid_value"),
        (COMPLETIONS, completion(prompt=[[10**7]]), "prompt", "invalid_value"),
        (COMPLETIONS, completion(prompt=[5] * 1500), "prompt", "context_length_exceeded"),
        (COMPLETIONS, completion(logprobs=100), "logprobs", "integer_above_max_value"),
        (COMPLETIONS, completion(best_of=1, n=2), "best_of", "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_request(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: Any, param: str, code: str | None, stream: bool
) -> None:
    response = await client.post(path, json=body | {"stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert code is None or error["code"] == code
    assert error["message"]
    assert not engine.requests


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [(b"{", "application/json", 400), (b"{}", "text/plain", 415), (b"0" * 30_000, "application/json", 413)],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_body_that_is_not_read(
    client: httpx.AsyncClient, path: str, content: bytes, content_type: str, status: int
) -> None:
    response = await client.post(path, content=content, headers={"content-type": content_type})
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", None, None)


async def test_too_much_in_a_body(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, content=b"1" * 2_000, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_tgi_keeps_its_own_errors(client: httpx.AsyncClient, strict_client: httpx.AsyncClient) -> None:
    """On native routes in both modes, and on all routes under --strict-tgi."""
    for http, path, body in (
        (client, "/generate", {"inputs": "x", "parameters": {"top_p": 2}}),
        (strict_client, "/generate", {"inputs": "x", "parameters": {"top_p": 2}}),
        (strict_client, CHAT, chat(top_p=2)),
        (strict_client, COMPLETIONS, completion(top_p=2)),
    ):
        response = await http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert (response.status_code, [*response.json()]) == (422, ["error", "error_type"])
