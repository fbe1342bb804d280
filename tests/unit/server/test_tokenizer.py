"""Reading a model folder's tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import StartError
from server.tokenizer import TextTokenizer
from tests.unit.server.harness import write_model_folder


def load(folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(str(folder), 1)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model_folder(tmp_path)
    return tmp_path


async def test_encode_and_decode(tokenizer: TextTokenizer) -> None:
    ids = await tokenizer.encode("Hello, 世界<|im_end|>", add_special_tokens=True)
    assert tokenizer.decode(ids) == "Hello, 世界<|im_end|>"
    assert [tokenizer.is_special(token_id) for token_id in ids][-2:] == [False, True]


def test_special_tokens_come_from_both_files(folder: Path) -> None:
    change_config(
        folder,
        additional_special_tokens=["Hello"],
        pad_token={"content": "!"},
        added_tokens_decoder={"7": {"content": "x", "special": True}, "8": {"content": "y", "special": False}},
    )
    tokenizer = load(folder)
    (hello,), (bang,) = tokenizer._encode("Hello", False), tokenizer._encode("!", False)
    assert all(tokenizer.is_special(token_id) for token_id in (0, 1, 2, 7, hello, bang))
    assert not tokenizer.is_special(8)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"tokenizer.json is missing: the model folder needs a tokenizer.json"):
        load(tmp_path)


@pytest.mark.parametrize("num_spare_rows", [None, -1, 0, 5])
def test_a_vocabulary_smaller_than_the_tokenizer(folder: Path, num_spare_rows: int | None) -> None:
    num_tokens = load(folder)._tokenizer.get_vocab_size()
    if num_spare_rows is not None:
        (folder / "config.json").write_text(json.dumps({"vocab_size": num_tokens + num_spare_rows}))
    if num_spare_rows != -1:
        load(folder)
        return
    with pytest.raises(StartError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"{folder} has {num_tokens} tokens in tokenizer.json but a vocab_size of {num_tokens - 1} in config.json: "
        "they do not belong together, fetch the model again"
    )


def test_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(StartError, match=r"tokenizer.json cannot be read as a tokenizer: "):
        load(folder)


@pytest.mark.parametrize(("text", "why"), [("{", "is not valid JSON"), ("[]", "does not hold a JSON object")])
def test_broken_config(folder: Path, text: str, why: str) -> None:
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(StartError, match=f"tokenizer_config.json {why}"):
        load(folder)


def test_config_may_be_missing(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert load(folder).chat_format.template is None


def test_template_choice(folder: Path) -> None:
    change_config(folder, chat_template=[{"name": "rag", "template": "r"}, {"name": "default", "template": "named"}])
    assert load(folder).chat_format.template == "named"
    (folder / "processor_config.json").write_text('{"chat_template": "processor"}')
    assert load(folder).chat_format.template == "processor"
    (folder / "chat_template.json").write_text('{"chat_template": "override"}')
    assert load(folder).chat_format.template == "override"


def test_named_templates_without_a_default(folder: Path) -> None:
    change_config(folder, chat_template=[{"name": "rag", "template": "r"}])
    assert load(folder).chat_format.template is None
    (folder / "chat_template.jinja").write_text("from a file")
    assert load(folder).chat_format.template == "from a file"


def test_bos_and_eos(folder: Path) -> None:
    change_config(folder, bos_token={"content": "<s>"})
    chat_format = load(folder).chat_format
    assert (chat_format.bos_token, chat_format.eos_token) == ("<s>", "<|im_end|>")
