"""Adapters by name: which one a request gets, what unknown names are told, adapters that come and go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openapi_spec_validator
import pytest
from fastapi import FastAPI
from huggingface_hub import InferenceClient

from engine.link.messages import AdapterReply, LoadAdapter, UnloadAdapter
from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, events_of, make_config, running_server, url_of

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
OPENAI: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {**CHAT, "max_tokens": 5},
}


class AdapterEngine(FakeEngine):
    """An engine that has every adapter whose path begins with `/good`."""

    def __init__(self, script: FakeEngine) -> None:
        super().__init__()
        self.script = script.script
        self.changes: list[LoadAdapter | UnloadAdapter] = []

    async def change_adapters(self, message: LoadAdapter | UnloadAdapter) -> AdapterReply:
        self.changes.append(message)
        await asyncio.sleep(0.01)
        is_bad = isinstance(message, LoadAdapter) and not message.path.startswith("/good")
        return AdapterReply("/bad has no adapter_config.json" if is_bad else None)


@pytest.fixture
def adapters(engine: FakeEngine) -> AdapterEngine:
    return AdapterEngine(engine)


@contextlib.asynccontextmanager
async def serving(engine: FakeEngine, folder: Path, **changes: Any) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient]]:
    app = create_app(engine, make_config(**changes), TextTokenizer.from_folder(str(folder), 1))
    async with client_of(app) as client:
        yield app, client


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize(
    ("name", "expected"),
    [("sql", "sql"), ("org/model", None), ("model", None), ("tgi", None), ("dummy", None), ("", None), (None, None)],
)
async def test_a_request_gets_the_adapter_that_it_names(
    adapters: AdapterEngine, model_folder: Path, is_strict: bool, name: str | None, expected: str | None
) -> None:
    async with serving(adapters, model_folder, lora_adapters=("sql", "prose"), is_strict_tgi=is_strict) as (_, client):
        bodies: dict[str, dict[str, Any]] = {
            "/generate": {"inputs": "x", "parameters": {"adapter_id": name}},
            "/": {"inputs": "x", "parameters": {"adapter_id": name}, "stream": True},
            "/generate_stream": {"inputs": "x", "parameters": {"adapter_id": name}},
            "/invocations": {"inputs": "x", "parameters": {"adapter_id": name}},
        }
        for path, body in OPENAI.items():
            if path in ("/v1/chat/completions", "/v1/completions") or not is_strict:
                bodies[path] = {**body, "model": name}
        for path, body in bodies.items():
            response = await client.post(path, json=body)
            assert response.status_code == 200, path
            assert adapters.requests[-1].adapter_id == expected, path
    assert len(adapters.requests) == len(bodies)


async def test_the_hubs_client_gets_the_model_where_it_names_none(
    adapters: AdapterEngine, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends a word of its own for the model then, which was refused where there are adapters."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it would not ask our server either
    config = make_config(lora_adapters=("sql",), is_lora_updating=True)
    app = create_app(adapters, config, TextTokenizer.from_folder(str(model_folder), 1))
    with running_server(app) as server, InferenceClient(url_of(server)) as client:
        await asyncio.to_thread(client.chat_completion, CHAT["messages"], max_tokens=3)
    assert [request.adapter_id for request in adapters.requests] == [None]


async def test_every_choice_has_the_adapter(adapters: AdapterEngine, model_folder: Path) -> None:
    async with serving(adapters, model_folder, lora_adapters=("sql",)) as (_, client):
        await client.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "model": "sql"})
    assert [request.adapter_id for request in adapters.requests] == ["sql"] * 4


async def test_an_unknown_name_is_refused_where_there_are_adapters(adapters: AdapterEngine, model_folder: Path) -> None:
    async with serving(adapters, model_folder, lora_adapters=("sql",)) as (_, client):
        for is_stream in (False, True):
            for path, body in OPENAI.items():
                response = await client.post(path, json={**body, "model": "no/such", "stream": is_stream})
                assert response.status_code == 404, path
                error = response.json()["error"]
                assert error["message"] == "The model `no/such` does not exist: there is `org/model`, `sql`"
                assert error.get("code", "model_not_found") == "model_not_found"
        native = {"inputs": "x", "parameters": {"adapter_id": "no/such"}}
        text = "Input validation error: `adapter_id` no/such is no adapter of this server: there is `sql`"
        response = await client.post("/generate", json=native)
        assert (response.status_code, response.json()) == (422, {"error": text, "error_type": "validation"})
        response = await client.post("/generate_stream", json=native)
        assert events_of(response.content) == [{"error": text, "error_type": "validation"}]
    assert not adapters.requests


async def test_an_unknown_name_is_the_model_to_tgi_and_where_there_are_no_adapters(
    adapters: AdapterEngine, model_folder: Path
) -> None:
    for changes in ({"lora_adapters": ("sql",), "is_strict_tgi": True}, {}):
        async with serving(adapters, model_folder, **changes) as (_, client):
            for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "x"})):
                assert (await client.post(path, json={**body, "model": "no/such"})).status_code == 200
            body = {"inputs": "x", "parameters": {"adapter_id": "no/such"}}
            assert (await client.post("/generate", json=body)).status_code == 200
    assert [request.adapter_id for request in adapters.requests] == [None] * 6


async def test_adapters_are_listed_beside_the_model(adapters: AdapterEngine, model_folder: Path) -> None:
    async with serving(adapters, model_folder, lora_adapters=("sql", "a/b")) as (_, client):
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(model["id"], model.get("parent")) for model in listed] == [
            ("org/model", None),
            ("sql", "org/model"),
            ("a/b", "org/model"),
        ]
        assert (await client.get("/v1/models/a/b")).json() == listed[2]
        assert (await client.get("/v1/models/c")).status_code == 404
    async with serving(adapters, model_folder, lora_adapters=("sql",), is_strict_tgi=True) as (_, client):
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["org/model"]


async def test_an_adapter_comes_and_goes(adapters: AdapterEngine, model_folder: Path) -> None:
    named = {**CHAT, "model": "sql"}
    async with serving(adapters, model_folder, is_lora_updating=True) as (_, client):
        assert (await client.post("/v1/chat/completions", json=named)).status_code == 404
        response = await client.post(LOAD, json={"lora_name": "sql", "lora_path": "/good/sql"})
        assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
        assert (await client.post("/v1/chat/completions", json=named)).status_code == 200
        assert "sql" in [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        response = await client.post(UNLOAD, json={"lora_name": "sql"})
        assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'sql' removed successfully.")
        assert (await client.post("/v1/chat/completions", json=named)).status_code == 404
    assert adapters.changes == [LoadAdapter("sql", "/good/sql"), UnloadAdapter("sql")]


async def test_changes_of_one_name_come_one_after_the_other(adapters: AdapterEngine, model_folder: Path) -> None:
    """What a call has seen of the names holds until it has changed them."""
    body = {"lora_name": "sql", "lora_path": "/good/sql"}
    async with serving(adapters, model_folder, is_lora_updating=True) as (_, client):

        async def post(*paths: str) -> list[int]:
            return [
                response.status_code for response in await asyncio.gather(*(client.post(p, json=body) for p in paths))
            ]

        assert sorted(await post(LOAD, LOAD, LOAD)) == [200, 400, 400]
        assert sorted(await post(UNLOAD, UNLOAD)) == [200, 404]
        statuses = await post(LOAD, UNLOAD, LOAD, UNLOAD)
        listed = "sql" in [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    kinds = [type(change) for change in adapters.changes]
    assert kinds == [LoadAdapter, UnloadAdapter] * (len(kinds) // 2) + [LoadAdapter] * (len(kinds) % 2)
    assert len(kinds) == 2 + statuses.count(200) and listed == (kinds[-1] is LoadAdapter)


@pytest.mark.parametrize(
    ("path", "body", "status", "text", "param"),
    [
        (LOAD, {"lora_name": "x", "lora_path": "/bad"}, 400, "/bad has no adapter_config.json", "lora_path"),
        (LOAD, {"lora_name": "sql", "lora_path": "/good"}, 400, "'sql' has already been loaded: send", "lora_name"),
        (LOAD, {"lora_name": "org/model", "lora_path": "/good"}, 400, "that is not the model's", "lora_name"),
        (LOAD, {"lora_name": " ", "lora_path": "/good"}, 400, "must be a name of 1 to 200", "lora_name"),
        (LOAD, {"lora_name": "x", "lora_path": ""}, 400, "must be a path of 1 to 4096", "lora_path"),
        (LOAD, {"lora_name": "x", "lora_path": "/good" * 999}, 400, "must be a path of 1 to 4096", "lora_path"),
        (LOAD, {"lora_name": "x"}, 400, "missing field `lora_path`", "lora_path"),
        (UNLOAD, {"lora_name": "x"}, 404, "The LoRA adapter `x` does not exist: there is `sql`", None),
        (UNLOAD, {}, 400, "missing field `lora_name`", "lora_name"),
    ],
)
async def test_what_can_not_be_loaded(
    adapters: AdapterEngine, model_folder: Path, path: str, body: Any, status: int, text: str, param: str | None
) -> None:
    async with serving(adapters, model_folder, lora_adapters=("sql",), is_lora_updating=True) as (_, client):
        response = await client.post(path, json=body)
        assert response.status_code == status
        assert text in response.json()["error"]["message"] and response.json()["error"]["param"] == param
        response = await client.post(LOAD, json={"lora_name": "sql", "lora_path": "/good/new", "load_inplace": True})
        assert response.status_code == 200
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["org/model", "sql"]


async def test_a_refusal_tells_a_few_names(adapters: AdapterEngine, model_folder: Path) -> None:
    names = tuple(f"a{number}" for number in range(300))
    async with serving(adapters, model_folder, lora_adapters=names) as (_, client):
        response = await client.post("/v1/chat/completions", json={**CHAT, "model": "x"})
    expected = "The model `x` does not exist: there is `org/model`, `a0`, `a1`, `a2`, `a3` and more, see /v1/models"
    assert response.json()["error"]["message"] == expected
    assert response.json()["error"]["code"] == "model_not_found"


async def test_the_log_says_which_adapter_and_why(
    adapters: AdapterEngine, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(adapters, model_folder, lora_adapters=("sql",), is_lora_updating=True) as (_, client):
        await client.post(LOAD, json={"lora_name": "x", "lora_path": "/bad"})
        await client.post(LOAD, json={"lora_name": "sql", "lora_path": "/good"})
        await client.post(UNLOAD, json={"lora_name": "y"})
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "the LoRA adapter 'x' can't be loaded: /bad has no adapter_config.json",
        "the LoRA adapter 'sql' has already been loaded",
        "the LoRA adapter does not exist",
    ]


async def test_the_routes_are_there_with_the_flag_alone_and_need_the_key(
    adapters: AdapterEngine, model_folder: Path
) -> None:
    body = {"lora_name": "x", "lora_path": "/good"}
    async with serving(adapters, model_folder, lora_adapters=("sql",)) as (_, client):
        assert (await client.post(LOAD, json=body)).status_code == 404
    async with serving(adapters, model_folder, is_lora_updating=True, api_key="k") as (app, client):
        openapi_spec_validator.validate(app.state.openapi)
        assert {LOAD, UNLOAD} <= set(app.state.openapi["paths"])
        for path in (LOAD, UNLOAD):
            assert (await client.post(path, json=body)).status_code == 401
    assert not adapters.changes
