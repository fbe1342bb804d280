"""200 clients against 16 permits: refusals come at once, and what was admitted keeps its speed."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.e2e.canary import STEP_S, AttackTable, scripted_target
from tests.e2e.launched import launched

NUM_TOKENS = 50


def test_200_clients_against_16_permits(small_demo_model: Path, tmp_path: Path) -> None:
    with scripted_target(small_demo_model, tmp_path, max_concurrent_requests=16) as target:
        with AttackTable(target, seconds=5) as table:
            outcome = table.outcome("overload")
    print(outcome.line())
    assert not outcome.complaints
    assert outcome.counts["429"] > outcome.counts["200"] > 15
    assert outcome.counts["refusal_ms"] < 1_000
    assert outcome.counts["answer_ms"] < 2.5 * 1_000 * NUM_TOKENS * STEP_S


def test_16_of_32_streams_are_let_in_and_16_get_429_within_a_second(demo_model: Path, tmp_path: Path) -> None:
    client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=32))

    def request(url: str) -> tuple[int, float, str]:
        started = time.monotonic()
        body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 24, "details": True}}
        with client.stream("POST", f"{url}/generate_stream", json=body) as response:
            answered = time.monotonic() - started
            lines = [line for line in response.iter_lines() if line]
        return response.status_code, answered, lines[-1]

    with (
        launched(demo_model, tmp_path, "--max-concurrent-requests", "16") as server,
        client,
        ThreadPoolExecutor(32) as pool,
    ):
        answers = list(pool.map(request, [server.url] * 32))
    finished = [line for status, _, line in answers if status == 200]
    refused = [(seconds, line) for status, seconds, line in answers if status == 429]
    assert (len(finished), len(refused)) == (16, 16)
    assert all('"finish_reason":"length"' in line for line in finished)
    for seconds, line in refused:
        assert json.loads(line) == {"error": "Model is overloaded", "error_type": "overloaded"}
        assert seconds < 1
