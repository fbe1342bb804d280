"""What OpenAI's routes answer to a bad request: 400, with the type, code and param that OpenAI's clients branch on."""

from __future__ import annotations

import gzip
import json
import re
from typing import Any

import httpx
import pytest

from server.requests.rows import Dialect
from server.requests.sampling import ROWS
from server.requests.wording import CHAT_WORDINGS, COMPLETIONS_WORDING
from server.routes import adapters
from tests.unit.server.harness import FakeEngine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n"}}
SCHEMA_PATH = "response_format.json_schema.schema"
MISSING = "missing_required_parameter"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
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
        (CHAT, chat(response_format=NO_SCHEMA), SCHEMA_PATH, "missing_required_parameter"),
        (CHAT, chat(response_format=NO_SCHEMA, tools=[TOOL]), SCHEMA_PATH, "missing_required_parameter"),
        (CHAT, chat(response_format={"type": "json_schema"}), "response_format.json_schema", MISSING),
        (
            CHAT,
            chat(response_format={"type": "json_schema", "json_schema": None}),
            "response_format.json_schema",
            MISSING,
        ),
        (CHAT, {"messages": []}, "messages", "invalid_value"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", MISSING),
        (CHAT, {"messages": [{"role": "tool", "tool_call_id": "x"}]}, "messages[0].content", MISSING),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        (CHAT, {"messages": [{"role": "user", "content": ["x", 5]}]}, "messages[0].content[1]", "invalid_type"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", MISSING),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
            MISSING,
        ),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": "x"}]}, "messages[0].tool_calls", "invalid_type"),
        (CHAT, chat(max_completion_tokens=0), "max_completion_tokens", "integer_below_min_value"),
        (CHAT, chat(max_tokens=5, max_completion_tokens=0), "max_completion_tokens", "integer_below_min_value"),
        (CHAT, chat(max_tokens=0, max_completion_tokens=None), "max_tokens", "integer_below_min_value"),
        (CHAT, chat(max_tokens=False, max_completion_tokens=5), "max_tokens", "invalid_type"),
        (CHAT, chat(max_tokens=-1, max_completion_tokens=5), "max_tokens", "invalid_value"),
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


LONG = "龘" * 1000
USER = [{"role": "user", "content": "hey"}]
CALL_ITEM = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def asked(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages), "max_tokens": 5}


def said(role: str, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


def tool_result(content: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "c", "content": content}


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (CHAT, chat(max_tokens=1020), "`messages` tokens + `max_tokens` must be <= 1024"),
        (CHAT, chat(max_tokens=1025), " and 1025 `max_tokens`"),
        (CHAT, chat(max_completion_tokens=2**32 - 1), f" and {2**32 - 1} `max_completion_tokens`"),
        (COMPLETIONS, completion(max_tokens=5000), " and 5000 `max_tokens`"),
        (RESPONSES, {"input": "x", "max_output_tokens": 5000}, " and 5000 `max_output_tokens`"),
        (MESSAGES, {"messages": USER, "max_tokens": 5000}, " and 5000 `max_tokens`"),
        (CHAT, chat(max_completion_tokens=1020), "`messages` tokens + `max_completion_tokens` must be <= 1024"),
        (CHAT, chat(min_tokens=5, max_completion_tokens=3), "`min_tokens` must be <= `max_completion_tokens`"),
        (CHAT, chat(top_logprobs=100), "`top_logprobs` must be"),
        (COMPLETIONS, completion(max_tokens=0), "`max_tokens` must be strictly positive"),
        (COMPLETIONS, completion(prompt=LONG), "`prompt` tokens + `max_tokens`"),
        (COMPLETIONS, completion(logprobs=100), "`logprobs` must be"),
        (COMPLETIONS, completion(truncate_prompt_tokens=0), "`truncate_prompt_tokens` must be"),
        (RESPONSES, {"input": LONG}, "`input` tokens + `max_output_tokens`"),
        (RESPONSES, {"input": "x", "max_output_tokens": 0}, "`max_output_tokens` must be strictly positive"),
        (RESPONSES, {"input": []}, "there are no messages"),
        (RESPONSES, {"input": [{"content": "x"}]}, "input[0]: missing field `role`"),
        (RESPONSES, {"input": [{"type": "function_call"}]}, "input[0]: missing field `name`"),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]},
            "input[0].content[0].text: ",
        ),
        (
            RESPONSES,
            {"input": [*USER, {"type": "function_call_output", "call_id": "c", "output": {}}]},
            "input[1].output: invalid type: map",
        ),
        (
            RESPONSES,
            {"input": [{"type": "function_call_output", "output": [{"type": "input_text"}]}]},
            "input[0].output[0].text: invalid type: null",
        ),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": 5, "output": ""}]}, "input[0].call_id: "),
        (
            RESPONSES,
            {"instructions": "x", "input": [*USER, CALL_ITEM, CALL_ITEM | {"call_id": 5}]},
            "input[2].call_id: invalid type",
        ),
        (
            RESPONSES,
            {"input": [*USER, {"type": "reasoning", "id": "r"}, CALL_ITEM, CALL_ITEM | {"name": 5}]},
            "input[3].name: invalid type",
        ),
        (
            RESPONSES,
            {"input": [CALL_ITEM, {"role": "assistant", "content": 5}]},
            "input[1].content: invalid type",
        ),
        (MESSAGES, asked(*USER, said("user", tool_result(5))), "messages[1].content[0].content: invalid type"),
        (
            MESSAGES,
            asked(said("user", tool_result("x"), tool_result({"a": 1}), {"type": "text", "text": "x"})),
            "messages[0].content[1].content: invalid type: map",
        ),
        (
            MESSAGES,
            asked(said("user", tool_result("x"), {"type": "text", "text": 5})),
            "messages[0].content[1].text: invalid type",
        ),
        (
            MESSAGES,
            asked(said("user", tool_result([{"type": "text"}]))) | {"system": "x"},
            "messages[0].content[0].content[0].text: invalid type: null",
        ),
        (
            MESSAGES,
            asked(said("user", tool_result("x") | {"tool_use_id": 5})),
            "messages[0].content[0].tool_use_id: invalid type",
        ),
        (
            MESSAGES,
            asked(*USER, said("assistant", {"type": "thinking"}, {"type": "text", "text": "x"}, {"type": "tool_use"})),
            "messages[1].content[2]: missing field `name`",
        ),
        (
            MESSAGES,
            asked(said("assistant", {"type": "thinking"}, {"type": "text"})),
            "messages[0].content[1].text: invalid type: null",
        ),
        (
            MESSAGES,
            asked(said("assistant", {"type": "tool_use", "name": "f", "id": 5})),
            "messages[0].content[0].id: invalid type",
        ),
        (MESSAGES, asked(*USER) | {"system": [{"type": "text"}]}, "system[0].text: invalid type: null"),
        (RESPONSES, {"input": "x", "tools": [{"type": "function"}]}, "tools[0]: missing field `name`"),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "f"}}}, "text.format.type: unknown variant"),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format: missing field `schema`"),
        (MESSAGES, {"messages": USER, "max_tokens": 0}, "`max_tokens` must be strictly positive"),
        (MESSAGES, {"messages": USER, "max_tokens": 5, "stop_sequences": list("abcde")}, "`stop_sequences` supports"),
        (MESSAGES, {"messages": USER, "max_tokens": 5, "tools": [{}]}, "tools[0]: missing field `name`"),
        (
            MESSAGES + "/count_tokens",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text: ",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_has_the_words_of_the_request(
    client: httpx.AsyncClient, path: str, body: Any, named: str, stream: bool
) -> None:
    response = await client.post(path, json=body | {"stream": stream})
    error = response.json()["error"]
    assert (response.status_code, named in error["message"]) == (400, True), error["message"]
    words = re.findall(r"[\w.\[\]]+", f"{error['message']} {error.get('param')}")
    assert not {"max_new_tokens", "inputs", "truncate", "top_n_tokens"}.intersection(words)
    if path == RESPONSES:
        assert not [
            word for word in words if re.match(r"messages\[|max_tokens|response_format|.*(function|tool_calls)", word)
        ]
    if path.startswith(MESSAGES):
        assert not [word for word in words if re.match(r".*(function|tool_calls)", word)]


@pytest.mark.parametrize("dialect", [Dialect.CHAT, Dialect.COMPLETIONS])
def test_every_refusal_of_a_parameter_has_the_name_of_the_dialect(dialect: Dialect) -> None:
    wording = CHAT_WORDINGS["max_completion_tokens"] if dialect is Dialect.CHAT else COMPLETIONS_WORDING
    for name, row in ROWS.items():
        if row.refusal is not None and row.refusal.applies is None and dialect in row.spellings:
            text = wording.text(row.refusal.text)
            assert any(f"`{key}`" in text for key in row.keys(name, dialect)), text
            assert wording.name(name) in row.keys(name, dialect)


async def test_a_key_that_comes_twice_is_named(client: httpx.AsyncClient, strict_client: httpx.AsyncClient) -> None:
    content = '{"messages": [], "max_completion_tokens": 5, "max_completion_tokens": 5}'
    for http, name in ((client, "max_completion_tokens"), (strict_client, "max_tokens")):
        response = await http.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert f"duplicate field `{name}`" in response.text


async def test_the_log_has_the_words_of_the_request(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    await client.post(CHAT, json=chat(max_completion_tokens=0))
    assert "`max_completion_tokens` must be strictly positive" in caplog.text


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/chat", "/v1/chat/completions/", "/v1/" + "x" * 1000])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_an_unknown_path(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, path: str, method: str
) -> None:
    response = await client.request(method, path)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (404, "invalid_request_error", "unknown_url")
    assert error["message"].startswith(f"Unknown request URL: {method} {path[:100]}")
    assert len(error["message"]) < 300
    strict = await strict_client.request(method, path)
    assert (strict.status_code, strict.content) == (404, b"")


@pytest.mark.parametrize("path", [operation.path for operation in adapters.area.operations])
async def test_a_path_that_needs_a_flag_names_it(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, path: str
) -> None:
    response = await client.post(path, json={})
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": f"Unknown request URL: POST {path}, which is there if the server starts with "
        "--allow-runtime-lora-updating",
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_url",
    }
    strict = await strict_client.post(path, json={})
    assert (strict.status_code, strict.content) == (404, b"")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES, "/v1/models"])
async def test_another_method(client: httpx.AsyncClient, path: str) -> None:
    method, allowed = ("POST", "GET,HEAD") if path == "/v1/models" else ("GET", "POST")
    response = await client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    error = response.json()["error"]
    assert (error["type"], error["message"]) == (
        "invalid_request_error",
        f"{method} is not allowed here, only {allowed}",
    )


async def test_native_paths_are_refused_without_a_body(client: httpx.AsyncClient) -> None:
    for method, path, status in (("GET", "/generate", 405), ("POST", "/nothing", 404), ("GET", "/v1", 404)):
        response = await client.request(method, path)
        assert (response.status_code, response.content) == (status, b"")


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
async def test_a_body_that_is_too_long_is_told_the_limit(client: httpx.AsyncClient, path: str) -> None:
    limit = "length limit exceeded. A body may have 20000 bytes; `--payload-limit` raises that"
    headers = {"content-type": "application/json"}
    for content in (b"0" * 30_000, gzip.compress(b"0" * 30_000)):
        encoding = {} if content.startswith(b"0") else {"content-encoding": "gzip"}
        response = await client.post(path, content=content, headers=headers | encoding)
        assert (response.status_code, limit in response.json()["error"]["message"]) == (413, True)
    native = await client.post("/generate", content=b"0" * 30_000, headers=headers)
    assert native.text == "Failed to buffer the request body: length limit exceeded"


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
