"""TGI's own API description as a floor: every path, field and status of it is in ours and in what the server does.

tgi_surface.json lists the facts of TGI's document, less what its code contradicts (`docs/wire.md`, 9).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import ObligingEngine, client_of, events_of, make_config, write_model_folder

SURFACE: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "tgi_surface.json").read_text())

NATIVE: dict[str, Any] = {
    "adapter_id": "any",
    "best_of": 1,
    "decoder_input_details": False,
    "details": True,
    "do_sample": True,
    "frequency_penalty": 0.5,
    "grammar": {"type": "json", "value": {"properties": {"name": {"type": "string"}}}},
    "max_new_tokens": 5,
    "repetition_penalty": 1.1,
    "return_full_text": False,
    "seed": 42,
    "stop": ["END"],
    "temperature": 0.7,
    "top_k": 10,
    "top_n_tokens": 2,
    "top_p": 0.9,
    "truncate": 100,
    "typical_p": 0.95,
    "watermark": True,
}
CHAT: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1.0},
    "logprobs": True,
    "max_tokens": 5,
    "messages": [{"role": "user", "content": "hey"}],
    "model": "tgi",
    "n": 1,
    "presence_penalty": 0.1,
    "seed": 42,
    "stop": ["END"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "temperature": 0.7,
    "tool_choice": "none",
    "tool_prompt": "Use a tool.",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "top_logprobs": 2,
    "top_p": 0.9,
}
FORMATTED = CHAT | {"tools": None, "response_format": {"type": "regex", "value": "Hello.*"}}
COMPLETION: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "max_tokens": 5,
    "model": "tgi",
    "prompt": ["What", "is"],
    "repetition_penalty": 1.1,
    "seed": 42,
    "stop": ["END"],
    "stream": False,
    "suffix": None,
    "temperature": 0.7,
    "top_p": 0.9,
}
SEVERAL = {"best_of": 2, "seed": None, "decoder_input_details": True}
PLAIN = [{"inputs": "What is", "parameters": NATIVE}, {"inputs": "What is", "parameters": NATIVE | SEVERAL}]
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "/": [*(body | {"stream": False} for body in PLAIN), PLAIN[0] | {"stream": True}],
    "/generate": PLAIN,
    "/generate_stream": PLAIN[:1],
    "/tokenize": PLAIN,
    "/v1/chat/completions": [CHAT, FORMATTED, CHAT | {"stream": True}],
    "/chat_tokenize": [CHAT, FORMATTED],
    "/v1/completions": [COMPLETION, COMPLETION | {"stream": True}],
    "/invocations": [PLAIN[0], PLAIN[0] | {"stream": True}, CHAT, CHAT | {"stream": True}, COMPLETION],
}


@pytest.fixture
def app(tmp_path: Path) -> FastAPI:
    write_model_folder(tmp_path)
    tokenizer = TextTokenizer.from_folder(str(tmp_path), 1)
    engine = ObligingEngine(tokenizer._encode("Hello, world!<|im_end|>", False))
    return create_app(engine, make_config(), tokenizer)


def fields_of(value: Any, name: str = "") -> Iterator[str]:
    """Every field in `value` and every one above it, as `choices[].message.role`."""
    yield name
    if isinstance(value, list):
        for item in value:
            yield from fields_of(item, f"{name}[]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from fields_of(item, f"{name}.{key}".lstrip("."))


async def call(client: httpx.AsyncClient, path: str) -> list[httpx.Response]:
    if SURFACE[path]["method"] == "GET":
        return [await client.get(path)]
    return [await client.post(path, json=body) for body in REQUESTS[path]]


@pytest.mark.parametrize("path", SURFACE)
def test_the_description_has_every_status_and_media_type(app: FastAPI, path: str) -> None:
    facts = SURFACE[path]
    operation = app.state.openapi["paths"][path][facts["method"].lower()]
    assert operation["responses"].keys() >= {str(status) for status in facts["statuses"]}
    assert operation["responses"]["200"].get("content", {}).keys() >= facts["answers"].keys()


@pytest.mark.parametrize("path", [path for path in SURFACE if "request" in SURFACE[path]])
def test_the_description_has_every_field_of_a_request(app: FastAPI, path: str) -> None:
    document = app.state.openapi
    described = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(_described_fields(document, described)) >= set(SURFACE[path]["request"])


def _described_fields(document: dict[str, Any], schema: dict[str, Any], name: str = "") -> Iterator[str]:
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    yield name
    for choice in schema.get("anyOf", ()):
        if choice.keys() != {"required"}:
            yield from _described_fields(document, choice, name)
    for key, field in schema.get("properties", {}).items():
        yield from _described_fields(document, field, f"{name}.{key}".lstrip("."))


@pytest.mark.parametrize("path", [path for path in SURFACE if "request" in SURFACE[path]])
def test_requests_are_complete(path: str) -> None:
    """The bodies of this file have every field, so that the next test sends it."""
    assert set(SURFACE[path]["request"]) <= {field for body in REQUESTS[path] for field in fields_of(body)}


@pytest.mark.parametrize("path", SURFACE)
async def test_every_field_is_accepted_and_answered(app: FastAPI, path: str) -> None:
    answered: dict[str, set[str]] = {}
    async with client_of(app) as client:
        for response in await call(client, path):
            assert response.status_code == 200, response.text
            media = response.headers.get("content-type", "")
            if media == "application/json":
                answered.setdefault(media, set()).update(fields_of(response.json()))
            if media == "text/event-stream":
                for data in events_of(response.content):
                    answered.setdefault(media, set()).update(fields_of(data))
    for media, fields in SURFACE[path]["answers"].items():
        assert answered[media] >= set(fields)
