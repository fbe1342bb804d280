"""A route's declaration: what the router, the guard, the spans and the description make of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI, Request, Response

import server.app
from server.app import AREAS, create_app
from server.openapi import build_openapi
from server.operation import Area, Operation, OperationFinder, operations_of
from server.telemetry.spans import log_extra
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config

area = Area()


class Weather(msgspec.Struct):
    """The weather of a town."""

    town: str


@area.serve(
    Operation(
        method="GET", path="/weather/{town}", summary="The weather", answers=(Weather,), errors=(404,), span="weather"
    ),
    Operation(method="GET", path="/open_weather/{town:path}", summary="For all", answers=(Weather,), is_open=True),
)
async def weather(request: Request, town: str) -> Response:
    logging.getLogger("server.weather").warning("asked", extra=log_extra())
    return Response(msgspec.json.encode(Weather(town)), media_type="application/json")


@pytest.fixture
def weather_app(engine: FakeEngine, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FastAPI]:
    """The application with one more area."""
    monkeypatch.setattr(server.app, "AREAS", (*AREAS, area))
    yield create_app(engine, make_config(api_key="k"), TextTokenizer.from_folder(str(model_folder), 1))


async def test_a_path_with_parameters_needs_the_key_unless_it_is_open(weather_app: FastAPI) -> None:
    async with client_of(weather_app) as client:
        assert (await client.get("/weather/Oslo")).status_code == 401
        assert (await client.head("/weather/Oslo")).status_code == 401
        answer = await client.get("/weather/Oslo", headers={"authorization": "Bearer k"})
        assert (answer.status_code, answer.json()) == (200, {"town": "Oslo"})
        assert (await client.get("/open_weather/Oslo/north")).json() == {"town": "Oslo/north"}


async def test_the_span_is_the_declared_one(weather_app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    async with client_of(weather_app) as client:
        await client.get("/weather/Oslo", headers={"authorization": "Bearer k"})
        await client.get("/open_weather/Oslo")
    spans = [vars(record)["span"] for record in caplog.records if record.name == "server.weather"]
    assert [span.get("name") for span in spans] == ["weather", None]
    assert [span["route"] for span in spans] == ["/weather/{town}", "/open_weather/{town:path}"]


def test_the_description_has_it(weather_app: FastAPI) -> None:
    document: dict[str, Any] = weather_app.state.openapi
    paths = document["paths"]
    operation, open_operation = paths["/weather/{town}"]["get"], paths["/open_weather/{town}"]["get"]
    assert operation["summary"] == "The weather" and operation["operationId"] == "get_weather_town"
    assert [parameter["name"] for parameter in operation["parameters"]] == ["town"]
    assert operation["responses"].keys() == {"200", "401", "404"}
    assert open_operation["responses"].keys() == {"200"}
    assert document["components"]["schemas"]["Weather"]["description"] == "The weather of a town."


def test_the_description_of_one_area_needs_no_other() -> None:
    document = build_openapi(operations_of([area]), make_config())
    assert document["paths"].keys() == {"/weather/{town}", "/open_weather/{town}"}


@pytest.mark.parametrize(
    ("path", "method", "summary"),
    [
        ("/a", "GET", "read"),
        ("/a", "HEAD", "read"),
        ("/a", "POST", "write"),
        ("/a", "PUT", "read"),
        ("/b", "POST", "only"),
        ("/b", "GET", "only"),
        ("/c/x/y", "GET", "below"),
        ("/c", "GET", None),
        ("/a/", "GET", None),
        ("", "GET", None),
    ],
)
def test_a_method_that_a_path_lacks_counts_as_its_get_or_its_only_one(
    path: str, method: str, summary: str | None
) -> None:
    finder = OperationFinder(
        [
            Operation(method="POST", path="/a", summary="write"),
            Operation(method="GET", path="/a", summary="read"),
            Operation(method="POST", path="/b", summary="only"),
            Operation(method="GET", path="/c/{rest:path}", summary="below"),
        ]
    )
    operation = finder.find(path, method)
    assert (operation and operation.summary) == summary
