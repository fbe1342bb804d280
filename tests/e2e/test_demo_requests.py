"""The requests of Qwen's own TGI page, and what a user sees besides, on the real demo model with its defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.e2e.launched import LaunchedServer, launched

MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Tell me something about large language models."},
]


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    with launched(demo_model, tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: LaunchedServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1/", api_key="-") as client:
        yield client


def test_generate_stream(server: LaunchedServer) -> None:
    *tokens, last = server.stream("Tell me something about large language models.", max_new_tokens=32)
    assert [event["index"] for event in [*tokens, last]] == list(range(1, 33))
    assert last["generated_text"] == "".join(event["token"]["text"] for event in [*tokens, last])


def test_the_dashboard_tells_what_a_stream_does(server: LaunchedServer) -> None:
    with httpx.stream("GET", f"{server.url}/dashboard/events", timeout=60) as dashboard:
        events = server.stream("Tell me something about large language models.", max_new_tokens=200, ignore_eos=True)
        next(events)
        lines = (line for line in dashboard.iter_lines() if line)
        figures = json.loads(next(lines).removeprefix("data: "))["replicas"]["server"]
    assert figures["requests_running"] == 1
    assert figures["tokens_per_s"] > 1
    assert 0 < figures["inter_token_s"]["p50"] <= figures["inter_token_s"]["p99"] < 1
    assert 0 < figures["kv_tokens_used"] < figures["kv_tokens_total"]
    true = server.child("engine").memory_info().rss
    assert figures["engine_memory_bytes"] == pytest.approx(true, rel=0.1)


def test_chat_by_curl(server: LaunchedServer) -> None:
    body = {"model": "", "messages": MESSAGES, "max_tokens": 32}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] <= 32


def test_openai_sdk_streams_token_by_token(client: OpenAI) -> None:
    stream = client.chat.completions.create(model="", messages=MESSAGES, stream=True, max_tokens=32)  # type: ignore[call-overload]
    chunks = [chunk.choices[0].delta.content for chunk in stream]
    assert len(chunks) > 8


def test_stream_and_plain_and_batch_agree(server: LaunchedServer) -> None:
    prompts = ["def fibonacci(n):", "从前有座山,", "🙂 emoji are", "The capital of France is"]
    plain = [server.generate(prompt, max_new_tokens=12)["generated_text"] for prompt in prompts]
    streamed = [list(server.stream(prompt, max_new_tokens=12))[-1]["generated_text"] for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda p: server.generate(p, max_new_tokens=12)["generated_text"], prompts))
    assert plain == streamed == together


def test_a_seeded_sample_does_not_depend_on_its_company(server: LaunchedServer) -> None:
    def sample(index: int) -> str:
        seed = 7 if index == 0 else index * 1000
        answer = server.generate("Once upon a time", do_sample=True, temperature=0.9, seed=seed, max_new_tokens=24)
        text: str = answer["generated_text"]
        return text

    alone = sample(0)
    with ThreadPoolExecutor(8) as pool:
        assert next(pool.map(sample, range(8))) == alone


def test_a_stop_string_ends_the_text_with_itself(server: LaunchedServer) -> None:
    answer = server.generate("1, 2, 3, 4,", max_new_tokens=64, stop=["8,"])
    assert answer["generated_text"].endswith("8,")
    assert answer["details"]["finish_reason"] == "stop_sequence"


def test_characters_are_never_split(server: LaunchedServer) -> None:
    events = list(server.stream("Write ten emoji flags and faces: 🇫🇷 👩‍👩‍👧‍👦", max_new_tokens=48))
    assert "\ufffd" not in json.dumps(events, ensure_ascii=False)
