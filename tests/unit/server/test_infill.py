"""`suffix` of a completion: the model is asked for what stands between prompt and suffix."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers

from server.app import create_app
from server.requests.infill import MARKS
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config, one_by_one, write_model_folder

PATH = "/v1/completions"


@pytest.fixture
def coder(tmp_path: Path) -> TextTokenizer:
    """A tokenizer with the marks, which are added tokens and not special, as in Qwen2.5-Coder."""
    write_model_folder(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens([tokenizers.AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return TextTokenizer.from_folder(str(tmp_path), 1)


@pytest.fixture
async def client(engine: FakeEngine, coder: TextTokenizer) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(engine, make_config(), coder)) as client:
        yield client


async def prompt_of(client: httpx.AsyncClient, engine: FakeEngine, **body: Any) -> list[int]:
    response = await client.post(PATH, json=body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == "Hello, world!"
    return engine.requests[-1].prompt_token_ids


async def test_prompt_and_suffix(client: httpx.AsyncClient, engine: FakeEngine, coder: TextTokenizer) -> None:
    ids = await prompt_of(client, engine, prompt="Hello", suffix="world!")
    assert coder.decode(ids) == "<|fim_prefix|>Hello<|fim_suffix|>world!<|fim_middle|>"
    assert [ids[0], ids[-1]] == [coder.token_id(MARKS[0]), coder.token_id(MARKS[2])]


async def test_a_prompt_of_ids(client: httpx.AsyncClient, engine: FakeEngine, coder: TextTokenizer) -> None:
    text = await prompt_of(client, engine, prompt="Hello", suffix="world!")
    ids = await prompt_of(client, engine, prompt=coder._encode("Hello", False), suffix="world!")
    assert ids == text


async def test_streams_and_several_prompts_have_it_too(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post(PATH, json={"prompt": ["a", "b"], "suffix": "c", "stream": True})
    assert response.status_code == 200
    first, second = engine.requests
    assert first.prompt_token_ids[2:] == second.prompt_token_ids[2:]
    assert first.prompt_token_ids[1] != second.prompt_token_ids[1]


@pytest.mark.parametrize("suffix", [None, ""])
async def test_no_suffix(client: httpx.AsyncClient, engine: FakeEngine, coder: TextTokenizer, suffix: Any) -> None:
    """Editors send an empty one at the end of a file."""
    assert await prompt_of(client, engine, prompt="Hello", suffix=suffix) == coder._encode("Hello", False)


async def test_the_middle_ends_where_another_part_begins(
    client: httpx.AsyncClient, engine: FakeEngine, coder: TextTokenizer
) -> None:
    engine.script.events = one_by_one(coder._encode("middle<|fim_prefix|>", False))
    response = await client.post(PATH, json={"prompt": "a", "suffix": "c", "stop_token_ids": [5]})
    assert response.json()["choices"][0]["text"] == "middle"
    assert engine.requests[0].stop_token_ids == [5, *sorted(coder.token_ids(*MARKS))]


async def test_with_an_echo(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json={"prompt": "a", "suffix": "c", "echo": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "echo")


async def test_too_long_a_suffix(client: httpx.AsyncClient) -> None:
    response = await client.post(PATH, json={"prompt": "a", "suffix": "龘" * 1000})
    assert response.json()["error"]["code"] == "context_length_exceeded"


async def test_another_model_has_no_marks(app: Any) -> None:
    async with client_of(app) as client:
        response = await client.post(PATH, json={"prompt": "a", "suffix": "c"})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
        assert "<|fim_prefix|>" in error["message"]
        assert (await client.post(PATH, json={"prompt": "a", "suffix": ""})).status_code == 200
