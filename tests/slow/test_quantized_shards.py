"""Stored GPTQ with act-order and AWQ of the demo model: two shards give the ids of one. Quantising takes minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.link.environment import user_cache_dir
from tests.e2e.conftest import build_demo_model
from tests.e2e.test_demo_shards import answers, ids

TEXT = Path(__file__).parents[2] / "benchmarks" / "texts" / "pride_and_prejudice.txt"
OPTIONS = {"gptq-act-order": ["--method", "gptq", "--act-order"], "awq": ["--method", "awq"]}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("flags", [("--dtype", "float32"), ()], ids=["float32", "default"])
@pytest.mark.parametrize("name", OPTIONS)
def test_two_shards_give_the_ids_of_one(name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    source = build_demo_model()
    folder = user_cache_dir(dict(os.environ)) / "quantised" / f"{source.name}-{name}"
    if not (folder / "config.json").exists():
        command = [sys.executable, "-P", "-m", "engine.cli", "quantize", str(source), str(folder), *OPTIONS[name]]
        subprocess.run([*command, "--dataset", str(TEXT), "--perplexity-tokens", "0"], check=True)
    one, two = (answers(folder, tmp_path, num_shards, *flags) for num_shards in (1, 2))
    assert ids(two) == ids(one)
    if not flags or name == "gptq-act-order":  # what is gathered is the arithmetic of one shard
        assert two == one
