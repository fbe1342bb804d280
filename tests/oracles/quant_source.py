"""What the scripts quant_<tool>.py share: tiny random models to start from, calibration ids, and a place for results.

Runs beside any `transformers`: it needs only torch, safetensors and tokenizers. From the repository's root, with
`PYTHONPATH=tests`: some of the tools bring a package `tests` of their own.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from oracles.quant_stored import CHECKPOINTS, describe, note, work_folder
from safetensors.torch import load_file, save_file
from tiny_model import QWEN2_MOE, QWEN3_MOE, write_tiny_qwen2

VOCAB_SIZE = 288
"""A multiple of 32, so that a quantised lm_head can be packed."""

SOURCES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 64, "intermediate_size": 128, "is_tied": True},
    "untied": {"hidden_size": 64, "intermediate_size": 128, "is_tied": False},
    "zeros": {"hidden_size": 64, "intermediate_size": 128, "is_tied": True},  # with rows that never go below 0
    "odd": {"hidden_size": 64, "intermediate_size": 160, "is_tied": False},  # down_proj: 5 groups of 32
    "base": {"hidden_size": 128, "intermediate_size": 256, "is_tied": True, "num_hidden_layers": 1},
    "ragged": {"hidden_size": 128, "intermediate_size": 192, "is_tied": True, "num_hidden_layers": 1},  # 1.5 groups
    "wide": {"hidden_size": 256, "intermediate_size": 256, "is_tied": True, "num_hidden_layers": 1},
    "wide-untied": {"hidden_size": 256, "intermediate_size": 256, "is_tied": False, "num_hidden_layers": 1},
    "experts": {**QWEN3_MOE, "num_experts": 4, "is_tied": True, "num_hidden_layers": 1},
    "wide-experts": {
        **QWEN2_MOE,
        "hidden_size": 256,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 32,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "is_tied": True,
        "num_hidden_layers": 1,
    },
}
"""2 layers, 4 heads and 2 KV heads if not said otherwise, and biases other than zero; the place is the seed."""
POSITIVE_ROWS = {"q_proj": (0, 9), "k_proj": (31,), "o_proj": (3, 4, 17), "gate_proj": (5, 63), "down_proj": (8, 30)}
"""Output channels of `zeros` whose weights are all positive: the zero point of their groups is 0 without symmetry."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint to be written; the options are the tool's own."""

    name: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float16


def write_source(name: str, dtype: torch.dtype) -> Path:
    """The folder of a source model, written anew; the same bytes every time."""
    folder = work_folder() / f"{name}-{str(dtype).removeprefix('torch.')}"
    shutil.rmtree(folder, ignore_errors=True)
    write_tiny_qwen2(folder, dtype=dtype, seed=list(SOURCES).index(name), vocab_size=VOCAB_SIZE, **SOURCES[name])
    if name == "zeros":
        _make_rows_positive(folder / "model.safetensors")
    return folder


def _make_rows_positive(path: Path) -> None:
    weights = load_file(path)
    for layer in range(2):
        for module, rows in POSITIVE_ROWS.items():
            parent = "mlp" if module in ("gate_proj", "down_proj") else "self_attn"
            weight = weights[f"model.layers.{layer}.{parent}.{module}.weight"]
            weight[list(rows)] = weight[list(rows)].abs() + 0.05
    save_file(weights, path, metadata={"format": "pt"})


def calibration_ids(num_rows: int = 32, num_tokens: int = 64) -> list[list[int]]:
    """Random token ids; the first 256 are the ones that text leads to."""
    generator = torch.Generator().manual_seed(1234)
    ids: list[list[int]] = torch.randint(0, 256, (num_rows, num_tokens), generator=generator).tolist()
    return ids


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def store(written: Path, case: Case, tool: str, tool_versions: dict[str, str], command: str) -> None:
    """Copy what a server reads out of the tool's output folder, byte for byte, and note where it came from."""
    folder = CHECKPOINTS / f"{tool}-{case.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = [path.name for pattern in ("*.safetensors*", "*.gguf") for path in written.glob(pattern)]
    names = ["config.json", "quantize_config.json", "gguf_index.json", *sorted(weights)]
    for name in names:
        if (written / name).exists():
            shutil.copyfile(written / name, folder / name)
    note(
        folder.name,
        **described(case, tool),
        versions=tool_versions,
        command=command,
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        files={path.name: describe(path) for path in sorted(folder.iterdir())},
        error=None,
    )


def described(case: Case, tool: str) -> dict[str, Any]:
    dtype = str(case.dtype).removeprefix("torch.")
    return {"tool": tool, "source": f"{case.source} ({dtype})", "options": case.options}


def write_cases(
    cases: list[Case], chosen: list[str], tool: str, packages: tuple[str, ...], write: Callable[[Case, Path, Path], Any]
) -> None:
    """Write every case (or the chosen ones) with `write(case, source, target)`; what fails is noted and left out.

    `write` may return facts for provenance.json, such as how far the tool's own forward is from the dequantisation.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for case in cases:
        if chosen and case.name not in chosen:
            continue
        target = work_folder() / f"{tool}-{case.name}"
        shutil.rmtree(target, ignore_errors=True)
        command = f"PYTHONPATH=tests:. python tests/oracles/quant_{tool.replace('-', '_')}.py {case.name}"
        try:
            facts = write(case, write_source(case.source, case.dtype), target)
        except Exception as error:  # the point is to learn what a tool refuses, and in which words
            frame = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {error} ({Path(frame.filename).name}: {frame.line})"
            traceback.print_exc()
            print(f"FAILED {case.name}: {message}", flush=True)
            shutil.rmtree(CHECKPOINTS / f"{tool}-{case.name}", ignore_errors=True)
            note(f"{tool}-{case.name}", **described(case, tool), error=message[:600], files=None)
            continue
        store(target, case, tool, versions(*packages), command)
        note(f"{tool}-{case.name}", **(facts or {}))
        print(f"wrote {case.name}: {facts or ''}", flush=True)
