"""No line above debug has a client's words, and nothing that a client sends is answered with a traceback."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.link.logs import HumanFormatter, JsonFormatter
from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.diagonal import diagonal
from tests.unit.server.harness import FakeEngine, client_of, make_config

WORD = "zebrafish"
HUGE = "9" * 5000
"""An integer beyond the number of digits that Python reads."""
LARGE = "9" * 4000
"""An integer that Python reads, and most other readers don't."""

SCHEMA = {"type": "object", "properties": {"answer": {"type": "string", "enum": ["yes"], "pattern": "y"}}}
FUNCTION = {"name": "look", "description": "d", "parameters": SCHEMA}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"answer": 1}'}}
MESSAGES = [
    {"role": "user", "content": "Hello", "name": "me"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": [{"type": "text", "text": "an answer"}], "tool_call_id": "1"},
]
CHAT: dict[str, Any] = {
    "model": "tgi",
    "messages": MESSAGES,
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "required",
    "tool_prompt": "use them",
    "stop": ["stop"],
    "logit_bias": {"5": 1.5},
    "seed": 3,
    "max_tokens": 4,
}
PARAMETERS = {
    "stop": ["stop"],
    "adapter_id": "adapter",
    "grammar": {"type": "json", "value": SCHEMA},
    "logit_bias": {"5": 1.5},
    "max_new_tokens": 4,
    "top_k": 5,
    "details": True,
}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "Hello", "parameters": PARAMETERS}),
    ("/generate_stream", {"inputs": "Hello", "parameters": PARAMETERS}),
    ("/generate", {"inputs": "Hello", "parameters": {"grammar": {"type": "regex", "value": "a+"}}}),
    ("/generate", {"inputs": "Hello", "parameters": {"grammar": {"type": "json", "value": json.dumps(SCHEMA)}}}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "tool_choice": {"type": "function", "function": {"name": "look"}}}),
    ("/v1/chat/completions", {**CHAT, "tools": None, "response_format": {"type": "json_schema", "value": SCHEMA}}),
    ("/v1/completions", {"prompt": ["Hello", "You"], "suffix": None, "stop": "stop", "model": "m", "max_tokens": 4}),
    ("/tokenize", {"inputs": "Hello", "parameters": PARAMETERS}),
    ("/chat_tokenize", CHAT),
    ("/detokenize", {"tokens": [1, 2]}),
    ("/vertex", {"instances": [{"inputs": "Hello", "parameters": PARAMETERS}]}),
    ("/invocations", {"inputs": "Hello", "parameters": {"max_new_tokens": 2}}),
]

NAMED_BODIES = {f"{number}{path}": (path, body) for number, (path, body) in enumerate(BODIES)}
KINDS = {"ours": False, "strict": True}
DIGITS = {"5000 digits": HUGE, "4000 digits": LARGE}
OTHER_PAIRS = [("4/v1/chat/completions", "5000 digits", "strict"), ("5/v1/chat/completions", "4000 digits", "ours")]
"""On the diagonal the longer integer goes to ours and the other to the strict one; in a chat they go crosswise, too."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a body."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(body: dict[str, Any], path: tuple[Any, ...], change: Callable[[Any], Any]) -> dict[str, Any]:
    whole = copy.deepcopy(body)
    parent: Any = whole
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = change(parent[path[-1]])
    return whole


def renamed(body: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    whole = copy.deepcopy(body)
    parent: Any = whole
    for key in path[:-1]:
        parent = parent[key]
    if isinstance(parent, dict):
        parent[WORD] = parent.pop(path[-1])
    return whole


def with_word(value: Any) -> Any:
    return f"{value}{WORD}(" if isinstance(value, str) else WORD


@pytest.fixture(params=KINDS.values(), ids=KINDS)
async def client(
    request: pytest.FixtureRequest, engine: FakeEngine, model_folder: Path
) -> AsyncIterator[httpx.AsyncClient]:
    config = make_config(payload_limit=200_000, is_strict_tgi=request.param, max_concurrent_requests=4)
    async with client_of(create_app(engine, config, TextTokenizer.from_folder(str(model_folder), 1))) as client:
        yield client


@pytest.mark.parametrize(("case", "client"), diagonal(NAMED_BODIES, KINDS), indirect=["client"])
async def test_no_line_above_debug_has_a_clients_words(
    case: tuple[str, dict[str, Any]], client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    path, body = case
    caplog.set_level(logging.DEBUG)
    engine.script.error = f"the grammar cannot be compiled: {WORD}"  # follows the tokens, for requests that read on
    engine.script.events = engine.script.events[:-1]
    for place in places(body):
        for mutated in (changed(body, place, with_word), renamed(body, place)):
            await client.post(path, json=mutated)
    await client.get(f"/v1/models/{WORD}")
    formatters = (
        HumanFormatter("webserver", has_colours=False, is_hiding_words=True),
        JsonFormatter(is_hiding_words=True),
    )
    lines = [
        (record, formatter.format(record))
        for record in caplog.records
        if record.levelno > logging.DEBUG and record.name.startswith("server")
        for formatter in formatters
    ]
    assert lines
    assert [line for _, line in lines if WORD in line] == []
    assert [record.exc_info for record, _ in lines if record.exc_info] == []


@pytest.mark.parametrize(
    ("case", "digits", "client"), diagonal(NAMED_BODIES, DIGITS, KINDS, also=OTHER_PAIRS), indirect=["client"]
)
async def test_a_huge_integer_is_never_a_traceback_wherever_it_stands(
    case: tuple[str, dict[str, Any]], digits: str, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    path, body = case
    for place in places(body):
        as_text = json.dumps(changed(body, place, lambda _: digits))
        as_key = json.dumps(renamed(body, place)).replace(WORD, digits)
        within = json.dumps(changed(body, place, lambda _: f'{{"type": "object", "maxLength": {digits}}}'))
        for content in (as_text, as_text.replace(f'"{digits}"', digits), as_key, within):
            answer = await client.post(path, content=content, headers={"content-type": "application/json"})
            assert "Internal server error" not in answer.text, (place, answer.text[:300])
    assert [record.getMessage()[:300] for record in caplog.records if record.exc_info] == []


async def test_a_content_length_of_5000_digits_is_too_long(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json", "content-length": HUGE}
    answer = await client.post("/generate", content=b"{}", headers=headers)
    assert answer.status_code == 413


async def test_a_long_map_is_told_by_the_number_of_its_entries(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bias = {str(token_id): 1.0 for token_id in range(300)}
    answer = await client.post("/v1/completions", json={"prompt": "Hello", "logit_bias": bias, "max_tokens": 2})
    assert answer.status_code == 200
    lines = [HumanFormatter("webserver", has_colours=False).format(record) for record in caplog.records]
    assert all(len(line) < 1000 for line in lines)


class PanicException(BaseException):
    """Named as pyo3's, which is no Exception either."""


class PanickingLibrary:
    def __getattr__(self, name: str) -> Any:
        def panic(*_: Any, **__: Any) -> None:
            raise PanicException("byte index 3 is not a char boundary")

        return panic


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/generate", {"inputs": "Hello"}, 422),
        ("/tokenize", {"inputs": "Hello"}, 422),
        ("/detokenize", {"tokens": [1]}, 424),
    ],
)
async def test_a_panic_within_the_tokenizer_is_one_failed_request(
    path: str, body: dict[str, Any], status: int, engine: FakeEngine, model_folder: Path
) -> None:
    tokenizer = TextTokenizer.from_folder(str(model_folder), 1)
    app = create_app(engine, make_config(), tokenizer)
    library, tokenizer._tokenizer = tokenizer._tokenizer, PanickingLibrary()  # type: ignore[assignment]
    async with client_of(app) as client:
        answer = await client.post(path, json=body)
        assert answer.status_code == status
        assert answer.json()["error"].endswith("the tokenizer failed with this text")
        tokenizer._tokenizer = library
        assert (await client.post(path, json=body)).status_code == 200
