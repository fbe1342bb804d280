"""Vertex AI says by variables where it asks: those paths are /vertex and /health, with all that belongs to them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config

ENDPOINT = "/v1/endpoints/7/deployedModels/9"
INSTANCES = {"instances": [{"inputs": "Say "}]}


def app_with(engine: FakeEngine, folder: Path, **changes: str) -> FastAPI:
    return create_app(engine, make_config(**changes), TextTokenizer.from_folder(str(folder), 1))


@pytest.mark.parametrize(
    ("predict", "health"),
    [
        ("/predict", "/alive"),
        (f"{ENDPOINT}:predict", ENDPOINT),
        ("/v1/models/mine:predict", "/v1/models/mine"),
        ("/x", "/x"),
    ],
)
async def test_both_routes_answer(engine: FakeEngine, model_folder: Path, predict: str, health: str) -> None:
    async with client_of(app_with(engine, model_folder, predict_route=predict, health_route=health)) as client:
        assert (await client.post(predict, json=INSTANCES)).json() == {"predictions": ["Hello, world!"]}
        assert (await client.post("/vertex", json=INSTANCES)).status_code == 200
        assert (await client.get(health)).status_code == 200
        assert (await client.head(health)).status_code == 200
        wrong = await client.post(predict, json={"instances": []})
        assert wrong.json() == (await client.post("/vertex", json={"instances": []})).json()


async def test_the_key_is_asked_for_as_on_the_route(engine: FakeEngine, model_folder: Path) -> None:
    app = app_with(engine, model_folder, predict_route="/predict", health_route="/alive", api_key="key")
    async with client_of(app) as client:
        assert (await client.post("/predict", json=INSTANCES)).status_code == 401
        key = {"authorization": "Bearer key"}
        assert (await client.post("/predict", json=INSTANCES, headers=key)).status_code == 200
        assert (await client.get("/alive")).status_code == 200


async def test_a_route_of_ours_stays_what_it_is(engine: FakeEngine, model_folder: Path) -> None:
    app = app_with(engine, model_folder, predict_route="/v1/chat/completions", health_route="/metrics")
    async with client_of(app) as client:
        chat = await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
        assert chat.json()["object"] == "chat.completion"
        assert "pytgi_" in (await client.get("/metrics")).text


async def test_nothing_else_is_there(client: httpx.AsyncClient) -> None:
    assert (await client.post("/predict", json=INSTANCES)).status_code == 404
