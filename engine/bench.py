"""`python -m engine.bench`: times of an engine alone, for `text-generation-benchmark`.

One line of JSON on standard input says what to run. Each line of standard output is one run: the batch size, the
seconds of the prefill and of each step that decodes. Started with the variables of `engine_environment`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

from engine.checkpoint.hub import download_model
from engine.core import EngineCore
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.logs import configure_logging
from engine.link.messages import GenerationRequest, SamplingParams
from engine.start import start_engine


def main() -> None:
    task = json.loads(sys.stdin.readline())
    configure_logging(os.environ.get("LOG_LEVEL", "warn"), "engine", is_json=False)
    try:
        folder = download_model(task["model"], task["revision"])
        num_tokens = max(task["batch_sizes"]) * (task["sequence_length"] + task["decode_length"])
        config = EngineConfig(
            model_path=str(folder), num_threads=task["num_threads"], is_prefix_caching=False, is_grammar_disabled=True
        )
        core, ready = start_engine(config)
        if num_tokens > ready.max_batch_total_tokens:
            raise StartError(f"{num_tokens} tokens at a time do not fit: {ready.max_batch_total_tokens} are the limit")
        if task["sequence_length"] + task["decode_length"] > ready.max_total_tokens:
            raise StartError(f"a sequence has at most {ready.max_total_tokens} tokens")
    except StartError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    rng = random.Random(task["seed"])
    for batch_size in task["batch_sizes"]:
        for number in range(task["warmups"] + task["runs"]):
            prefill_s, decode_s = run(core, task, batch_size, rng, ready.vocab_size)
            line = {"batch_size": batch_size, "prefill_s": prefill_s, "decode_s": decode_s}
            print(json.dumps({**line, "is_warm_up": number < task["warmups"]}), flush=True)


def run(
    core: EngineCore, task: dict[str, Any], batch_size: int, rng: random.Random, vocab_size: int
) -> tuple[float, list[float]]:
    """Seconds until every sequence has its first token, and of each step after that in which all decode."""
    for index in range(batch_size):
        # Special tokens are at the vocabulary's end in every model of the family.
        prompt = [rng.randrange(vocab_size // 2) for _ in range(task["sequence_length"])]
        request = GenerationRequest(
            request_id=str(index),
            prompt_token_ids=prompt,
            max_new_tokens=task["decode_length"],
            sampling=SamplingParams(**task["sampling"]),
            is_ignoring_eos=True,
        )
        core.take(request)
    counts = dict.fromkeys(map(str, range(batch_size)), 0)
    started = time.perf_counter()
    prefill_s, decode_s = 0.0, []
    while core.has_work:
        before = time.perf_counter()
        are_all_decoding = all(0 < count < task["decode_length"] for count in counts.values())
        for event in core.step():
            if event.error is not None:
                raise RuntimeError(event.error)
            counts[event.request_id] += len(event.token_ids)
        now = time.perf_counter()
        if are_all_decoding:
            decode_s.append(now - before)
        elif not prefill_s and all(counts.values()):
            prefill_s = now - started
    return prefill_s, decode_s


if __name__ == "__main__":
    main()
