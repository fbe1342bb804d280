"""200 clients against 16 permits: refusals come at once, and what was admitted keeps its speed."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import numpy as np

from tests.e2e.http_process import http_process, ready
from tests.e2e.scripted_engine import scripted_engine
from tests.e2e.test_abuse import Abused

NUM_CLIENTS = 200
NUM_PERMITS = 16
NUM_TOKENS = 100
STEP_S = 0.02
SECONDS = 6.0


async def send_all(url: str) -> tuple[list[float], list[float]]:
    """The seconds of every answer and of every refusal."""
    answers: list[float] = []
    refusals: list[float] = []
    body = {"inputs": "hello", "parameters": {"max_new_tokens": NUM_TOKENS}}
    end = time.monotonic() + SECONDS
    limits = httpx.Limits(max_connections=None)

    async def client(http: httpx.AsyncClient) -> None:
        while time.monotonic() < end:
            started = time.perf_counter()
            response = await http.post("/generate", json=body)
            (answers if response.status_code == 200 else refusals).append(time.perf_counter() - started)
            assert response.status_code in (200, 429)
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as http:
        await asyncio.gather(*(client(http) for _ in range(NUM_CLIENTS)))
    return answers, refusals


def test_200_clients_against_16_permits(tiny_model_dir: Path, tmp_path: Path) -> None:
    log_path = tmp_path / "log"
    with http_process(tiny_model_dir, log_path, max_concurrent_requests=NUM_PERMITS) as http:
        http.endpoint.send(ready(tiny_model_dir, max_total_tokens=1000))
        with scripted_engine(http.endpoint, list(b"hello"), STEP_S) as engine:
            abused = Abused(http, engine, log_path)
            abused.until(lambda: "Connected" in abused.log)
            answers, refusals = asyncio.run(send_all(http.url))
    slowest = np.percentile(refusals, 99)
    print(f"{len(answers)} answers in {np.median(answers):.2f} s, {len(refusals)} refusals in {slowest:.2f} s")
    assert len(refusals) > 10 * len(answers) > 0
    assert slowest < 1
    assert np.median(answers) < 2 * NUM_TOKENS * STEP_S
