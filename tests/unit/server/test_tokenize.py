"""POST /tokenize, /chat_tokenize and /detokenize (`docs/wire.md`, 1.3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from fastapi import FastAPI
from tokenizers.processors import TemplateProcessing

from server.app import create_app
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config, write_model_folder

PROMPT = "<|im_start|>user\nhey<|im_end|>\n<|im_start|>assistant\n"
TEXTS = [
    "What is deep learning?",
    "naïve café",
    "你好，世界 👩‍👩‍👧",
    "日本 e\u0301 \U00020000 x",
    "<|im_start|>a<|im_end|>",
    "\x00",
]


async def tokens_of(client: httpx.AsyncClient, text: str, **parameters: Any) -> list[dict[str, Any]]:
    response = await client.post("/tokenize", json={"inputs": text, "parameters": parameters})
    assert response.status_code == 200, response.text
    assert not [name for name in response.headers if name.startswith("x-")]
    tokens: list[dict[str, Any]] = response.json()
    return tokens


async def test_bytes_of_the_answer(client: httpx.AsyncClient, tokenizer: TextTokenizer) -> None:
    what, is_ = tokenizer._encode("What is", True)
    response = await client.post("/tokenize", json={"inputs": "What is"})
    assert response.text == (
        f'[{{"id":{what},"text":"What","start":0,"stop":4}},{{"id":{is_},"text":" is","start":4,"stop":7}}]'
    )


@pytest.mark.parametrize("text", TEXTS)
async def test_offsets_are_of_bytes(client: httpx.AsyncClient, tokenizer: TextTokenizer, text: str) -> None:
    tokens = await tokens_of(client, text)
    assert [token["id"] for token in tokens] == tokenizer._encode(text, True)
    for token in tokens:
        assert token["text"] == text.encode()[token["start"] : token["stop"]].decode()
    ends = [0, *(token["stop"] for token in tokens)]
    assert all(token["start"] <= end for token, end in zip(tokens, ends, strict=False)), "nothing is left out"
    assert ends == sorted(ends) and ends[-1] == len(text.encode())


async def test_a_part_of_a_character_has_its_whole_span(client: httpx.AsyncClient) -> None:
    """As with TGI, whose tokenizer is the same library."""
    tokens = await tokens_of(client, "a\U00020000")
    assert [(token["text"], token["start"], token["stop"]) for token in tokens[1:]] == [("\U00020000", 1, 5)] * 4


async def test_nothing_has_no_tokens(client: httpx.AsyncClient) -> None:
    assert await tokens_of(client, "") == []


async def test_parameters_have_no_effect(client: httpx.AsyncClient) -> None:
    plain = await tokens_of(client, "What is deep learning?")
    assert await tokens_of(client, "What is deep learning?", truncate=1, temperature=-1, top_p=7.0) == plain


async def test_an_added_token_stands_for_nothing(engine: FakeEngine, tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    adding = tokenizers.Tokenizer.from_file(path)
    adding.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    adding.save(path)
    async with client_of(create_app(engine, make_config(), TextTokenizer.from_folder(str(tmp_path), 1))) as client:
        first, second = await tokens_of(client, "What")
        chat = (await client.post("/chat_tokenize", json={"messages": [{"role": "user", "content": "x"}]})).json()
    assert first == {"id": 0, "text": "", "start": 0, "stop": 0}
    assert (second["text"], second["start"], second["stop"]) == ("What", 0, 4)
    assert chat["tokenize_response"][0]["text"] == "<|im_start|>", "a template brings its own"


async def test_chat(client: httpx.AsyncClient, tokenizer: TextTokenizer) -> None:
    response = await client.post("/chat_tokenize", json={"messages": [{"role": "user", "content": "hey"}]})
    answer = response.json()
    assert list(answer) == ["tokenize_response", "templated_text"]
    assert answer["templated_text"] == PROMPT
    assert [token["id"] for token in answer["tokenize_response"]] == tokenizer._encode(PROMPT, False)
    assert "".join(token["text"] for token in answer["tokenize_response"]) == PROMPT
    assert not [name for name in response.headers if name.startswith("x-")]


async def test_a_template_may_refuse(engine: FakeEngine, tmp_path: Path) -> None:
    write_model_folder(tmp_path, "{{ raise_exception('no system role') }}")
    async with client_of(create_app(engine, make_config(), TextTokenizer.from_folder(str(tmp_path), 1))) as client:
        response = await client.post("/chat_tokenize", json={"messages": [{"role": "system", "content": "x"}]})
    assert response.status_code == 422
    assert response.json() == {
        "error": "Template error: no system role",
        "error_type": "template_error",
    }


@pytest.mark.parametrize("strict", [False, True])
async def test_all_take_a_permit_but_under_strict_tgi(engine: FakeEngine, model_folder: Path, strict: bool) -> None:
    config = make_config(max_concurrent_requests=0, is_strict_tgi=strict)
    app = create_app(engine, config, TextTokenizer.from_folder(str(model_folder), 1))
    bodies: dict[str, dict[str, Any]] = {
        "/tokenize": {"inputs": "What"},
        "/chat_tokenize": {"messages": [{"role": "user", "content": "What"}]},
        "/detokenize": {"tokens": [5]},
    }
    async with client_of(app) as client:
        for path, body in bodies.items():
            assert (await client.post(path, json=body)).status_code == (200 if strict else 429), path
        assert (await client.post("/generate", json={"inputs": "What"})).status_code == 429
        chats = {"instances": [bodies["/chat_tokenize"]] * 2}
        assert (await client.post("/vertex", json=chats)).status_code == (500 if strict else 429)


async def test_a_long_text_has_the_same_tokens_as_a_short_one(
    client: httpx.AsyncClient, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is encoded in another process."""
    texts = [*TEXTS, "What is deep learning? " * 500]
    short = [await tokens_of(client, text) for text in texts]
    monkeypatch.setattr("server.text.tokenizer.MAX_SHORT_CHARS", 0)
    assert [await tokens_of(client, text) for text in texts] == short
    assert await tokenizer.encode(texts[-1], add_special_tokens=True) == tokenizer._encode(texts[-1], True)


async def test_a_process_that_dies_costs_one_long_text(
    client: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.text.tokenizer.MAX_SHORT_CHARS", 0)
    tokens = await tokens_of(client, "What")
    process = app.state.service.tokenizer._long_texts
    process.child.kill()
    process.child.wait()
    assert await tokens_of(client, "What") == tokens, "a new one is started"
    monkeypatch.setattr(process, "command", [*process.command[:-1], "nowhere"])
    process.close()
    response = await client.post("/tokenize", json={"inputs": "What"})
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")


@pytest.mark.parametrize("name", ["tokens", "ids"])
@pytest.mark.parametrize("text", TEXTS)
async def test_detokenize(client: httpx.AsyncClient, name: str, text: str) -> None:
    ids = [token["id"] for token in await tokens_of(client, text)]
    response = await client.post("/detokenize", json={name: ids})
    assert (response.status_code, response.json()) == (200, {"prompt": text})


@pytest.mark.parametrize(
    "body", [{}, {"tokens": "x"}, {"tokens": [-1]}, {"tokens": [2**32]}, {"tokens": [], "ids": []}]
)
async def test_detokenize_refuses(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    assert (await client.post("/detokenize", json=body)).status_code == 422


async def test_unknown_tokens_are_nothing(client: httpx.AsyncClient) -> None:
    assert (await client.post("/detokenize", json={"tokens": [2**32 - 1]})).json() == {"prompt": ""}
