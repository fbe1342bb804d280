"""Speculation over HTTP: the same answers, an event for each token, stop strings, shards, and what /metrics counts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.launched import LaunchedServer, launched
from tests.tiny_model import write_tiny_qwen2

PROMPTS = ["abcabcabcab", "one two one two one", "xyzzy xyzzy xyzz", "no repetition here"]
FLAGS = ("--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speculation") / "model"
    write_tiny_qwen2(folder)
    return folder


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    with launched(model, tmp_path_factory.mktemp("logs"), *FLAGS) as server:
        yield server


@pytest.fixture(scope="module", params=["1", "2"], ids=["1 shard", "2 shards"])
def speculating(
    model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[LaunchedServer]:
    flags = (*FLAGS, "--speculate", "4", "--num-shard", request.param)
    with launched(model, tmp_path_factory.mktemp("logs"), *flags) as server:
        assert "Using speculation n-gram with 4 input ids" in server.log
        yield server


PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seed": {"do_sample": True, "seed": 5, "temperature": 0.8, "top_k": 10, "top_p": 0.9},
}


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_answers_are_those_without(
    plain: LaunchedServer, speculating: LaunchedServer, parameters: dict[str, Any]
) -> None:
    def tokens(server: LaunchedServer, prompt: str) -> list[int]:
        answer = server.generate(prompt, max_new_tokens=60, **parameters)
        return [token["id"] for token in answer["details"]["tokens"]]

    expected = [tokens(plain, prompt) for prompt in PROMPTS]
    assert [tokens(speculating, prompt) for prompt in PROMPTS] == expected
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: tokens(speculating, prompt), PROMPTS)) == expected
    metrics = speculating.metrics()
    assert 0 < metrics["pytgi_draft_steps"] <= metrics["pytgi_draft_tokens"]
    assert 0 < metrics["pytgi_draft_tokens_accepted"] < metrics["pytgi_draft_tokens"]


def test_a_stream_has_an_event_for_each_token(plain: LaunchedServer, speculating: LaunchedServer) -> None:
    expected = list(plain.stream(PROMPTS[0], max_new_tokens=40))
    events = list(speculating.stream(PROMPTS[0], max_new_tokens=40))
    assert [event["index"] for event in events] == list(range(1, len(expected) + 1))
    assert [event["token"]["id"] for event in events] == [event["token"]["id"] for event in expected]
    assert events[-1]["generated_text"] == expected[-1]["generated_text"]


def test_a_stop_string_within_a_draft_is_the_end(plain: LaunchedServer, speculating: LaunchedServer) -> None:
    text = plain.generate(PROMPTS[0], max_new_tokens=40)["generated_text"]
    for start in (5, 11, 18):
        stop = text[start : start + 2]
        expected, answer = (
            server.generate(PROMPTS[0], max_new_tokens=40, stop=[stop]) for server in (plain, speculating)
        )
        assert expected["details"]["finish_reason"] == answer["details"]["finish_reason"] == "stop_sequence"
        assert answer["generated_text"] == expected["generated_text"]
        assert answer["details"]["generated_tokens"] == expected["details"]["generated_tokens"]
