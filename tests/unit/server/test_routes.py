"""The routes (`docs/wire.md`, 1): which there are, HEAD, refusals, models, and the page of the description."""

from __future__ import annotations

import html.parser
import time
from pathlib import Path
from typing import Any

import httpx
import openapi_spec_validator
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.app import AREAS, create_app
from server.openapi import build_openapi
from server.operation import described_path, operations_of
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config

OPERATIONS = operations_of(AREAS)
GET_PATHS = [described_path(operation.path) for operation in OPERATIONS if operation.method == "GET"]
ENDLESS_PATHS = {"/dashboard/events"}
POST_PATHS = [operation.path for operation in OPERATIONS if operation.method == "POST"]
PROTECTED_PATHS = """/ /generate /generate_stream /v1/chat/completions /v1/completions /invocations /vertex /tokenize
    /chat_tokenize /detokenize /v1/responses /v1/messages /v1/messages/count_tokens""".split()


def routes_of(app: FastAPI) -> list[APIRoute]:
    return [route for route in _flat(app.routes) if isinstance(route, APIRoute)]


def _flat(routes: Any) -> list[Any]:
    """Routes of an application; FastAPI may keep included routers as such."""
    found = []
    for route in routes:
        router = getattr(route, "original_router", None)
        found += [route] if router is None else _flat(router.routes)
    return found


def test_every_route_is_described(app: FastAPI) -> None:
    served = {
        (method, route.path.replace("{model_id:model_id}", "{model_id}"))
        for route in routes_of(app)
        for method in route.methods - {"HEAD"}
    }
    described = [(operation.method, described_path(operation.path)) for operation in OPERATIONS]
    assert served == set(described)
    assert len(described) == len(set(described))


@pytest.mark.parametrize("path", sorted(set(GET_PATHS) - ENDLESS_PATHS))
async def test_head_says_what_get_says(client: httpx.AsyncClient, path: str) -> None:
    path = path.replace("{model_id}", "org/model").replace("{name}", "pages.css")
    got, asked = await client.get(path), await client.head(path)
    assert asked.status_code == got.status_code
    assert asked.status_code in (200, 303)
    assert asked.headers.get("content-type") == got.headers.get("content-type")


@pytest.mark.parametrize("path", sorted({*GET_PATHS, *POST_PATHS} - {"/"}))
async def test_another_method(client: httpx.AsyncClient, path: str) -> None:
    """The answer is empty, but under /v1 it is OpenAI's error object."""
    response = await client.put(path)
    assert (response.status_code, response.content == b"") == (405, not path.startswith("/v1/"))
    assert response.headers["allow"] == ("POST" if path in POST_PATHS else "GET,HEAD")


@pytest.mark.parametrize("path", ["/v1", "/tokenize/", "/info/", "/vertex/x", "/docs/x"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_another_path_has_an_empty_answer(client: httpx.AsyncClient, method: str, path: str) -> None:
    response = await client.request(method, path)
    assert (response.status_code, response.content) == (404, b"")
    assert "content-type" not in response.headers


async def test_what_makes_the_model_work_needs_the_key(app: FastAPI) -> None:
    assert set(PROTECTED_PATHS) == set(POST_PATHS)


async def test_models(client: httpx.AsyncClient, app: FastAPI) -> None:
    answer = (await client.get("/v1/models")).json()
    (model,) = answer["data"]
    assert abs(model["created"] - time.time()) < 60
    assert (answer["object"], model["id"], model["object"]) == ("list", "org/model", "model")
    assert model["max_model_len"] == 1024
    assert (await client.get("/v1/models/org/model")).json() == model


@pytest.mark.parametrize("strict", [False, True])
async def test_a_model_of_several_names(engine: FakeEngine, model_folder: Path, strict: bool) -> None:
    config = make_config(served_model_names=("gpt-4o", "my/model"), is_strict_tgi=strict)
    app = create_app(engine, config, TextTokenizer.from_folder(str(model_folder), 1))
    async with client_of(app) as client:
        models = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["gpt-4o", "my/model"]
        assert [(await client.get(f"/v1/models/{model['id']}")).json() for model in models] == models
        assert (await client.get("/v1/models/org/model")).status_code == 404
        assert (await client.get("/info")).json()["model_id"] == "org/model"
        for body, told in (({}, "gpt-4o"), ({"model": "tgi"}, "gpt-4o"), ({"model": "my/model"}, "my/model")):
            chat = {"messages": [{"role": "user", "content": "hey"}]} | body
            assert (await client.post("/v1/chat/completions", json=chat)).json()["model"] == told
            answer = (await client.post("/v1/completions", json={"prompt": "x"} | body)).json()
            assert answer["model"] == ("gpt-4o" if strict else told)


async def test_models_to_tgi(strict_client: httpx.AsyncClient) -> None:
    response = await strict_client.get("/v1/models")
    assert response.text == (
        '{"object":"list","data":[{"id":"org/model","object":"model","created":0,"owned_by":"org/model"}]}'
    )


@pytest.mark.parametrize(
    ("path", "model_id"), [("org", "org"), ("org/model/", "org/model/"), ("a%0Ab", "a\nb"), ("", "")]
)
async def test_another_model_is_not_found(client: httpx.AsyncClient, path: str, model_id: str) -> None:
    response = await client.get(f"/v1/models/{path}")
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": f"The model `{model_id}` does not exist: there is `org/model`",
            "type": "invalid_request_error",
            "code": "model_not_found",
            "param": None,
        }
    }


@pytest.mark.parametrize("changes", [{}, {"is_strict_tgi": True}, {"api_key": "s3cret"}])
def test_the_description_is_valid(changes: dict[str, Any]) -> None:
    openapi_spec_validator.validate(build_openapi(OPERATIONS, make_config(**changes)))


async def test_the_description_is_served(client: httpx.AsyncClient, app: FastAPI) -> None:
    for path in ("/openapi.json", "/api-doc/openapi.json"):
        response = await client.get(path)
        assert response.headers["content-type"] == "application/json"
        assert response.json() == app.state.openapi


@pytest.mark.parametrize(
    ("changes", "name"), [({}, "OpenAIErrorBody"), ({"is_strict_tgi": True}, "ErrorBody")], ids=["default", "strict"]
)
def test_errors_of_openai_routes_are_described(changes: dict[str, Any], name: str) -> None:
    responses = build_openapi(OPERATIONS, make_config(**changes))["paths"]["/v1/completions"]["post"]["responses"]
    assert responses["429"]["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}


def test_what_an_answer_may_lack_is_described_so(app: FastAPI) -> None:
    """`top_tokens` may be missing in an event; the description said once that it is always there."""
    schemas = app.state.openapi["components"]["schemas"]
    assert set(schemas["StreamResponse"]["required"]) == {"index", "token", "generated_text", "details"}
    assert schemas["GenerateResponse"]["required"] == ["generated_text"]


def test_the_key_is_described() -> None:
    document = build_openapi(OPERATIONS, make_config(api_key="s3cret"))
    secured = {
        (method, path)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if operation.get("security") == [{"key": []}]
    }
    assert secured == {("get", "/dashboard/events"), *(("post", path) for path in PROTECTED_PATHS)}


def test_the_description_tells_no_secrets() -> None:
    assert "s3cret" not in str(build_openapi(OPERATIONS, make_config(api_key="s3cret")))


def test_descriptions_are_for_users(app: FastAPI) -> None:
    assert not [word for word in ("quirk", "reference", "`tgi-http") if word in str(app.state.openapi)]


class _Page(html.parser.HTMLParser):
    """What a page links to, and where links can lead."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {found["id"] or ""} if "id" in found else set()
        self.links |= {found["href"] or ""} if tag == "a" else set()
        if "src" in found or tag in ("link", "script"):
            self.loaded.append(tag)


async def test_docs(client: httpx.AsyncClient) -> None:
    response = await client.get("/docs")
    assert (response.status_code, response.headers["location"]) == (303, "/docs/")
    response = await client.get("/docs/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    for operation in OPERATIONS:
        assert f"<code>{operation.method} {described_path(operation.path)}</code>" in response.text
    page = _Page()
    page.feed(response.text)
    assert page.links <= {f"#{name}" for name in page.ids} | {"../openapi.json"}
    assert not page.loaded, "it needs nothing but itself"
