"""What a server must answer for each stored quantised checkpoint: expected.npz beside it, and the table of the README.

    PYTHONPATH=. .venv/bin/python tests/oracles/quant_expected.py [CHECKPOINT...]

The weights are dequantised by dequantize.py, in float32, and run by `transformers` in float32. Per prompt: its ids, the
logits after its last token, 16 greedy ids, and at each of them the gap between the two largest logits, so that a test
can tell a near-tie from a mistake. Where the readings of a stored zero point differ, each has its own arrays.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from tests.oracles.dequantize import Array, Floats, Zeros, dequantize
from tests.oracles.quant_stored import CHECKPOINTS, PROVENANCE, describe, note

NUM_NEW_TOKENS = 16
PROMPT_SIZES = (5, 40)
LEAST_GAP = 0.002
"""Gap between the best and the second logit. The first prompts are taken that have it in every step and reading."""
README = CHECKPOINTS / "README.md"
TABLE_BEGINS = "<!-- below: written by tests/oracles/quant_expected.py -->\n"


def dense_model(folder: Path, weights: dict[str, Floats]) -> Any:
    """A plain float32 model of the stored configuration with these weights, every one of them used."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    tensors = {name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()}
    with tempfile.TemporaryDirectory() as dense:  # experts are put together while a folder is read
        (Path(dense) / "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(dense) / "model.safetensors", metadata={"format": "pt"})
        model: Any
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            dense, dtype=torch.float32, output_loading_info=True
        )
    assert not info["unexpected_keys"] and not info["missing_keys"], info
    return model.eval()


@torch.inference_mode()
def greedy(model: Any, prompt: list[int]) -> tuple[Floats, list[int], list[float]]:
    """Logits after the prompt, the ids that follow, and the gaps at them; no end of text ends it."""
    ids, gaps, first = list(prompt), [], None
    for _ in range(NUM_NEW_TOKENS):
        logits = model(torch.tensor([ids])).logits[0, -1]
        first = logits.numpy() if first is None else first
        best = logits.topk(2)
        gaps.append(float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    assert first is not None
    return first, ids[len(prompt) :], gaps


def distinct_models(folder: Path) -> dict[Zeros, Any]:
    """`word`, and every other reading that gives other weights."""
    by_word = dequantize(folder, zeros="word")
    models: dict[Zeros, Any] = {"word": dense_model(folder, by_word)}
    for zeros in get_args(Zeros)[1:]:
        weights = dequantize(folder, zeros=zeros)
        if any(not np.array_equal(weights[name], by_word[name]) for name in weights):
            models[zeros] = dense_model(folder, weights)
    return models


def expected_arrays(models: dict[Zeros, Any], prompts: list[list[int]]) -> dict[str, Array]:
    """prompt_<n>, logits_<n>, ids_<n> and gaps_<n>; under a reading other than `word` with its name as a suffix."""
    arrays: dict[str, Array] = {f"prompt_{number}": np.array(ids, np.int32) for number, ids in enumerate(prompts)}
    for zeros, model in models.items():
        suffix = "" if zeros == "word" else f"_{zeros}"
        for number, prompt in enumerate(prompts):
            logits, ids, gaps = greedy(model, prompt)
            arrays |= {
                f"logits_{number}{suffix}": logits.astype(np.float32),
                f"ids_{number}{suffix}": np.array(ids, np.int32),
                f"gaps_{number}{suffix}": np.array(gaps, np.float32),
            }
    return arrays


def least_gap(arrays: dict[str, Array]) -> float:
    return min(float(gaps.min()) for name, gaps in arrays.items() if name.startswith("gaps"))


def random_prompts(seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, size).tolist() for size in PROMPT_SIZES]


def write_readme_table() -> None:
    entries = json.loads(PROVENANCE.read_text())
    stored = {name: entry for name, entry in entries.items() if "files" in entry}
    refused = {name: entry for name, entry in entries.items() if "error" in entry}
    rows = ["", "## Checkpoints", ""]
    for tool in sorted({entry["tool"] for entry in stored.values()}):
        of_tool = {name: entry for name, entry in stored.items() if entry["tool"] == tool}
        first = next(iter(of_tool.values()))
        versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        rows += [f"### {tool}", "", f"Versions: {versions}. Written by `{first['command'].rpartition(' ')[0]}`.", ""]
        rows += ["| checkpoint | source | options | date | bytes | tool's own forward | readings |", "|" + "---|" * 7]
        for name, entry in of_tool.items():
            size = sum(file["size"] for file in entry["files"].values())
            options = ", ".join(f"{key} {json.dumps(value)}" for key, value in entry["options"].items())
            rows.append(
                f"| {name} | {entry['source']} | {options} | {entry['date']} | {size:,} "
                f"| {entry.get('tool_forward', '')}: {describe_difference(entry)} | {entry.get('readings', '')} |"
            )
        rows.append("")
    rows += ["## What a tool would not write", "", "| checkpoint | options | error |", "|---|---|---|"]
    for name, entry in refused.items():
        message = " ".join(entry["error"].split()).replace("|", "\\|")
        rows.append(f"| {name} | {entry['options']} | `{message}` |")
    rows += ["", "## Files", "", "| file | sha256 | bytes |", "|---|---|---|"]
    for name, entry in stored.items():
        rows += [f"| {name}/{file} | {facts['sha256']} | {facts['size']:,} |" for file, facts in entry["files"].items()]
    text = README.read_text() if README.exists() else ""
    README.write_text(text.partition(TABLE_BEGINS)[0] + TABLE_BEGINS + "\n".join(rows) + "\n")


def describe_difference(entry: dict[str, Any]) -> str:
    """The readings under which the tool's own dequantisation equals ours to the bit."""
    difference = entry.get("tool_difference")
    if difference is None:
        return "not compared"
    if not isinstance(difference, dict):
        return "equal" if difference == 0 else f"differs by {difference:.3g}"
    equal = [reading for reading, value in difference.items() if value == 0]
    return "equal" if len(equal) == len(difference) else f"equal to {' and '.join(equal) or 'none'}"


def main() -> None:
    chosen = sys.argv[1:] or sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())
    for name in chosen:
        folder = CHECKPOINTS / name
        models = distinct_models(folder)
        tries = (expected_arrays(models, random_prompts(seed)) for seed in range(100))
        arrays = next(arrays for arrays in tries if least_gap(arrays) >= LEAST_GAP)
        np.savez_compressed(folder / "expected.npz", **arrays)
        files = {path.name: describe(path) for path in sorted(folder.iterdir())}
        note(name, files=files, readings=", ".join(models) if len(models) > 1 else None)
        size = sum(file["size"] for file in files.values())
        print(f"{name}: {size:,} bytes, least gap {least_gap(arrays):.4f}, {', '.join(models)}", flush=True)
    write_readme_table()


if __name__ == "__main__":
    main()
