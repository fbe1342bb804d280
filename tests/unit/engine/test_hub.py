"""What counts as a whole model, what is refused, what is tried again: the Hub itself is never asked here."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import FileMetadataError, LocalEntryNotFoundError
from safetensors.torch import save_file

from engine.checkpoint import hub, retries
from engine.checkpoint.download import Download
from engine.link import progress
from engine.link.errors import StartError
from engine.link.model_folders import refuse_names
from tests.tiny_model import write_tiny_qwen2

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A whole snapshot of tiny/Qwen2 in the cache; nothing can be fetched."""
    repository = tmp_path / "models--tiny--Qwen2"
    write_tiny_qwen2(repository / "snapshots" / COMMIT, num_shards=2)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_whole_snapshot_is_used_as_it_is(snapshot: Path, revision: str | None) -> None:
    assert hub.download_model("tiny/Qwen2", revision) == snapshot


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_model_directly_in_hf_home_is_found_as_images_of_tgi_2_left_it(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    home = snapshot.parents[2]
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    assert hub.download_model("tiny/Qwen2", revision) == snapshot
    write_tiny_qwen2(home / "hub" / "models--tiny--Qwen2" / "snapshots" / COMMIT)
    if revision == COMMIT:
        assert hub.download_model("tiny/Qwen2", revision) == home / "hub" / snapshot.relative_to(home)


def test_a_cache_that_is_named_is_the_only_one(snapshot: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(snapshot.parents[2]))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "named"))
    with pytest.raises(StartError, match="is not in the cache .*/named"):
        hub.download_model("tiny/Qwen2", None)


def test_a_damaged_model_in_the_older_place_is_not_used(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = snapshot.parents[2]
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    next(snapshot.glob("*.safetensors")).write_bytes(b"cut")
    with pytest.raises(StartError, match="is not in the cache .*/hub, or not all of it"):
        hub.download_model("tiny/Qwen2", None)


@pytest.mark.parametrize("prefix", ["/", "./", "../"])
def test_a_revision_of_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path if prefix == "./" else tmp_path / "here")
    model_id = f"{tmp_path}/model" if prefix == "/" else f"{prefix}model"
    with pytest.raises(StartError) as caught:
        hub.download_model(model_id, "main")
    assert str(caught.value) == "--revision is for models of the Hub: leave it out for a local folder"


def test_with_a_revision_an_id_of_the_hub_is_no_folder(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny" / "Qwen2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.download_model("tiny/Qwen2", "main") == snapshot
    with pytest.raises(StartError, match="is empty: give a folder"):
        hub.download_model("tiny/Qwen2", None)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def point_to_git_lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("config.json", Path.unlink, "has weights but no config.json"),
        ("config.json", shorten, "config.json cannot be read"),
        ("tokenizer.json", Path.unlink, "has no tokenizer.json: fetch it"),
        ("model-00002-of-00002.safetensors", Path.unlink, "is named by model.safetensors.index.json but missing"),
        ("model-00002-of-00002.safetensors", shorten, "is cut off or damaged"),
        ("model-00002-of-00002.safetensors", point_to_git_lfs, "is cut off or damaged"),
    ],
)
def test_what_is_not_whole_is_not_used(snapshot: Path, name: str, harm: Callable[[Path], None], reason: str) -> None:
    harm(snapshot / name)
    with pytest.raises(StartError, match="tiny/Qwen2 is not in the cache .*, or not all of it, and HF_HUB_OFFLINE"):
        hub.download_model("tiny/Qwen2", None)
    with pytest.raises(StartError, match=reason):
        hub.download_model(str(snapshot), None)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ("config.json model.safetensors", None),
        ("config.json model.safetensors pytorch_model.bin adapter_config.json", None),
        ("config.json pytorch_model.bin training_args.bin", "has only pickled weights"),
        ("config.json training_args.safetensors model.pt", "has only pickled weights"),
        ("adapter_config.json adapter_model.safetensors", None),
        ("adapter_config.json adapter_model.safetensors config.json optimizer.safetensors tokenizer.json", None),
        ("adapter_config.json adapter_model.bin config.json", "has only pickled weights"),
        ("adapter_config.json config.json", "has no \\*.safetensors file"),
        ("config.json adapter_model.safetensors", "has no \\*.safetensors file"),
        ("config.json model.gguf", "has no \\*.safetensors file"),
        ("model.safetensors", "has weights but no config.json"),
        (".gitattributes", "is empty"),
    ],
)
def test_the_names_of_the_files_decide(names: str, sentence: str | None) -> None:
    if sentence is None:
        refuse_names(names.split(), "a/b")
        return
    with pytest.raises(StartError, match=f"a/b {sentence}"):
        refuse_names(names.split(), "a/b")


def write_adapter(folder: Path, **config: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")


def test_a_whole_adapter_needs_neither_configuration_nor_tokenizer(snapshot: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "models--tiny--lora" / "snapshots" / COMMIT)
    assert hub.download_model("tiny/lora", COMMIT) == tmp_path / "models--tiny--lora" / "snapshots" / COMMIT
    write_adapter(tmp_path / "local")
    assert hub.download_model(str(tmp_path / "local"), None) == tmp_path / "local"
    shorten(tmp_path / "local" / "adapter_model.safetensors")
    with pytest.raises(StartError, match="adapter_model.safetensors is cut off or damaged"):
        hub.download_model(str(tmp_path / "local"), None)


def wrapped(cause: Exception) -> Exception:
    """The library's error for a file that could not be fetched and is not in the cache either."""
    error = LocalEntryNotFoundError("not in the cache either")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "num_calls", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/cache/x"), 1, "The disk of .* is full: free space"),
        (RuntimeError("IO error: No space left on device (os error 28)"), 1, "The disk of .* is full: free space"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/x"), 1, "/cache/x can't be used"),
        (wrapped(FileMetadataError("no commit")), 1, "does not answer as a Hub does: check HF_ENDPOINT"),
        (OSError("Consistency check failed: a.json?signature=abc\nretry"), 5, r"failed: a.json retry\): check the net"),
        (RuntimeError("hf_xet: connection reset"), 5, "can't be reached .*connection reset"),
    ],
)
def test_every_failure_names_its_mend(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, num_calls: int, sentence: str
) -> None:
    calls = []

    def fail(*_: Any, **__: Any) -> str:
        calls.append(1)
        raise error

    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(hub, "_list_files", lambda *_: (COMMIT, {"config.json": 1, "model.safetensors": 1}))
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    (snapshot / "config.json").unlink()
    with pytest.raises(StartError, match=sentence):
        hub.download_model("tiny/Qwen2", None)
    assert len(calls) == num_calls


def test_what_can_not_be_an_id_or_an_address_is_refused(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model_id in ("no/such/folder", "/no/such/folder", ""):
        with pytest.raises(StartError, match=f"'{model_id}' is neither a folder nor the id of a model"):
            hub.download_model(model_id, None)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(constants, "ENDPOINT", "huggingface.co")
    with pytest.raises(StartError, match="HF_ENDPOINT is not an address"):
        hub.download_model("tiny/Nothing", None)


def test_only_old_leftovers_are_removed(snapshot: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for name in ("old.1.incomplete", "new.2.incomplete", "whole"):
        (blobs / name).touch()
    long_ago = time.time() - hub.LEFTOVER_S - 1
    os.utime(blobs / "old.1.incomplete", (long_ago, long_ago))
    os.utime(blobs / "whole", (long_ago, long_ago))
    hub._remove_leftovers("tiny/Qwen2")
    assert {path.name for path in blobs.iterdir()} == {"new.2.incomplete", "whole"}


def test_the_librarys_warnings_are_one_line_without_signatures(caplog: pytest.LogCaptureFixture) -> None:
    hub._relay_library_log()
    library = logging.getLogger("huggingface_hub.file_download")
    library.warning("Error while downloading from %s: reset\nTrying to resume", "https://cdn/x?Signature=secret")
    assert caplog.messages == ["Error while downloading from https://cdn/x reset Trying to resume"]


def test_progress_is_that_of_all_files_and_tells_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_S", 0.0)
    heard: list[tuple[str, float | None, str]] = []
    start = progress.StartProgress(lambda *report: heard.append(report))
    start.begin(progress.Stage.DOWNLOADING)
    hub._Progress.download = Download(start, num_bytes=8_000_000, num_whole_bytes=4_000_000)
    for progress_s in (3600.0, 0.001):
        monkeypatch.setattr(hub, "PROGRESS_S", progress_s)
        with hub._Progress(desc="(…)0123/model.safetensors", total=4_000_000, unit="B", unit_scale=True) as bar:
            for _ in range(2):
                time.sleep(0.002)
                bar.update(1_000_000)
    assert [(stage, done, text.split(" of ")[0]) for stage, done, text in heard] == [
        ("downloading", None, "Downloading"),
        ("downloading", 0.625, "Download: model.safetensors: 25 %"),
        ("downloading", 0.75, "Download: model.safetensors: 50 %"),
    ]


def test_an_upload_makes_a_private_model_and_says_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append((options,))
            if len(calls) > 2:
                raise FileMetadataError("not a Hub")

    monkeypatch.setattr(hub, "HfApi", Api)
    hub.upload_model(tmp_path, "me/mine")
    assert calls == [
        ("me/mine", {"private": True, "exist_ok": True}),
        ({"repo_id": "me/mine", "folder_path": tmp_path},),
    ]
    with pytest.raises(StartError, match=rf"does not answer as a Hub does.*\({tmp_path} is complete\)"):
        hub.upload_model(tmp_path, "me/mine")
