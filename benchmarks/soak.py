"""Drops half of many streams mid-way, round after round, and looks at what is left: KV blocks and memory.

    .venv/bin/python benchmarks/soak.py [--url http://127.0.0.1:8080 --pid LAUNCHER_PID] [--rounds 3] [--requests 200]

Without --url a server with the demo model is started for it. Fails (exit 1) when blocks are held 2 s after a round,
or when the processes' resident memory grew by more than 5 % from the first round to the last. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

MAX_GROWTH = 1.05
GRACE_S = 2.0


def run_stream(url: str, index: int, round_index: int, num_tokens: int) -> None:
    """One request; every second client leaves after a third of its tokens."""
    body = {
        "inputs": f"Round {round_index}, question {index}: tell me about the number {index * 7919}.\n",
        "parameters": {"max_new_tokens": num_tokens, "stop": [], "do_sample": True, "seed": index},
    }
    with httpx.stream("POST", f"{url}/generate_stream", json=body, timeout=600) as response:
        events = 0
        for line in response.iter_lines():
            events += line.startswith("data:")
            if index % 2 and events >= num_tokens // 3:
                return


def metric(url: str, name: str) -> float:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.split()[1])
    raise KeyError(name)


def resident_bytes(launcher_pid: int) -> dict[str, int]:
    children = psutil.Process(launcher_pid).children(recursive=True)
    return {child.cmdline()[-1]: child.memory_info().rss for child in children}


@contextlib.contextmanager
def served_demo_model() -> Iterator[tuple[str, int]]:
    from benchmarks.offline import demo_model
    from tests.e2e.launched import launched

    with tempfile.TemporaryDirectory() as logs, launched(demo_model(), Path(logs)) as server:
        yield server.url, server.process.pid


def soak(url: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    rounds: list[dict[str, Any]] = []
    for round_index in range(args.rounds):
        started = time.perf_counter()
        with ThreadPoolExecutor(args.clients) as pool:
            list(pool.map(lambda i, r=round_index: run_stream(url, i, r, args.tokens), range(args.requests)))
        seconds = time.perf_counter() - started
        time.sleep(GRACE_S)
        blocks = metric(url, "pytgi_kv_blocks_used")
        rounds.append({"seconds": round(seconds, 1), "blocks_used": blocks, "resident": resident_bytes(pid)})
        print(f"round {round_index + 1}: {rounds[-1]}", flush=True)
    growth = {name: rounds[-1]["resident"][name] / rounds[0]["resident"][name] for name in rounds[0]["resident"]}
    is_good = all(r["blocks_used"] == 0 for r in rounds) and max(growth.values()) <= MAX_GROWTH
    return {"rounds": rounds, "growth": {name: round(value, 3) for name, value in growth.items()}, "passed": is_good}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server (default: start one)")
    parser.add_argument("--pid", type=int, help="the running server's launcher")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=50, help="requests at a time")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per request")
    args = parser.parse_args()
    if (args.url is None) != (args.pid is None):
        parser.error("give --url and --pid together")
    running = served_demo_model() if args.url is None else contextlib.nullcontext((args.url, args.pid))
    with running as (url, pid):
        result = soak(url, pid, args)
    print(json.dumps(result))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
