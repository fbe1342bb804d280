"""What a model folder says about the tokens that end a text."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.files import read_eos_token_ids, read_json, read_model_config, read_quantization_config
from engine.checkpoint.safetensors_weights import safetensors_files
from engine.link.errors import StartError
from engine.link.model_files import read_file

TOKENIZER = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"5": {"content": "<|im_end|>"}, "6": {"content": "x"}}}


@pytest.mark.parametrize(
    ("generation", "tokenizer", "config", "expected"),
    [
        ({"eos_token_id": [1, 2]}, TOKENIZER, {"eos_token_id": 9}, [1, 2]),
        ({"eos_token_id": 1}, TOKENIZER, {"eos_token_id": 9}, [5]),
        ({"eos_token_id": 1}, {}, {"eos_token_id": 9}, [1]),
        ({}, TOKENIZER, {"eos_token_id": 9}, [5]),
        ({}, {**TOKENIZER, "eos_token": {"content": "x"}}, {"eos_token_id": 9}, [6]),
        ({}, {"eos_token": "unknown"}, {"eos_token_id": 9}, [9]),
        ({}, {}, {"eos_token_id": [8, 9]}, [8, 9]),
        ({}, {}, {"eos_token_id": 0}, [0]),
        ({}, {}, {}, []),
    ],
)
def test_eos_ids(
    tmp_path: Path, generation: dict[str, Any], tokenizer: dict[str, Any], config: dict[str, Any], expected: list[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert read_eos_token_ids(tmp_path, config) == expected


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="has no config.json: give --model-id a folder of a Hugging Face model"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", {"eos_token_id": [None]}, r"eos_token_id in .* is \[None\], not token ids: fetch"),
        ("config.json", {"eos_token_id": ["1"]}, r"eos_token_id in .* is \['1'\], not token ids: fetch"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder in .* cannot be used .*: fetch"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": 1}}, "added_tokens_decoder in .* cannot be used"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "e"}}},
            "added_tokens_decoder in .* cannot",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": None}, None),
    ],
)
def test_eos_ids_that_are_none(tmp_path: Path, name: str, content: dict[str, Any], message: str | None) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token": "e", **content}))
    config = content if name == "config.json" else {}
    if message is None:
        assert read_eos_token_ids(tmp_path, config) == []
        return
    with pytest.raises(StartError, match=message):
        read_eos_token_ids(tmp_path, config)


@pytest.mark.parametrize(
    "weight_map", [None, [], {"a": 5}, {"a": ["model.safetensors"]}, {"a": "model.safetensors", "b": None}]
)
def test_an_index_without_file_names(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(StartError, match="index.json has no weight_map of file names: fetch the model again"):
        safetensors_files(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_folder_in_place_of_a_json_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(StartError) as caught:
        read_json(tmp_path / name)
    assert str(caught.value) == (
        f"{tmp_path / name} cannot be read (Is a directory): mend that, or fetch the model again"
    )


def test_weights_that_are_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to("nowhere")
    with pytest.raises(StartError, match="model.safetensors is no file, or a link to a missing one: fetch the model"):
        safetensors_files(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/model.safetensors", "a/model.safetensors", "a/../model.safetensors", "..", "", "."],
)
def test_an_index_that_names_files_outside_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "model.safetensors").touch()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(StartError, match="index.json names .*, which is no file of this folder: fetch the model from"):
        safetensors_files(folder)


def test_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").touch()
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert safetensors_files(snapshot) == [snapshot / "model-1.safetensors"]


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/tty", "socket"])
@pytest.mark.timeout(10)
def test_special_files_are_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to(kind)
    for read in (read_file, read_json):
        with pytest.raises(
            StartError, match="config.json is no regular file, or a link to none: fetch the model again"
        ):
            read(path)


def test_a_file_may_not_be_larger_than_any_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.link.model_files.MAX_FILE_BYTES", 1 << 20)
    path = tmp_path / "config.json"
    path.write_bytes(b" " * (1 << 20))
    assert read_file(path) == b" " * (1 << 20)
    path.write_bytes(b" " * (1 << 20) + b" ")
    with pytest.raises(StartError, match="config.json is larger than 1 MiB: fetch the model again"):
        read_file(path)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("value", [[], [1], "gptq", 4, True])
def test_a_quantisation_that_is_no_object(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(StartError, match=f"{key} in .* is not a JSON object: fetch the model again"):
        read_quantization_config(tmp_path, {key: value})


@pytest.mark.parametrize("method", ["open", "iterdir", "is_file"])
def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    (tmp_path / "model.safetensors").touch()
    if method == "open":
        (tmp_path / "model.safetensors.index.json").touch()

    def refuse(path: Path, *_: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(StartError, match=f"^{tmp_path}.* cannot be read \\(Permission denied\\): mend that, or fetch"):
        safetensors_files(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff", "[" * 100_000])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StartError, match="config.json .*: fetch the model again"):
        read_model_config(tmp_path)
