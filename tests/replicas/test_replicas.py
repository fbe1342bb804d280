"""Two whole servers behind one front: the wire, chats, clients that leave, a killed replica, new versions, scaling."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.replicas.conftest import FLAGS, Fleet

SYSTEM = "You are a patient teacher of mathematics. " * 8
NUM_TURNS = 8
NUM_CHATS = 8
VARYING_HEADERS = (
    "date connection x-request-id "
    "x-compute-time x-total-time x-validation-time x-queue-time x-inference-time x-time-per-token"
)


def read_stream(fleet: Fleet, index: int, max_new_tokens: int) -> list[dict[str, Any]]:
    body = {"inputs": f"Story number {index}:", "parameters": {"max_new_tokens": max_new_tokens, "ignore_eos": True}}
    events = []
    with httpx.stream("POST", f"{fleet.url}/generate_stream", json=body, timeout=600) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data:"):
                events.append(json.loads(line.removeprefix("data:")))
    return events


def is_whole(events: list[dict[str, Any]]) -> bool:
    return events[-1].get("generated_text") is not None


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/info", None),
        ("HEAD", "/health", None),
        ("GET", "/nowhere", None),
        ("GET", "/generate", None),
        ("GET", "/v1/models", None),
        ("POST", "/tokenize", b'{"inputs": "one two"}'),
        ("POST", "/generate", b'{"inputs": "one two", "parameters": {"max_new_tokens": 3}}'),
        ("POST", "/generate", b'{"inputs": "one two", "parameters": {"temperature": 0.0}}'),
        ("POST", "/generate", b'{"inputs": '),
        ("POST", "/generate_stream", b'{"inputs": "one two", "parameters": {"max_new_tokens": 3}}'),
        ("POST", "/v1/chat/completions", b'{"messages": []}'),
        ("POST", "/v1/completions", b'{"prompt": "one", "n": -1}'),
        ("POST", "/v1/messages", b'{"messages": 3}'),
        ("POST", "/generate", b'{"inputs": "' + b"x" * 3_000_000 + b'"}'),
        ("OPTIONS", "/generate", None),
    ],
)
def test_an_answer_has_the_bytes_of_a_replicas_own(fleet: Fleet, method: str, path: str, body: bytes | None) -> None:
    ours, *theirs = (
        answer_of(method, f"{url}{path}", body) for url in (fleet.url, *(f"http://{name}" for name in fleet.replicas()))
    )
    assert ours in theirs  # which replica it was shows in /v1/models, by the second of its start


def answer_of(method: str, url: str, body: bytes | None) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    """Status, body and headers, but for those that differ between any two answers or are about a connection."""
    headers = {"content-type": "application/json", "origin": "https://example.org"}
    answer = httpx.request(method, url, content=body, headers=headers, timeout=60)
    kept = [item for item in answer.headers.raw if item[0].decode() not in VARYING_HEADERS.split()]
    return answer.status_code, answer.content, sorted(kept)


def test_a_dashboard_shows_both_replicas(fleet: Fleet) -> None:
    assert f"A page for browsers is at {fleet.url}/" in fleet.log
    assert "<title>pytgi dashboard" in httpx.get(f"{fleet.url}/dashboard").text
    deadline = time.monotonic() + 30
    names: set[str] = set()
    with httpx.stream("GET", f"{fleet.url}/dashboard/events", timeout=30) as response:
        lines = response.iter_lines()
        while len(names) < 2:
            assert time.monotonic() < deadline
            line = next(lines)
            names = set(json.loads(line.removeprefix("data: "))["replicas"]) if line else names
    assert names == set(fleet.metrics("tgi_request_count"))


def test_eight_turns_find_their_prefix_again(fleet: Fleet) -> None:
    """A turn finds the whole prompt of the turn before, but for a last partial block, and a first turn the system's.

    The first turns of the four chats that begin together find nothing.
    """

    def chat(index: int) -> list[bool]:
        messages = [{"role": "system", "content": SYSTEM}]
        hits, known = [], 0
        for turn in range(NUM_TURNS):
            messages.append({"role": "user", "content": f"Pupil {index} asks: what is {turn} times {index}? Briefly."})
            body = {"messages": messages, "max_tokens": 16, "temperature": 0}
            answer = httpx.post(f"{fleet.url}/v1/chat/completions", json=body, timeout=300).json()
            usage = answer["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            hits.append(cached >= max(known - 16, 1))
            known = usage["prompt_tokens"]
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        return hits

    with ThreadPoolExecutor(NUM_CHATS // 2) as pool:
        hits = [hit for turns in pool.map(chat, range(NUM_CHATS)) for hit in turns]
    print(f"{sum(hits)} of {len(hits)} turns hit their prefix")
    assert sum(hits) >= 0.9 * len(hits)
    assert all(count > 0 for count in fleet.metrics("tgi_request_count").values())


def test_a_client_that_leaves_frees_its_replica(fleet: Fleet) -> None:
    body = {"inputs": "A very long story:", "parameters": {"max_new_tokens": 1500, "ignore_eos": True}}
    with httpx.stream("POST", f"{fleet.url}/generate_stream", json=body, timeout=60) as response:
        lines = response.iter_lines()  # kept: httpx closes a response whose iterator is gone
        assert next(lines)
        assert sum(fleet.metrics("tgi_batch_current_size").values()) == 1
    deadline = time.monotonic() + 10
    while sum(fleet.metrics("tgi_batch_current_size").values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_new_version_drops_no_request(fleet: Fleet) -> None:
    """Streams and requests go on while Serve replaces both replicas by ones with another flag."""
    before = set(fleet.replicas())
    with ThreadPoolExecutor(4) as pool:
        update = pool.submit(fleet.deploy, {"flags": flags_of(fleet, "--max-best-of", "3"), "replicas": "2"})
        streams = run_until(update, fleet, pool)
    update.result()
    fleet.wait_for_replicas(2)
    assert not before & set(fleet.replicas())
    assert httpx.get(f"{fleet.url}/info").json()["max_best_of"] == 3
    assert len(streams) > 4 and all(map(is_whole, streams))


def test_scaling_up_and_down_drops_no_request(fleet: Fleet) -> None:
    """1, then 2 while there are more requests than one replica is to have, then 1 again."""
    scale = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
    delays = {"upscale_delay_s": 1, "downscale_delay_s": 2, "metrics_interval_s": 1, "look_back_period_s": 2}
    flags = flags_of(fleet, "--max-best-of", "3")
    fleet.deploy({"flags": flags, "replicas": "1:2", "options": {"autoscaling_config": scale | delays}})
    fleet.wait_for_replicas(1)
    with ThreadPoolExecutor(9) as pool:
        grown = pool.submit(fleet.wait_for_replicas, 2)
        streams = run_until(grown, fleet, pool, width=8)
        grown.result()
        shrunk = pool.submit(fleet.wait_for_replicas, 1)
        streams += run_until(shrunk, fleet, pool, width=1)
        shrunk.result()
    assert len(streams) > 8 and all(map(is_whole, streams))
    fleet.deploy({"flags": flags, "replicas": "2"})
    fleet.wait_for_replicas(2)


def test_a_killed_replica_takes_only_its_own_streams_along(fleet: Fleet) -> None:
    victim = min(fleet.replicas())
    before = fleet.metrics("tgi_request_count")
    with ThreadPoolExecutor(64) as pool:
        streams = [pool.submit(read_stream, fleet, index, 150) for index in range(64)]
        while sum(fleet.metrics("tgi_batch_current_size").values()) < 64:
            assert not any(map(Future.done, streams))
            time.sleep(0.1)
        counts = {name: count - before[name] for name, count in fleet.metrics("tgi_request_count").items()}
        fleet.replicas()[victim].kill()
        answers = [stream.result() for stream in streams]
    failed = [events for events in answers if not is_whole(events)]
    print(f"{len(failed)} of 64 streams failed; the replicas had {sorted(counts.values())}")
    assert 0 < len(failed) and len(failed) in counts.values() and sum(counts.values()) == 64
    gone = "Request failed during generation: Server error: the replica that ran this request is gone"
    assert all(events[-1] == {"error": gone, "error_type": "generation"} for events in failed)
    assert is_whole(read_stream(fleet, 0, 3))  # by the other one, at once
    fleet.wait_for_replicas(2)


def test_bursts_are_spread_over_the_replicas(fleet: Fleet) -> None:
    """Short prompts, so that only the load decides. A replica has just been replaced: its counts must not matter."""
    for _ in range(4):
        before = fleet.metrics("tgi_request_count")
        with ThreadPoolExecutor(16) as pool:
            streams = list(pool.map(lambda index: read_stream(fleet, index, 20), range(16)))
        counts = [count - before[name] for name, count in fleet.metrics("tgi_request_count").items()]
        assert all(map(is_whole, streams)) and sum(counts) == 16
        assert min(counts) >= 4, counts


def test_a_replica_that_hangs_takes_nobody_elses_metrics_along(fleet: Fleet) -> None:
    launcher = next(child for child in min(fleet.replicas().items())[1].children() if "--hostname" in child.cmdline())
    [http] = [process for process in launcher.children() if process.cmdline()[-1] == "server"]
    http.suspend()
    try:
        assert len(fleet.metrics("tgi_request_count")) == 1
    finally:
        http.resume()
    fleet.wait_for_replicas(2)


def flags_of(fleet: Fleet, *more: str) -> list[str]:
    return ["--model-id", str(fleet.model), *FLAGS, *more]


def run_until(end: Future[None], fleet: Fleet, pool: ThreadPoolExecutor, width: int = 2) -> list[list[dict[str, Any]]]:
    """The events of streams of which `width` run at any time until `end`."""
    streams: list[list[dict[str, Any]]] = []
    while not end.done():
        streams += pool.map(lambda index: read_stream(fleet, index, 40), range(width))
    return streams
