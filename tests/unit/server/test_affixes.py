"""Plain prompts begin and end with the tokens that `transformers` 4 adds: the table was written by version 4.57.6."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from server.app import create_app
from server.text.tokenizer import MAX_SHORT_CHARS, TextTokenizer
from tests.unit.server.harness import FakeEngine, client_of, make_config, one_by_one, write_model_folder

START, END, OTHER = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
BOS, EOS, FILE = 1, 2, 0
"""Ids of the tokenizer's bos and eos token, and of the one that its file puts around a text."""

LLAMA = [
    ({}, [BOS], []),
    ({"add_bos_token": True}, [BOS], []),
    ({"add_bos_token": False}, [], []),
    ({"add_bos_token": True, "add_eos_token": True}, [BOS], [EOS]),
    ({"add_bos_token": False, "add_eos_token": True}, [], [EOS]),
]
ROWS = [(name, *row) for name in ("LlamaTokenizerFast", "LlamaTokenizer") for row in LLAMA]


def make_folder(folder: Path, *, has_processor: bool = False, **changes: Any) -> TextTokenizer:
    write_model_folder(folder)
    path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if has_processor:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.post_processor = TemplateProcessing(single=f"{OTHER} $A {OTHER}", special_tokens=[(OTHER, FILE)])
        tokenizer.save(str(path))
    config = {**json.loads(config_path.read_text()), "bos_token": START, **changes}
    config_path.write_text(json.dumps(config))
    return TextTokenizer.from_folder(str(folder), 1)


def ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    return asyncio.run(tokenizer.encode(text, add_special_tokens=True))


def plain_ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer._encode(text, False)


@pytest.mark.parametrize("has_processor", [False, True])
@pytest.mark.parametrize(("name", "changes", "before", "after"), ROWS)
def test_classes_made_after_llamas_add_their_own(
    tmp_path: Path, name: str, changes: dict[str, Any], before: list[int], after: list[int], has_processor: bool
) -> None:
    tokenizer = make_folder(tmp_path, has_processor=has_processor, tokenizer_class=name, **changes)
    plain = plain_ids(tokenizer, "Hello")
    assert ids(tokenizer, "Hello") == [*before, *plain, *after]
    assert not {BOS, EOS, FILE} & set(plain)


@pytest.mark.parametrize("has_processor", [False, True])
@pytest.mark.parametrize("changes", [changes for changes, _, _ in LLAMA])
@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", None])
def test_other_classes_leave_it_to_the_file(
    tmp_path: Path, name: str | None, changes: dict[str, Any], has_processor: bool
) -> None:
    tokenizer = make_folder(tmp_path, has_processor=has_processor, tokenizer_class=name, **changes)
    plain = plain_ids(tokenizer, "Hello")
    assert ids(tokenizer, "Hello") == ([FILE, *plain, FILE] if has_processor else plain)


@pytest.mark.parametrize("bos", [None, "<|unknown|>"])
def test_a_token_that_is_not_there_is_not_added(tmp_path: Path, bos: str | None) -> None:
    tokenizer = make_folder(tmp_path, tokenizer_class="LlamaTokenizerFast", bos_token=bos)
    assert ids(tokenizer, "Hello") == plain_ids(tokenizer, "Hello")


def test_older_folders_name_the_token_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": START}}))
    tokenizer = make_folder(tmp_path, tokenizer_class="LlamaTokenizer", bos_token=None)
    assert ids(tokenizer, "Hello") == [BOS, *plain_ids(tokenizer, "Hello")]


def test_a_long_text_gets_the_same_tokens(tmp_path: Path) -> None:
    bos = {"content": "<｜begin▁of▁sentence｜>"}
    for tokens in ({}, {"bos_token": bos}):
        tokenizer = make_folder(tmp_path, tokenizer_class="LlamaTokenizerFast", add_eos_token=True, **tokens)
        long = ids(tokenizer, "a" * (MAX_SHORT_CHARS + 1))
        tokenizer.close()
        assert long[-1] == EOS
        assert (long[0] == BOS) is not tokens


async def test_prompts_begin_with_bos_and_chats_have_it_once(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = make_folder(tmp_path, tokenizer_class="LlamaTokenizerFast", chat_template=template)
    engine = FakeEngine()
    bodies: dict[str, dict[str, Any]] = {
        "/generate": {"inputs": "Hello"},
        "/v1/completions": {"prompt": "Hello", "model": "m"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    }
    async with client_of(create_app(engine, make_config(), tokenizer)) as client:
        for path, body in bodies.items():
            engine.script.events = one_by_one([5])
            assert (await client.post(path, json=body)).status_code == 200, path
        tokens = (await client.post("/tokenize", json={"inputs": "Hello"})).json()
    plain = plain_ids(tokenizer, "Hello")
    assert [request.prompt_token_ids for request in engine.requests] == [[BOS, *plain]] * 3
    assert tokens[0] == {"id": BOS, "text": "", "start": 0, "stop": 0}
    assert [token["id"] for token in tokens] == [BOS, *plain]
