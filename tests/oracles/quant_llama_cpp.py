"""GGUF files by llama.cpp's own quantizer, of llama-cpp-python 0.3.36.

    PYTHONPATH=tests:. .venv/bin/python tests/oracles/quant_llama_cpp.py PYTHON [CASE...]

PYTHON is the one of an environment with llama-cpp-python. The source is written by tests/tiny_gguf.py, in float32.
config.json and gguf_index.json beside the file are ours: what a server makes of the file's metadata. A test makes them
anew.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from oracles.dequantize import gguf_weights
from oracles.quant_source import Case, write_cases

from engine.checkpoint.gguf_folder import gguf_folder
from tests.tiny_gguf import write_gguf

QUANTIZE = """
import sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.nthread = int(sys.argv[3]), 1
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), options))
"""
VERSION = "import llama_cpp; print(llama_cpp.__version__)"
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17}
"""llama.cpp's numbers of what a whole file is made of."""
CASES = [
    Case(name=prefix + name.lower().replace("_", "-"), source=source, dtype=torch.float32, options={"ftype": name})
    for prefix, name, source in (
        ("", "Q4_0", "wide"),
        ("", "Q8_0", "wide-untied"),
        ("", "Q4_K_M", "wide-untied"),
        ("", "Q5_K_M", "wide"),
        ("qwen3moe-", "Q4_0", "experts"),
        ("qwen2moe-", "Q4_K_M", "wide-experts"),
    )
]


def quantize(case: Case, source: Path, target: Path) -> dict[str, Any]:
    target.mkdir()
    unquantized, path = source / "float32.gguf", target / "model.gguf"
    model_type = json.loads((source / "config.json").read_text())["model_type"]
    write_gguf(source, unquantized, "F32", model_type.replace("_", ""))
    ftype = FILE_TYPES[case.options["ftype"]]
    subprocess.run([sys.argv[1], "-c", QUANTIZE, str(unquantized), str(path), str(ftype)], check=True)
    write_served(gguf_folder([path], target), target)
    version = subprocess.run([sys.argv[1], "-c", VERSION], check=True, capture_output=True, text=True).stdout
    return {
        "versions": {"llama-cpp-python": version.strip(), "gguf": importlib.metadata.version("gguf")},
        "tool_forward": f"the package gguf: {len(gguf_weights(path))} tensors",
        "tool_difference": 0.0,
    }


def write_served(folder: Path, target: Path) -> None:
    """What a server makes of the metadata, with the file's name in place of its path."""
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    index = json.loads((folder / "gguf_index.json").read_text())
    (target / "gguf_index.json").write_text(json.dumps({**index, "files": ["model.gguf"]}, indent=1))


def main() -> None:
    write_cases(CASES, sys.argv[2:], "llama-cpp", ("gguf",), quantize)


if __name__ == "__main__":
    main()
