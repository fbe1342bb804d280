"""Fixtures of the server's tests; what they are made of is in `harness`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import (
    FakeEngine,
    client_of,
    end_spare_places,
    make_config,
    one_by_one,
    running_server,
    url_of,
    write_model_folder,
)


@pytest.fixture(scope="session", autouse=True)
def ends_spare_places() -> Iterator[None]:
    yield
    end_spare_places()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model_folder(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Iterator[TextTokenizer]:
    tokenizer = TextTokenizer.from_folder(str(model_folder), 1)
    yield tokenizer
    tokenizer.close()


@pytest.fixture(scope="session")
def ids_of(tokenizer: TextTokenizer) -> Callable[[str], list[int]]:
    """A function from a text to its ids; it recognizes special tokens."""
    return lambda text: tokenizer._encode(text, False)


@pytest.fixture
def engine(ids_of: Callable[[str], list[int]]) -> FakeEngine:
    fake = FakeEngine()
    fake.script.events = one_by_one(ids_of("Hello, world!<|im_end|>"))
    return fake


@pytest.fixture
def app(engine: FakeEngine, model_folder: Path) -> FastAPI:
    # a tokenizer of its own: the application closes it
    return create_app(engine, make_config(payload_limit=20_000), TextTokenizer.from_folder(str(model_folder), 1))


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as client:
        yield client


@pytest.fixture
async def strict_client(engine: FakeEngine, model_folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application with --strict-tgi and the same engine."""
    tokenizer = TextTokenizer.from_folder(str(model_folder), 1)
    async with client_of(create_app(engine, make_config(is_strict_tgi=True), tokenizer)) as client:
        yield client


@pytest.fixture
def base_url(app: FastAPI) -> Iterator[str]:
    with running_server(app) as server:
        yield url_of(server)
