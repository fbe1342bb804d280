"""The long proofs, each a benchmark that judges itself; run by `make test-slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run_benchmark(name: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / name), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.timeout(3600)
def test_decoding_is_faster_than_transformers() -> None:
    assert run_benchmark("offline.py", "--compare", "transformers")["speedup"] >= 1.5


@pytest.mark.timeout(600)
def test_the_http_process_carries_5000_tokens_a_second_on_a_core() -> None:
    result = run_benchmark("http_overhead.py")
    for route in ("/generate_stream", "/v1/chat/completions"):
        assert result[route]["sustained"]["events_per_cpu_s"] >= 5000
        assert result[route]["half"]["delay_p99_ms"] < 20
