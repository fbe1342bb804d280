"""Reading a model folder's tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.link.errors import StartError
from server.text.tokenizer import TextTokenizer
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


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "does not hold a JSON object"),
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
    assert str(caught.value) == f"{folder / name} cannot be read (Is a directory): mend that, or fetch the model again"


def test_a_folder_as_tokenizer_config_path(folder: Path) -> None:
    with pytest.raises(StartError, match=f"^{folder} cannot be read \\(Is a directory\\)"):
        TextTokenizer.from_folder(str(folder), 1, str(folder))


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
