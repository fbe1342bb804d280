"""The end of a comparison that a side runs: JSON lines in and out, and a clock. Knows nothing but the standard library.

A message has `prompt_ids`, `num_tokens` and perhaps `num_sequences`, which all get that prompt. The answer has the
seconds until each of them had its first token, seconds and number of the tokens from then until one of them had its
last, when all were decoded together, and the first one's ids.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Report = Callable[[int, int], None]
"""Called with each token as it is there: the index of its sequence, its id."""
Generate = Callable[[Sequence[list[int]], int, Report], None]
"""Decode so many tokens after each of the prompts, greedily and past every end, and report each."""


class Clock:
    """Notes when each sequence got which token."""

    def __init__(self, num_sequences: int) -> None:
        self._started = time.perf_counter()
        self._tokens: list[list[tuple[float, int]]] = [[] for _ in range(num_sequences)]

    def __call__(self, sequence: int, token_id: int) -> None:
        self._tokens[sequence].append((time.perf_counter() - self._started, token_id))

    def answer(self) -> dict[str, Any]:
        """Raises ValueError if no token was decoded in the company of all sequences."""
        prefill_s = max(tokens[0][0] for tokens in self._tokens)
        end_s = min(tokens[-1][0] for tokens in self._tokens)
        if end_s < prefill_s:
            raise ValueError("a sequence had its last token before all had their first: decode more tokens")
        return {
            "prefill_s": prefill_s,
            "decode_s": end_s - prefill_s,
            "num_decoded": sum(prefill_s < at <= end_s for tokens in self._tokens for at, _ in tokens),
            "token_ids": [token_id for _, token_id in self._tokens[0]],
        }


def timed(generate: Generate, message: Mapping[str, Any]) -> dict[str, Any]:
    prompts = [list(message["prompt_ids"]) for _ in range(message.get("num_sequences", 1))]
    clock = Clock(len(prompts))
    generate(prompts, message["num_tokens"], clock)
    return clock.answer()


def serve(
    start: Callable[[], tuple[Mapping[str, Any], Generate]], more: Callable[[], Mapping[str, Any]] = dict
) -> None:
    """Start the engine, tell about it and answer until the input ends; `more` is added to each answer.

    What libraries print meanwhile, in C++ too, goes to standard error.
    """
    with os.fdopen(os.dup(1), "w", buffering=1) as output:
        os.dup2(2, 1)
        about, generate = start()
        print(json.dumps(about), file=output)
        for line in sys.stdin:
            print(json.dumps({**timed(generate, json.loads(line)), **more()}), file=output)


def run_side(convert: Callable[..., None], start: Callable[[], tuple[Mapping[str, Any], Generate]]) -> None:
    """The program of a side: `convert` with the arguments that follow that word, or `serve`."""
    if sys.argv[1] == "convert":
        convert(*sys.argv[2:])
    else:
        serve(start)


def file_bytes(path: str) -> int:
    """Size of a file, or of the files in a folder."""
    files = [Path(path)] if Path(path).is_file() else Path(path).rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
