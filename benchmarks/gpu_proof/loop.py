"""The engine's loop with requests of equal length: time to the first token, between tokens, and what the host adds."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.gpu_proof.models import greedy_request, make_core
from benchmarks.gpu_proof.report import Report
from engine.core import EngineCore
from engine.device import Device
from engine.link.messages import GenerationRequest
from engine.runner import ModelRunner

COUNTS, TOY_COUNTS = (1, 32), (2,)
PROMPT_TOKENS, NEW_TOKENS = 512, 64
TOY_PROMPT_TOKENS, TOY_NEW_TOKENS = 8, 2


def time_loop(
    report: Report,
    name: str,
    runner: ModelRunner,
    device: Device,
    config: dict[str, Any],
    num_blocks: int,
    step_seconds: dict[int, float],
    *,
    is_toy: bool,
) -> None:
    """Rows of one table. `step_seconds` has by sequences the seconds of a step that nothing waits beside."""
    prompt, new = (TOY_PROMPT_TOKENS, TOY_NEW_TOKENS) if is_toy else (PROMPT_TOKENS, NEW_TOKENS)
    for count in TOY_COUNTS if is_toy else COUNTS:
        for is_overlapped in (False, True):
            core = make_core(
                runner,
                device,
                config["vocab_size"],
                num_blocks=num_blocks,
                max_batch_tokens=4096,
                is_overlapped=is_overlapped,
            )
            # Prompts begin differently, or all but the first would be found in the prefix cache.
            requests = [
                greedy_request(f"{index}", [(7 * place + index) % 97 for place in range(prompt)], new)
                for index in range(count)
            ]
            first, gaps = run_loop(core, requests)
            p50, p99 = np.percentile(gaps, [50, 99])
            columns = {"first token ms": first.mean(), "between tokens p50 ms": p50, "p99 ms": p99}
            if count in step_seconds:
                columns["p50 less a step alone, ms"] = p50 - step_seconds[count] * 1000
            rounded = {column: round(float(value), 3) for column, value in columns.items()}
            steps = "overlapping" if is_overlapped else "one by one"
            report.row("The engine's loop", model=name, requests=count, steps=steps, **rounded)


def run_loop(core: EngineCore, requests: list[GenerationRequest]) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds until the first token [requests], and between later ones [tokens]."""
    started = time.perf_counter()
    arrivals: dict[str, list[float]] = {request.request_id: [] for request in requests}
    for request in requests:
        core.take(request)
    while core.has_work:
        for event in core.step():
            if event.error is not None:
                raise RuntimeError(event.error)
            arrivals[event.request_id].append(time.perf_counter())
    first = np.array([times[0] - started for times in arrivals.values()])
    gaps = np.concatenate([np.diff(times) for times in arrivals.values()])
    return first * 1000, gaps * 1000
