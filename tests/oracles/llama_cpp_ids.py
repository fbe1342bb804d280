"""Greedy ids of llama.cpp itself on tiny models with experts, for tests/contract/test_gguf_experts.py.

    PYTHONPATH=. .venv/bin/python tests/oracles/llama_cpp_ids.py PYTHON > tests/contract/llama_cpp_ids.json

PYTHON is the one of an environment with llama-cpp-python 0.3.36. Files, keys and values are in float32, so that
llama.cpp rounds nothing: the ids say how it reads routers, experts and the shared expert.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_gguf import write_gguf
from tests.tiny_model import write_tiny_qwen2_moe, write_tiny_qwen3_moe

SOURCES: dict[str, Callable[..., None]] = {"qwen2moe": write_tiny_qwen2_moe, "qwen3moe": write_tiny_qwen3_moe}
PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100]
NUM_TOKENS = 24
GENERATE = """
import ctypes, json, sys, llama_cpp, numpy
ids, count = json.loads(sys.argv[2]), int(sys.argv[3])
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
params = llama_cpp.llama_context_default_params()
params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
context = llama_cpp.llama_init_from_model(model, params)
size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
found, gaps = [], []
for _ in range(count):
    tokens = (llama_cpp.llama_token * len(ids))(*ids)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(ids))) == 0
    logits = numpy.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(size,))
    second, first = numpy.sort(logits)[-2:]
    ids = [int(logits.argmax())]
    found += ids
    gaps.append(float(first - second))
print(json.dumps({"ids": found, "smallest_gap": round(min(gaps), 5)}))
"""


def write_source(architecture: str, folder: Path) -> None:
    """All layers have experts, as llama.cpp demands, and the head is a matrix of its own, as its qwen2moe does."""
    SOURCES[architecture](folder, is_tied=False, decoder_sparse_step=1)


def generated(python: str, architecture: str) -> dict[str, Any]:
    """What llama.cpp says after `PROMPT`. It wants merges, which these tokenizers have none of."""
    with tempfile.TemporaryDirectory() as root:
        write_source(architecture, Path(root) / "model")
        path = Path(root) / "model.gguf"
        write_gguf(Path(root) / "model", path, "F32", architecture, tokenizer__ggml__merges=["a b"])
        command = [python, "-c", GENERATE, str(path), json.dumps(PROMPT), str(NUM_TOKENS)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    answer: dict[str, Any] = json.loads(out)
    return answer


def main() -> None:
    answers = {architecture: generated(sys.argv[1], architecture) for architecture in SOURCES}
    print(json.dumps({"prompt_ids": PROMPT, "answers": answers}, indent=1))


if __name__ == "__main__":
    main()
