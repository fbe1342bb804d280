"""The comparison with other engines: its clock, its rounds, its judgement and its tables, without any engine."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest

from benchmarks.documents import with_part
from benchmarks.peers import rounds
from benchmarks.peers.answers import timed
from benchmarks.peers.load import closed_loop, percentile
from benchmarks.peers.report import BEGIN, END, measured_table, readme_table
from benchmarks.peers.rounds import TooLoadedError, quiet_rounds, take_turns
from benchmarks.peers.works import FLOOR, WORKS, Row, demanded

ROWS = [
    Row("int8", "prompt of 512", {"pytgi": 600.0, "llama.cpp": 300.0, "OpenVINO": 400.0}, 1.2),
    Row("int8", "decode 1 sequence after 512", {"pytgi": 44.0, "llama.cpp": 40.0}, 1.5),
    Row("int8", "share of the memory's bandwidth", {"pytgi": 0.81, FLOOR: 1.0}, 0.82),
    Row("int4", "decode 8 sequences after 128", {"pytgi": 100.0}, 1.5),
]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let seconds pass."""
    now = [100.0]
    monkeypatch.setattr("benchmarks.peers.answers.time.perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_decoding_begins_when_every_sequence_has_its_first_token(clock: Callable[[float], None]) -> None:
    def generate(prompts: Sequence[list[int]], num_tokens: int, report: Callable[[int, int], None]) -> None:
        assert (prompts, num_tokens) == ([[1, 2], [1, 2]], 3)
        for seconds, sequence in [(1, 0), (1, 0), (1, 1), (0.5, 1), (0.5, 0), (1, 1)]:
            clock(seconds)
            report(sequence, sequence + 7)

    answer = timed(generate, {"prompt_ids": [1, 2], "num_tokens": 3, "num_sequences": 2})
    assert answer == {"prefill_s": 3.0, "decode_s": 2.0, "num_decoded": 3, "token_ids": [7, 7, 7]}


class Loads:
    """Stands for `OtherLoad`: what others use, round by round."""

    def __init__(self, *loads: float) -> None:
        self._loads = list(loads)

    def value(self) -> float:
        return self._loads.pop(0)


def test_a_round_beside_others_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = Loads(0.1, 1.4, 0.9, 0.0)
    monkeypatch.setattr(rounds, "OtherLoad", lambda: loads)
    played = iter(range(10))
    assert list(quiet_rounds(functools.partial(next, played), 3, max_load=1.0)) == [1, 3, 4]


def test_a_machine_that_is_never_quiet_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "OtherLoad", lambda: Loads(1.5))
    with pytest.raises(TooLoadedError, match=r"others use 1.5 processors: 4 rounds"):
        list(quiet_rounds(lambda: None, 1, max_load=1.0))


def test_a_side_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "OtherLoad", lambda: Loads(0.0))
    calls: list[str] = []

    def turn(name: str) -> str:
        calls.append(name)
        if name == "bad" and calls.count("bad") == 2:
            raise RuntimeError("out of memory")
        return name

    sides: dict[str, Callable[[], Any]] = {name: functools.partial(turn, name) for name in ("good", "bad")}
    assert take_turns(sides, 2, 1.0) == ({"good": ["good", "good"]}, {"bad": "out of memory"})
    assert calls == "good bad good bad good".split()


def test_a_row_is_judged_by_the_best_peer() -> None:
    assert [(row.best_peer, row.ratio, row.has_passed) for row in ROWS] == [
        ("OpenVINO", 1.5, True),
        ("llama.cpp", 1.1, False),
        (FLOOR, 0.81, False),
        (None, None, True),
    ]


def test_what_is_demanded_depends_on_the_work_and_the_machine() -> None:
    assert [demanded("16-bit", work, kind, True) for work in WORKS for kind in work.kinds] == [1.2] * 4 + [1.5] * 2
    assert [demanded("int8", work, "decode", True) for work in WORKS] == [1.5] * 4
    assert [demanded("int4", work, "decode", False) for work in WORKS] == [1.2, 1.2, 1.0, 1.0]


def test_a_time_is_better_when_it_is_less() -> None:
    row = Row("16-bit", "first token", {"pytgi": 0.6, "vLLM": 1.0, "llama.cpp": 3.0}, 0.5, is_time=True)
    assert (row.best_peer, row.ratio, row.has_passed) == ("vLLM", 0.6, False)
    assert dataclasses.replace(row, demanded=0.6).has_passed


def served(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> list[dict[str, Any]]:
    """The bodies that a server got, which answers each with so many tokens in as many chunks and the usage last."""
    bodies = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        chunks: list[dict[str, Any]] = [{"choices": [{"text": "a"}]}] * num_tokens
        chunks.append({"choices": [], "usage": {"completion_tokens": num_tokens}})
        lines = [f"data: {json.dumps(chunk)}" for chunk in chunks]
        return httpx.Response(200, text="\n\n".join([*lines, "data: [DONE]", ""]))

    client = functools.partial(httpx.AsyncClient, transport=httpx.MockTransport(answer))
    monkeypatch.setattr("benchmarks.peers.load.httpx.AsyncClient", client)
    return bodies


def test_each_prompt_is_asked_once_by_some_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = served(monkeypatch, 3)
    load = closed_loop("http://server", ["one", "two", "three"], 2, 3)
    assert sorted(body["prompt"] for body in bodies) == ["one", "three", "two"]
    assert {(body["max_tokens"], body["ignore_eos"], body["stream"]) for body in bodies} == {(3, True, True)}
    assert (load.num_tokens, len(load.first_s), len(load.gaps_s)) == (9, 3, 6)


def test_an_answer_that_is_too_short_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    served(monkeypatch, 3)
    with pytest.raises(ValueError, match="3 tokens came, 4 were asked for"):
        closed_loop("http://server", ["one"], 1, 4)


def test_percentiles_are_values_that_were_there() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], percent) for percent in (50, 75, 99)] == [2.0, 3.0, 4.0]


def test_the_tables_are_written_between_their_marks_again_and_again() -> None:
    document = f"# Speed\n\n{BEGIN}\n{END}\n\nMore.\n"
    table = "\n".join(measured_table(ROWS))
    once = with_part(document, BEGIN, END, table)
    assert "| int8 | prompt of 512 | 600 | 300 | 400 |  | 1.5 | 1.2 |" in once.splitlines()
    assert with_part(once, BEGIN, END, table) == once
    assert once.endswith(f"{END}\n\nMore.\n")


@pytest.mark.parametrize("document", ["More.", f"{BEGIN}\nMore.", f"{END}\n{BEGIN}\nMore."])
def test_a_document_without_its_marks_is_left_alone(document: str) -> None:
    """What is after a mark that is not there would be lost."""
    with pytest.raises(ValueError, match="the document has no"):
        with_part(document, BEGIN, END, "table")


def test_the_readme_has_one_sequence_against_the_best() -> None:
    assert readme_table(ROWS)[2:] == [
        "| int8, prompt of 512 | 600 | OpenVINO: 400 | 1.5 |",
        "| int8, decode 1 sequence after 512 | 44 | llama.cpp: 40 | 1.1 |",
    ]
