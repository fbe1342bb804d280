"""What `text-generation-server quantize` writes gives the same logits in `transformers` with gptqmodel."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.quantize.methods import METHODS
from engine.quantize.options import QuantizeOptions
from engine.quantize.quantize import quantize
from tests.contract.harness import all_logits, make_runner
from tests.e2e.cached_environment import cached_environment
from tests.tiny_model import write_tiny_qwen2

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "oracles" / "load_quantized.py"
TOKEN_IDS = [7 * number % 250 for number in range(48)]
"""The prompt of tests/oracles/load_quantized.py."""
CASES: dict[str, dict[str, Any]] = {
    "gptq": {},
    "gptq-act-order": {"is_act_order": True, "group_size": 32},
    "gptq-8bit": {"bits": 8},
    "awq": {},
    "awq-g64": {"group_size": 64},
    "int8": {},
    "int4": {},
}
TOLERANCE = 0.02
"""In standard deviations of the logits: activations and sums are float16 there, float32 here."""


def write(source: Path, output: Path, method: str, changes: dict[str, Any]) -> None:
    row = METHODS[method]
    options: dict[str, Any] = {"bits": row.bits[0], "group_size": row.group_size, **changes}
    if row.needs_data:
        options |= {"dataset": str(ROOT / "LICENSE"), "sample_tokens": 64}
    quantize(
        QuantizeOptions(model_id=str(source), output_dir=str(output), method=method, perplexity_tokens=0, **options)
    )


@pytest.mark.timeout(3600)
def test_other_libraries_compute_the_same_logits(tmp_path: Path) -> None:
    source = tmp_path / "model"
    write_tiny_qwen2(source, hidden_size=128, intermediate_size=256, dtype=torch.bfloat16)
    for name, changes in CASES.items():
        write(source, tmp_path / name, name.split("-")[0], changes)
    python = cached_environment("gptqmodel") / "bin" / "python"
    # It leaves a folder `logs` where it runs.
    subprocess.run(
        [python, SCRIPT, tmp_path / "theirs.npz", *(tmp_path / name for name in CASES)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    theirs = np.load(tmp_path / "theirs.npz")
    assert set(theirs.files) == set(CASES)
    for name in CASES:
        ours = all_logits(make_runner(tmp_path / name), TOKEN_IDS, 1, [])
        difference = (ours - torch.from_numpy(theirs[name])).abs().max() / ours.std()
        print(f"{name}: largest difference {float(difference):.4f} standard deviations")
        assert difference < TOLERANCE, name
        assert (ours.argmax(dim=1) == torch.from_numpy(theirs[name]).argmax(dim=1)).float().mean() > 0.95
