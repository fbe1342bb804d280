"""Reading a model folder's tokenizer files."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.link.errors import StartError
from engine.link.special_tokens import QWEN_TOKENS
from server.text.chat_format import ChatFormat
from server.text.tokenizer import TextTokenizer
from tests.unit.server.harness import CHATML, write_model_folder


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


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "is not a JSON object"),
    ],
    ids=["cut off", "deep", "a list"],
)
def test_broken_config(folder: Path, text: str, why: str) -> None:
    (folder / "tokenizer_config.json").write_text(text)
    with pytest.raises(StartError, match=f"tokenizer_config.json {why}"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"added_tokens_decoder": None}, None),
        ({"added_tokens_decoder": [1]}, "The special tokens in .*tokenizer_config.json cannot be used .*: fetch"),
        ({"added_tokens_decoder": {"5": None}}, "The special tokens in .*tokenizer_config.json cannot be used"),
        ({"added_tokens_decoder": {"x": {"special": True}}}, "The special tokens in .*_config.json cannot be used"),
        ({"eos_token": "\ud800"}, "The special tokens in .*tokenizer_config.json cannot be used"),
        ({"chat_template": ["a"]}, "chat_template is a list, but not of named templates: correct tokenizer_config"),
    ],
)
def test_config_of_wrong_types(folder: Path, changes: dict[str, Any], sentence: str | None) -> None:
    change_config(folder, **changes)
    if sentence is None:
        load(folder)
        return
    with pytest.raises(StartError, match=sentence):
        load(folder)


def test_a_template_that_is_not_utf_8(folder: Path) -> None:
    change_config(folder, chat_template=None)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(StartError, match="chat_template.jinja is not UTF-8 .*: fetch the model again"):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_files_that_cannot_be_read(folder: Path, name: str) -> None:
    change_config(folder, chat_template=None)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(StartError) as caught:
        load(folder)
    assert str(caught.value) == f"{folder / name} cannot be read (Is a directory): fix that, or fetch the model again"


def test_a_folder_as_tokenizer_config_path(folder: Path) -> None:
    with pytest.raises(StartError, match=f"^{folder} cannot be read \\(Is a directory\\)"):
        TextTokenizer.from_folder(str(folder), 1, str(folder))


def test_config_may_be_missing(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert load(folder).chat_format == ChatFormat(templates={}, special_tokens=QWEN_TOKENS)


def templates(folder: Path, *, is_strict: bool = False) -> Mapping[str, str]:
    return TextTokenizer.from_folder(str(folder), 1, is_strict=is_strict).chat_format.templates


def test_where_templates_are_found(folder: Path) -> None:
    """The place that is named last wins here: a file of its own, as in transformers; TGI has an order of its own."""
    (folder / "processor_config.json").write_text('{"chat_template": "processor"}')
    change_config(folder, chat_template=None)
    assert templates(folder) == templates(folder, is_strict=True) == {"default": "processor"}
    (folder / "chat_template.json").write_text('{"chat_template": "override"}')
    assert templates(folder) == templates(folder, is_strict=True) == {"default": "override"}
    change_config(folder, chat_template="config")
    assert (templates(folder), templates(folder, is_strict=True)) == ({"default": "config"}, {"default": "override"})
    (folder / "chat_template.jinja").write_text("file")
    assert (templates(folder), templates(folder, is_strict=True)) == ({"default": "file"}, {"default": "override"})


def test_named_templates(folder: Path) -> None:
    change_config(folder, chat_template=[{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}])
    assert templates(folder) == {"rag": "r", "default": "d"}
    assert templates(folder, is_strict=True) == {"default": "d"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    assert templates(folder) == {"rag": "r", "default": "d", "tool_use": "t"}
    (folder / "chat_template.jinja").write_text("file")
    assert templates(folder) == {"default": "file", "tool_use": "t"}
    change_config(folder, chat_template={"default": "by name"})
    (folder / "chat_template.jinja").unlink()
    assert templates(folder)["default"] == "by name"


def test_named_templates_without_a_default(folder: Path) -> None:
    change_config(folder, chat_template=[{"name": "rag", "template": "r"}, {"name": "odd"}, {"template": "odd"}])
    assert (templates(folder), templates(folder, is_strict=True)) == ({"rag": "r"}, {})
    (folder / "chat_template.jinja").write_text("from a file")
    assert templates(folder, is_strict=True) == {"default": "from a file"}


def test_a_byte_order_mark_is_no_part_of_a_file(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert templates(folder) == {"default": CHATML}
    (folder / "chat_template.jinja").write_bytes(codecs.BOM_UTF8 + b"from a file")
    assert templates(folder) == {"default": "from a file"}


def test_a_template_of_the_users_own_comes_first(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / "chat_template.jinja").write_text("from a file")
    own = tmp_path_factory.mktemp("own") / "config.json"
    own.write_text('{"chat_template": "own"}')
    for is_strict in (False, True):
        tokenizer = TextTokenizer.from_folder(str(folder), 1, str(own), is_strict=is_strict)
        assert tokenizer.chat_format.templates == {"default": "own"}


def test_special_tokens_that_templates_may_name(folder: Path) -> None:
    """A token that is null has no name; newer folders have them all in one file, older ones in two."""
    (folder / "special_tokens_map.json").write_text('{"unk_token": "<unk>", "pad_token": {"content": "<pad>"}}')
    change_config(
        folder,
        bos_token={"content": "<s>"},
        pad_token=None,
        add_bos_token=True,
        extra_special_tokens={"image_token": "i"},
    )
    tokens = {"bos_token": "<s>", "eos_token": "<|im_end|>", "image_token": "i"}
    assert load(folder).chat_format.special_tokens == tokens | {"unk_token": "<unk>", "pad_token": "<pad>"}
    change_config(folder, added_tokens_decoder={})
    assert load(folder).chat_format.special_tokens == tokens | {"unk_token": "<|endoftext|>"}
    strict = TextTokenizer.from_folder(str(folder), 1, is_strict=True)
    assert strict.chat_format.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
