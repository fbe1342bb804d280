"""How OpenAI's logprobs show tokens: with their bytes, and parts of characters so that no two have one name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from engine.link.messages import FinishReason
from server.text.token_names import TokenName, _alphabet
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import FakeEngine, events_of, one_by_one

CHAT = "/v1/chat/completions"
USER = {"messages": [{"role": "user", "content": "hey"}]}
IdsOf = Callable[[str], list[int]]
TEXTS = ["Hello, world!", "龘 Hello", "👩‍👩‍👧 naïve café 你好", "\ufffd?", "a\\xe4b", "<|im_end|>"]


def test_the_alphabet_of_bytes_is_that_of_the_library() -> None:
    assert sorted(_alphabet()) == sorted(ByteLevel.alphabet())
    assert sorted(_alphabet().values()) == list(range(256))


def test_no_two_tokens_have_one_name(tokenizer: TextTokenizer) -> None:
    names = [tokenizer.name(token_id) for token_id in range(500)]
    shown = {(name.text, name.is_part) for name in names}
    assert len(shown) == len(names)
    assert sum(name.is_part for name in names) > 100
    assert names[-1] == TokenName("token_id:499", None, is_part=False)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer: TextTokenizer, ids_of: IdsOf, text: str) -> None:
    raw = [tokenizer.name(token_id).raw or b"" for token_id in ids_of(text)]
    assert b"".join(raw) == text.encode()


@pytest.mark.parametrize(
    ("text", "piece", "name"),
    [
        ("é", "é", TokenName("é", "é".encode(), is_part=False)),
        ("\ufffd", "ï¿½", TokenName("\ufffd", "\ufffd".encode(), is_part=False)),
        (" \ufffd", "Ġä½", TokenName(" \\xe4\\xbd", b" \xe4\xbd", is_part=True)),
        ("\\\ufffd", "\\ä", TokenName("\\x5c\\xe4", b"\\\xe4", is_part=True)),
        ("<｜\ufffd｜>", "<｜\ufffd｜>", TokenName("<｜\ufffd｜>", "<｜\ufffd｜>".encode(), is_part=False)),
    ],
)
def test_names(text: str, piece: str, name: TokenName) -> None:
    assert dataclasses.astuple(TokenName.of(5, text, piece)) == dataclasses.astuple(name)


@pytest.fixture
def parts(engine: FakeEngine, ids_of: IdsOf) -> list[int]:
    """The engine says a character of several tokens, and has two parts among the likeliest of each place."""
    ids = ids_of("龘 Hello")
    engine.script.events = one_by_one(ids, FinishReason.LENGTH)
    for event in engine.script.events:
        event.top_token_ids, event.top_logprobs = [[*ids[:2], 10_000]], [[-0.25, -0.5, -0.5]]
    return ids


async def test_a_chat_has_bytes_everywhere(client: httpx.AsyncClient, parts: list[int]) -> None:
    body = USER | {"logprobs": True, "top_logprobs": 3}
    content = (await client.post(CHAT, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(item["bytes"]) for item in content).decode() == "龘 Hello"
    assert content[0]["token"].startswith("\\x")
    assert [*content[0]] == ["token", "logprob", "bytes", "top_logprobs"]
    tops = content[0]["top_logprobs"]
    assert [[*top] for top in tops] == [["token", "logprob", "bytes"]] * 3
    assert len({top["token"] for top in tops}) == 3
    assert tops[-1]["bytes"] is None


async def test_chunks_of_a_chat_have_them_too(client: httpx.AsyncClient, parts: list[int]) -> None:
    body = USER | {"logprobs": True, "top_logprobs": 1, "stream": True}
    items = [
        item
        for chunk in events_of((await client.post(CHAT, json=body)).content)
        for item in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert b"".join(bytes(item["bytes"]) for item in items).decode() == "龘 Hello"


async def test_a_completion_marks_parts(client: httpx.AsyncClient, parts: list[int], tokenizer: TextTokenizer) -> None:
    body = {"prompt": "x", "logprobs": 3}
    logprobs = (await client.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
    first, second = (f"bytes:{tokenizer.name(token_id).text}" for token_id in parts[:2])
    assert logprobs["tokens"][:2] == [first, second]
    assert logprobs["top_logprobs"][0] == {first: -0.25, second: -0.5, "token_id:10000": -0.5}


@pytest.mark.parametrize(
    ("path", "said"),
    [(CHAT, USER | {"logprobs": True, "top_logprobs": 2}), ("/v1/completions", {"prompt": "x", "logprobs": 2})],
)
async def test_ties_are_not_more_than_was_asked_for(
    client: httpx.AsyncClient, parts: list[int], path: str, said: dict[str, Any]
) -> None:
    """The engine reports all that tie with the last; OpenAI's clients count on the number."""
    logprobs = (await client.post(path, json=said)).json()["choices"][0]["logprobs"]
    tops = logprobs["content"][0]["top_logprobs"] if path == CHAT else logprobs["top_logprobs"][0]
    assert len(tops) == 2


async def test_tgi_has_no_bytes(strict_client: httpx.AsyncClient, parts: list[int]) -> None:
    body = USER | {"logprobs": True, "top_logprobs": 3}
    content = (await strict_client.post(CHAT, json=body)).json()["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == ""
    assert [*content[0]] == ["token", "logprob", "top_logprobs"]
    assert [[*top] for top in content[0]["top_logprobs"]] == [["token", "logprob"]] * 3
