"""The API key and cross-origin rules of `docs/wire.md`, 8, on the whole application."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from server.app import AREAS, create_app
from server.operation import operations_of
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config

BODY = {"inputs": "x", "parameters": {"max_new_tokens": 2}}
PROTECTED = [operation for operation in operations_of(AREAS) if operation.is_protected(is_strict=False)]
OPEN_PATHS = ["/", "/health", "/ping", "/info", "/metrics", "/v1/models", "/livez", "/readyz"]
MakeApp = Callable[..., FastAPI]


@pytest.fixture
def make_app(engine: FakeEngine, model_folder: Path) -> MakeApp:
    def make(**changes: Any) -> FastAPI:
        return create_app(engine, make_config(**changes), TextTokenizer.from_folder(str(model_folder), 1))

    return make


@pytest.mark.parametrize("key", ["Bearer s3cret", "bearer s3cret", "Bearer  s3cret"])
async def test_the_right_key_is_let_in(make_app: MakeApp, key: str) -> None:
    async with client_of(make_app(api_key="s3cret")) as client:
        response = await client.post("/generate", json=BODY, headers={"authorization": key})
        assert response.status_code == 200


@pytest.mark.parametrize(
    "key", [None, "", "s3cret", "Bearer", "Bearer ", "Bearer s3cre", "Bearer S3CRET", "Basic s3cret"]
)
async def test_any_other_key_is_401(make_app: MakeApp, engine: FakeEngine, key: str | None) -> None:
    headers = {} if key is None else {"authorization": key}
    async with client_of(make_app(api_key="s3cret")) as client:
        assert len(PROTECTED) == 14
        for path, method in ((operation.path, operation.method) for operation in PROTECTED):
            response = await client.request(method, path, json=BODY, headers=headers)
            assert response.status_code == 401
            if path.startswith("/v1/"):
                error = response.json()["error"]
                assert error["message"] == "The API key is missing or wrong: send it as `Authorization: Bearer KEY`"
                is_anthropic = path.startswith("/v1/messages")
                assert error["type"] == ("authentication_error" if is_anthropic else "invalid_request_error")
                assert error.get("code") == (None if is_anthropic else "invalid_api_key")
            else:
                assert response.content == b""
            assert "www-authenticate" not in response.headers
        assert (await client.get("/generate", headers=headers)).status_code == 401, "before the method is looked at"
        assert (await client.post("/generate", content=b"{", headers=headers)).status_code == 401, "and the body"
    assert not engine.requests


async def test_to_tgi_every_refusal_is_empty(make_app: MakeApp) -> None:
    async with client_of(make_app(api_key="s3cret", is_strict_tgi=True)) as client:
        response = await client.post("/v1/chat/completions", json=BODY)
        assert (response.status_code, response.content) == (401, b"")


async def test_a_key_need_not_be_ascii(make_app: MakeApp) -> None:
    async with client_of(make_app(api_key="schlüssel")) as client:
        headers = {b"authorization": "Bearer schlüssel".encode()}
        response = await client.post("/generate", json=BODY, headers=headers)  # type: ignore[arg-type]
        assert response.status_code == 200


@pytest.mark.parametrize(("is_strict", "status"), [(False, 200), (True, 401)], ids=["default", "strict"])
async def test_the_key_may_stand_where_anthropics_clients_put_it(
    make_app: MakeApp, is_strict: bool, status: int
) -> None:
    async with client_of(make_app(api_key="s3cret", is_strict_tgi=is_strict)) as client:
        answer = await client.post("/generate", json=BODY, headers={"x-api-key": "s3cret"})
        assert answer.status_code == status
        answer = await client.post("/generate", json=BODY, headers={"x-api-key": "s3cre"})
        assert answer.status_code == 401


@pytest.mark.parametrize("path", OPEN_PATHS)
async def test_these_paths_need_no_key(make_app: MakeApp, path: str) -> None:
    async with client_of(make_app(api_key="s3cret")) as client:
        assert (await client.get(path)).status_code == 200


async def test_without_a_key_configured_none_is_looked_at(make_app: MakeApp) -> None:
    async with client_of(make_app()) as client:
        response = await client.post("/generate", json=BODY, headers={"authorization": "Bearer whatever"})
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        ((), "http://page.example", "*"),
        ((), None, "*"),
        (("*",), "http://page.example", "*"),
        (("http://page.example", "http://b.example"), "http://page.example", "http://page.example"),
        (("http://page.example",), "http://other.example", None),
        (("http://page.example",), None, None),
    ],
)
async def test_origins(make_app: MakeApp, origins: tuple[str, ...], origin: str | None, allowed: str | None) -> None:
    headers = {"origin": origin} if origin else {}
    async with client_of(make_app(cors_allow_origin=origins)) as client:
        for response in (
            await client.get("/health", headers=headers),
            await client.post("/generate", json=BODY, headers=headers),
            await client.get("/no-such-path", headers=headers),
        ):
            assert response.headers.get("access-control-allow-origin") == allowed
            assert response.headers["vary"] == "origin, access-control-request-method, access-control-request-headers"


@pytest.mark.parametrize("path", ["/generate", "/health", "/no-such-path"])
async def test_every_options_request_is_a_preflight(make_app: MakeApp, path: str) -> None:
    async with client_of(make_app(api_key="s3cret")) as client:
        response = await client.options(path)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["access-control-allow-methods"] == "GET,POST"
    assert response.headers["access-control-allow-headers"] == "content-type"
    assert response.headers["access-control-allow-origin"] == "*"
