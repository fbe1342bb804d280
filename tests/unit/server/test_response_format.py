"""`response_format` of a chat: OpenAI's shapes and TGI's, in both modes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.unit.server.harness import FakeEngine

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TGI_SHAPES: list[Any] = [
    {"type": "json", "value": CITY},
    {"type": "json_object", "value": CITY},
    {"type": "json_schema", "value": {"name": "city", "schema": CITY}},
    {"type": "regex", "value": "city: [A-Z][a-z]+"},
]
OPENAI_SHAPES: list[Any] = [
    {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
    {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": None}},
    {"type": "json_object"},
    {"type": "json_object", "schema": CITY},
]


async def ask(http: httpx.AsyncClient, response_format: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "hey"}], "response_format": response_format}
    return await http.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize("response_format", TGI_SHAPES)
async def test_shapes_of_tgi(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, engine: FakeEngine, response_format: Any
) -> None:
    assert (await ask(client, response_format)).status_code == 200
    assert (await ask(strict_client, response_format)).status_code == 200
    assert all("city" in (request.grammar or "") for request in engine.requests)


@pytest.mark.parametrize("response_format", OPENAI_SHAPES)
async def test_shapes_of_openai(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, engine: FakeEngine, response_format: Any
) -> None:
    assert (await ask(client, response_format)).status_code == 200
    assert ("city" in (engine.requests[0].grammar or "{}")) == (len(response_format) > 1)
    refusal = await ask(strict_client, response_format)
    assert (refusal.status_code, refusal.headers["content-type"]) == (422, "text/plain; charset=utf-8")
    assert "response_format: missing field `value`" in refusal.text


@pytest.mark.parametrize("response_format", [None, {"type": "text"}])
async def test_text(client: httpx.AsyncClient, engine: FakeEngine, response_format: Any) -> None:
    assert (await ask(client, response_format)).status_code == 200
    assert engine.requests[0].grammar is None


@pytest.mark.parametrize(
    ("response_format", "reason"),
    [
        ({"type": "json_schema", "value": {"name": "city"}}, "grammar is not valid: missing field `schema`"),
        ({"type": "json_object", "value": "{"}, "grammar is not valid: "),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}, "strict": True}},
            "grammar is not valid: ",
        ),
        ({"type": "regex", "value": "("}, "grammar is not valid: "),
    ],
)
async def test_refusals(client: httpx.AsyncClient, response_format: Any, reason: str) -> None:
    response = await ask(client, response_format)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith(f"Input validation error: {reason}")
    assert error["param"] == "response_format"


async def test_unknown_type(client: httpx.AsyncClient) -> None:
    response = await ask(client, {"type": "xml", "value": ""})
    assert response.status_code == 400
    assert "response_format.type: unknown variant `xml`" in response.text


@pytest.mark.parametrize("response_format", [*TGI_SHAPES[:2], *OPENAI_SHAPES])
async def test_completions_have_it_too(
    client: httpx.AsyncClient, strict_client: httpx.AsyncClient, engine: FakeEngine, response_format: Any
) -> None:
    """TGI ignores it there."""
    body = {"prompt": "hey", "response_format": response_format}
    for http in (client, strict_client):
        assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert [request.grammar is None for request in engine.requests] == [False, True]


async def test_completions_refuse_what_chats_refuse(client: httpx.AsyncClient) -> None:
    body = {"prompt": "hey", "response_format": {"type": "regex", "value": "("}}
    response = await client.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
