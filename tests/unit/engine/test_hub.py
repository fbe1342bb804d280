"""What counts as a model that is already there: the Hub itself is never asked here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from engine import hub
from engine.errors import StartError


class FakeHub:
    """Stands in for `snapshot_download`: a cache folder, and a network that fills it or is not there."""

    def __init__(self, cache: Path | None, *, is_reachable: bool = True) -> None:
        self._cache = cache
        self._is_reachable = is_reachable
        self.num_fetches = 0

    def __call__(self, model_id: str, *, local_files_only: bool = False, **_: Any) -> str:
        if local_files_only:
            if self._cache is None:
                raise LocalEntryNotFoundError("no snapshot")
            return str(self._cache)
        if not self._is_reachable:
            raise LocalEntryNotFoundError("no network")
        self.num_fetches += 1
        return "/fetched"


def snapshot(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).write_text('{"a": 1}')
    return folder


@pytest.mark.parametrize(
    ("files", "num_fetches"),
    [
        (("config.json", "model.safetensors"), 0),
        (("config.json",), 1),
        (("model.safetensors",), 1),
        (("config.json", "model.safetensors.index.json"), 1),
    ],
)
def test_only_a_whole_snapshot_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: tuple[str, ...], num_fetches: int
) -> None:
    fake = FakeHub(snapshot(tmp_path, *files))
    monkeypatch.setattr(hub, "snapshot_download", fake)
    folder = hub.download_model("Qwen/Q", None, None)
    assert fake.num_fetches == num_fetches
    assert folder == (Path("/fetched") if num_fetches else tmp_path)


def test_no_cache_and_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", FakeHub(None, is_reachable=False))
    with pytest.raises(StartError, match="not in the cache and the Hub can't be reached"):
        hub.download_model("Qwen/Q", None, None)
