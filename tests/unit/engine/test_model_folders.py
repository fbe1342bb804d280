"""Kinds of things that are no model: each is refused in one sentence, before any process starts."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from engine.link.errors import StartError
from engine.link.model_folders import gguf_files, refuse_no_model, refuse_other_paths
from server.launcher.args import parse_args
from server.launcher.children import Signals
from server.launcher.start import find_folders

MODEL = "config.json tokenizer.json model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def write(folder: Path, names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def refusal(model_id: str | Path) -> str:
    """The launcher's sentence; it starts no process for what it refuses."""
    with pytest.raises(StartError) as caught:
        find_folders(parse_args(["--model-id", str(model_id)], {}), Mock(Signals, count=0))
    return str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        MODEL,
        "config.json tokenizer.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors",
        "config.json tokenizer.json model.safetensors.index.json training.safetensors",
        f"{MODEL} pytorch_model.bin model.gguf .gitattributes original/config.json",
    ],
)
def test_a_model_is_not_refused(tmp_path: Path, names: str) -> None:
    refuse_no_model(write(tmp_path, names))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("", "is empty: give a folder with a model in it"),
        (".gitattributes", "is empty: give a folder with a model in it"),
        ("model.safetensors", "has weights but no config.json: a model is a folder with config.json, tokenizer.json"),
        ("a-00001-of-00001.safetensors tokenizer.json", "has weights but no config.json"),
        ("config.json tokenizer.json", "has no *.safetensors file, the weights are missing: fetch all"),
        ("tokenizer.json tokenizer_config.json", "has no *.safetensors file, the weights are missing: fetch all"),
        ("config.json model.safetensors", "has no tokenizer.json: fetch it"),
        ("config.json a.gguf b.gguf", "has several models in GGUF, a.gguf and b.gguf among them: give the path of one"),
        ("m-00001-of-00002.gguf n.gguf", "/m-00002-of-00002.gguf is missing: m-00001-of-00002.gguf is one of 2 parts"),
        ("config.json tokenizer.json pytorch_model.bin", "has only pickled weights"),
        ("data.parquet README.md", "has no *.safetensors file and no config.json: it is no model, check --model-id"),
        ("adapter_config.json", "has no *.safetensors file and no config.json"),
        ("inner/config.json README.md", "has no config.json, but a folder in it has: give --model-id {}/inner"),
        ("refs/main snapshots/abc/config.json", "but a folder in it has: give --model-id {}/snapshots/abc"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, names: str, sentence: str) -> None:
    folder = write(tmp_path / "folder", names)
    text = refusal(folder)
    assert text.startswith(str(folder)) and sentence.format(folder) in text


@pytest.mark.parametrize("name", MODEL.split())
def test_a_pointer_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    (write(tmp_path, MODEL) / name).write_text(POINTER)
    assert "a pointer of Git LFS stands in its place, run `git lfs pull`" in refusal(tmp_path)


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", f"{MODEL} model-q4.gguf")
    for name in MODEL.split():
        assert refusal(folder / name) == f"{folder / name} is a file: give the folder that it lies in, {folder}"
    with pytest.raises(StartError, match="is a GGUF file, and only a server reads those: give a folder"):
        refuse_other_paths(str(folder / "model-q4.gguf"))


@pytest.mark.parametrize(
    ("names", "model_id", "files"),
    [
        (f"{MODEL} model.gguf", "", ""),
        (f"{MODEL} model.gguf", "model.gguf", "model.gguf"),
        ("config.json tokenizer.json model.gguf .hidden.gguf README.md", "", "model.gguf"),
        ("m-00002-of-00002.gguf m-00001-of-00002.gguf", "", "m-00001-of-00002.gguf m-00002-of-00002.gguf"),
        (
            "m-00002-of-00002.gguf m-00001-of-00002.gguf other.gguf",
            "m-00002-of-00002.gguf",
            "m-00001-of-00002.gguf m-00002-of-00002.gguf",
        ),
        ("a.gguf b.gguf", "b.gguf", "b.gguf"),
        ("model.gguf/config.json", "model.gguf", ""),
        ("README.md", "", ""),
    ],
)
def test_the_gguf_files_of_a_model(tmp_path: Path, names: str, model_id: str, files: str) -> None:
    write(tmp_path, names)
    assert gguf_files(str(tmp_path / model_id)) == [tmp_path / name for name in files.split()]


def test_no_text_but_a_path_names_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, "model.gguf"))
    assert [gguf_files(text) for text in ("", "a/b", "\0", "gs://bucket/model.gguf")] == [[], [], [], []]


@pytest.mark.parametrize("prefix", ["./", "{}/", "../here/", "~/"])
@pytest.mark.parametrize("name", ["my-modle", "my_model", "My-Model", "mymodel"])
def test_a_misspelt_path_names_the_nearest_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, name: str
) -> None:
    write(tmp_path / "here" / "my-model", MODEL)
    write(tmp_path / "here" / "other", MODEL)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    prefix = prefix.format(tmp_path / "here")
    text = refusal(prefix + name)
    assert text.startswith(f"'{prefix}{name}' is neither a folder nor the id of a model on the Hub")
    shown = f"{tmp_path / 'here'}/" if prefix == "~/" else prefix
    assert f"(did you mean {shown}my-model?)" in text


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("{}/qwen-q8.gguf", "there is no file {0}/qwen-q8.gguf (did you mean {0}/qwen-q4.gguf?): a model in GGUF is"),
        ("qwen-q8.gguf", "there is no file qwen-q8.gguf (did you mean ./qwen-q4.gguf?): a model in GGUF is given by"),
        ("/no/such/x.gguf", "there is no file /no/such/x.gguf: a model in GGUF is given by the path of its file"),
        ("Qwen/Q-GGUF/q4.gguf", "fetch it with `hf download Qwen/Q-GGUF q4.gguf --local-dir .`, and give the path"),
    ],
)
def test_a_gguf_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, sentence: str
) -> None:
    monkeypatch.chdir(write(tmp_path, "qwen-q4.gguf other.gguf qwen-q8.txt"))
    assert sentence.format(tmp_path) in refusal(path.format(tmp_path))


@pytest.mark.parametrize(
    "model_id", ["owner/name.gguf", "gpt2", "Qwen/Qwen2.5-0.5B-Instruct", "a_b/c.d-e", "gs://bucket/models/mine"]
)
def test_what_may_be_a_model_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_id: str) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_other_paths(model_id)


@pytest.mark.parametrize("path", ["/no/such/folder", "a/b/c", "./far-away", "../", "", "a b", "\0", "~nobody/model"])
def test_a_path_that_is_near_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    write(tmp_path / "here" / "my-model", MODEL)
    monkeypatch.chdir(tmp_path / "here")
    if path == "../":
        os.rmdir(write(tmp_path / "gone", ""))
        path = "../gone/"
    with pytest.raises(StartError) as caught:
        refuse_other_paths(path)
    assert str(caught.value).endswith("nor the id of a model on the Hub: check the path or the id")


def test_other_things_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/no/such/folder")
    assert refusal(tmp_path / "link").endswith("is a link to /no/such/folder, which does not exist: correct the link")
    address = "https://huggingface.co/Qwen/Qwen2.5-0.5B/tree/main"
    assert refusal(address) == f"{address} is an address: give the model's id, like Qwen/Qwen2.5-0.5B"
