"""Greedy ids of the real demo model with stretched positions and with a sliding window equal those of `transformers`.

The engine runs in this process: each case needs a configuration of its own, not a server. As in test_reference_ids.py,
ids are compared up to the first near-tie.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import engine.start
from engine.link.config import EngineConfig
from engine.start import start_engine
from tests.conftest import NUM_THREADS
from tests.contract.harness import KERNELS, make_requests, run_requests
from tests.e2e.test_reference_ids import check

CASES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "rope_ids.json").read_text())["cases"]
PLAIN = CASES.pop("plain")
FEW = ("yarn", "sliding window")
"""The cases of `make test`; tests/slow/test_more_ids.py has the others."""


def with_config(model: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A folder with the model's files and another config.json."""
    for path in model.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def check_case(case: str, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts run together, in chunks."""
    monkeypatch.setattr(engine.start, "detect_device", lambda local_rank, name: KERNELS)
    folder = with_config(demo_model, tmp_path, CASES[case]["changes"])
    limits = {"max_total_tokens": 128, "max_batch_total_tokens": 512, "max_batch_prefill_tokens": 70}
    core, _ = start_engine(EngineConfig(model_path=str(folder), dtype="float32", num_threads=NUM_THREADS, **limits))
    entries = CASES[case]["entries"]
    requests = make_requests([entry["prompt_ids"] for entry in entries.values()], max_new_tokens=32)
    outcome = run_requests(core, requests)
    for (name, entry), ids in zip(entries.items(), outcome.token_ids, strict=True):
        check(name, entry, ids)
    assert all(entries[name]["ids"] != PLAIN["entries"][name]["ids"] for name in entries if "longer" in name)


@pytest.mark.parametrize("case", FEW)
def test_ids_equal_transformers(case: str, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_case(case, demo_model, tmp_path, monkeypatch)
