"""llama.cpp as one side of a comparison; runs in an environment of its own, without our packages.

    python side_llama.py convert F16.gguf OUT.gguf Q8_0|Q4_0
    python side_llama.py serve MODEL.gguf NUM_THREADS NUM_SEQUENCES NUM_TOKENS

Everything has llama.cpp's own defaults except the sizes and flash attention, which is on.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from answers import Generate, Report, run_side

BATCH_TOKENS, MICRO_BATCH_TOKENS = 2048, 512
"""Tokens that go to one call, and tokens that are evaluated in one go: the defaults of llama.cpp's own programs."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Take a line of llama.cpp's log and drop it."""


class Llama:
    """A model and its context, driven below llama-cpp-python's own loop, which costs more per token."""

    def __init__(self, path: str, num_threads: int, num_sequences: int, num_tokens: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_tokens
        params.n_seq_max = num_sequences
        params.kv_unified = True
        params.n_batch, params.n_ubatch = BATCH_TOKENS, MICRO_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = num_threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    @property
    def weight_bytes(self) -> int:
        return int(llama_cpp.llama_model_size(self._model))

    def generate(self, prompts: Sequence[list[int]], num_tokens: int, report: Report) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        rows = [
            (token_id, place, sequence, place == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for place, token_id in enumerate(prompt)
        ]
        for count in range(num_tokens):
            next_rows = []
            for first in range(0, len(rows), BATCH_TOKENS):
                for sequence, token_id in self._decode(rows[first : first + BATCH_TOKENS]):
                    report(sequence, token_id)
                    next_rows.append((token_id, len(prompts[sequence]) + count, sequence, True))
            rows = next_rows

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """The likeliest token after each row (token, place, sequence, whether it is asked) that is asked."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token_id, place, sequence, is_asked) in enumerate(rows):
            batch.token[index], batch.pos[index] = token_id, place
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, sequence, is_asked
        status = llama_cpp.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode says {status}"
        return [(sequence, self._argmax(index)) for index, (_, _, sequence, is_asked) in enumerate(rows) if is_asked]

    def _argmax(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


def convert(source: str, target: str, kind: str) -> None:
    """Quantize with the defaults of llama.cpp's own tool."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    assert status == 0, f"llama_model_quantize says {status}"


def start() -> tuple[dict[str, Any], Generate]:
    llama = Llama(sys.argv[2], *map(int, sys.argv[3:]))
    about = llama_cpp.llama_print_system_info().decode()
    return {"read_bytes": llama.weight_bytes, "about": about}, llama.generate


def main() -> None:
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    run_side(convert, start)


if __name__ == "__main__":
    main()
