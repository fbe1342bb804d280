"""/info and the probes."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config


async def test_info(client: httpx.AsyncClient) -> None:
    response = await client.get("/info")
    assert response.text == (
        '{"model_id":"org/model","model_sha":null,"model_pipeline_tag":null,"max_concurrent_requests":128,'
        '"max_best_of":2,"max_stop_sequences":4,"max_input_tokens":1023,"max_total_tokens":1024,'
        '"validation_workers":2,"max_client_batch_size":128,"router":"text-generation-router",'
        '"version":"3.3.6-dev0","sha":null,"docker_label":null}'
    )
    assert response.headers["content-type"] == "application/json"


async def test_an_image_says_what_it_was_built_from(engine: FakeEngine, model_folder: Path) -> None:
    config = make_config(build_sha="0f3a", docker_label="sha-0f3a")
    async with client_of(create_app(engine, config, TextTokenizer.from_folder(str(model_folder), 1))) as client:
        answer = (await client.get("/info")).json()
    assert (answer["sha"], answer["docker_label"]) == ("0f3a", "sha-0f3a")


@pytest.mark.parametrize("path", ["/health", "/ping", "/", "/readyz"])
async def test_health(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    response = await client.get(path)
    assert (response.status_code, response.content) == (200, b"")
    assert "content-type" not in response.headers
    engine.healthy = False
    response = await client.get(path)
    assert (response.status_code, response.json()) == (503, {"error": "unhealthy", "error_type": "healthcheck"})


async def test_livez_fails_only_without_an_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.healthy = False
    assert (await client.get("/livez")).status_code == 200
    engine.dead.set()
    assert (await client.get("/livez")).status_code == 503


@pytest.mark.parametrize("path", ["/health", "/ping", "/", "/info", "/v1/models", "/livez", "/readyz"])
async def test_head(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.head(path)).status_code == 200
