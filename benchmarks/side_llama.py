"""llama.cpp as one side of a comparison; runs in an environment of its own, without our packages.

    python side_llama.py quantize F16.gguf OUT.gguf Q8_0|Q4_0
    python side_llama.py serve MODEL.gguf NUM_THREADS

`serve` speaks JSON lines as `sides.Side` expects. Everything has llama.cpp's own defaults except the sizes.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

PROMPT_TOKENS = 512
"""Tokens that are evaluated in one go: llama.cpp's largest batch and micro-batch."""
CONTEXT_TOKENS = 1024


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Take a line of llama.cpp's log and drop it."""


class Llama:
    """A model and its context, driven below llama-cpp-python's own loop, which costs more per token."""

    def __init__(self, path: str, num_threads: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = CONTEXT_TOKENS
        params.n_batch = params.n_ubatch = PROMPT_TOKENS
        params.n_threads = params.n_threads_batch = num_threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    @property
    def weight_bytes(self) -> int:
        return int(llama_cpp.llama_model_size(self._model))

    def run(self, prompt_ids: list[int], num_tokens: int) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        started = time.perf_counter()
        token_ids = [self._next(prompt_ids)]
        prefilled = time.perf_counter()
        while len(token_ids) < num_tokens:
            token_ids.append(self._next(token_ids[-1:]))
        return {
            "prefill_s": prefilled - started,
            "decode_s": time.perf_counter() - prefilled,
            "token_ids": token_ids,
        }

    def _next(self, token_ids: list[int]) -> int:
        """The most likely token after these."""
        array = (llama_cpp.llama_token * len(token_ids))(*token_ids)
        status = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(array, len(token_ids)))
        assert status == 0, f"llama_decode says {status}"
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


def quantize(source: str, target: str, kind: str) -> None:
    """Quantize with the defaults of llama.cpp's own tool."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    assert status == 0, f"llama_model_quantize says {status}"


def serve(path: str, num_threads: int) -> None:
    llama = Llama(path, num_threads)
    about = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({"read_bytes": llama.weight_bytes, "about": about}), flush=True)
    for line in sys.stdin:
        print(json.dumps(llama.run(**json.loads(line))), flush=True)


def main() -> None:
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    if sys.argv[1] == "quantize":
        quantize(*sys.argv[2:])
    else:
        serve(sys.argv[2], int(sys.argv[3]))


if __name__ == "__main__":
    main()
