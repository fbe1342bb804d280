"""What a server answers before the model is there, and how the application takes over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.edge.access import CorsHeaders
from server.edge.starting import Gate, StartingApp, StartState
from server.ui.pages import POLICY, SOURCE
from tests.unit.server.harness import running_server, url_of
from tests.unit.server.test_ui import CHROMIUM

UNHEALTHY = {"error": "unhealthy", "error_type": "healthcheck"}


@pytest.fixture
def state() -> StartState:
    state = StartState()
    state.take("loading weights", 0.42, "Loading weights: 42 % of 0.99 GB")
    return state


@contextlib.asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.fixture
async def client(state: StartState) -> AsyncIterator[httpx.AsyncClient]:
    app = StartingApp(state, has_pages=True)
    async with client_of(CorsHeaders(app, (), is_strict=False)) as client:
        yield client


async def test_readyz_tells_the_stage(client: httpx.AsyncClient, state: StartState) -> None:
    response = await client.get("/readyz")
    body = response.json()
    assert response.status_code == 503 and response.headers["content-type"] == "application/json"
    assert 0 <= body.pop("elapsed_s") < 60
    message = "Loading weights: 42 % of 0.99 GB"
    assert body == {**UNHEALTHY, "stage": "loading weights", "progress": 0.42, "message": message}
    state.take("warming up", None, "Warming up")
    body = (await client.get("/readyz")).json()
    assert (body["stage"], body["progress"], body["message"]) == ("warming up", None, "Warming up")


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
async def test_probes_fail_as_they_do_without_an_engine(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path)
    assert (response.status_code, response.json()) == (503, UNHEALTHY)
    assert (await client.head(path)).status_code == 503


async def test_nobody_need_start_it_again(client: httpx.AsyncClient) -> None:
    response = await client.get("/livez")
    assert (response.status_code, response.content) == (200, b"")


MESSAGE = "The model is not there yet. Loading weights: 42 % of 0.99 GB"
OPENAI = {"error": {"message": MESSAGE, "type": "server_error", "code": "starting", "param": None}}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/generate", {"error": MESSAGE, "error_type": "starting"}),
        ("POST", "/", {"error": MESSAGE, "error_type": "starting"}),
        ("GET", "/metrics", {"error": MESSAGE, "error_type": "starting"}),
        ("GET", "/no-such-path", {"error": MESSAGE, "error_type": "starting"}),
        ("POST", "/v1/chat/completions", OPENAI),
        ("GET", "/v1/models", OPENAI),
        ("POST", "/v1/messages", {"type": "error", "error": {"type": "api_error", "message": MESSAGE}}),
    ],
)
async def test_programs_are_told_to_come_again(
    client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any]
) -> None:
    response = await client.request(method, path)
    assert (response.status_code, response.json()) == (503, body)
    assert 0 < int(response.headers["retry-after"]) <= 60
    assert response.headers["access-control-allow-origin"] == "*", "pages of others read it, too"


async def test_preflights_are_answered(client: httpx.AsyncClient) -> None:
    assert (await client.options("/generate")).status_code == 200


@pytest.mark.parametrize("path", ["/", "/ui", "/dashboard"])
async def test_a_browser_gets_a_page_that_nobody_keeps(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(path, headers={"accept": CHROMIUM})
    assert (response.status_code, response.text) == (503, (SOURCE / "starting.html").read_text())
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["cache-control"] == "no-store" and "etag" not in response.headers
    assert "retry-after" in response.headers


@pytest.mark.parametrize("name", ["starting.js", "pages.css"])
async def test_the_page_finds_its_files(client: httpx.AsyncClient, name: str) -> None:
    assert f"ui/{name}" in (SOURCE / "starting.html").read_text()
    response = await client.get(f"/ui/{name}")
    assert (response.status_code, response.content) == (200, (SOURCE / name).read_bytes())


async def test_without_pages_a_browser_is_told_as_anybody(state: StartState) -> None:
    async with client_of(StartingApp(state, has_pages=False)) as client:
        assert (await client.get("/", headers={"accept": CHROMIUM})).json() == UNHEALTHY
        assert (await client.get("/ui/starting.js")).status_code == 503


async def test_the_application_takes_over_on_an_open_connection_and_ends_with_the_server(
    state: StartState, app: FastAPI
) -> None:
    gate = Gate(StartingApp(state, has_pages=True))
    with running_server(gate) as server:  # type: ignore[arg-type]
        async with httpx.AsyncClient(base_url=url_of(server), limits=httpx.Limits(max_connections=1)) as client:
            refused = await client.post("/generate", json={"inputs": "hello"})
            await gate.open(app)
            served = await client.post("/generate", json={"inputs": "hello"})
            assert (refused.status_code, served.status_code) == (503, 200), served.text
            streams = [answer.extensions["network_stream"] for answer in (refused, served)]
            ports = [stream.get_extra_info("client_addr") for stream in streams]
            assert ports[0] == ports[1]
    pool = app.state.service.tokenizer._executor
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(asyncio.sleep, 0)
