"""The comparison with other engines: its clock, its rounds, its judgement and its tables, without any engine."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.documents import with_part
from benchmarks.peers import rounds
from benchmarks.peers.answers import timed
from benchmarks.peers.engines import OURS, bandwidth_share, median_rates
from benchmarks.peers.plan import planned_parts
from benchmarks.peers.progress import Progress
from benchmarks.peers.report import BEGIN, END, measured_table, readme_table
from benchmarks.peers.results import OtherRunError, Results
from benchmarks.peers.rounds import TooLoadedError, quiet_rounds, take_turns
from benchmarks.peers.served import text_of, whole_record
from benchmarks.peers.works import BOUND, WORKS, Row, Work, demanded
from server.bench.connection import Exchange
from server.bench.wires import WIRES

ROWS = [
    Row("int8", "prompt of 512", {"pytgi": 600.0, "llama.cpp": 300.0, "OpenVINO": 400.0}, 1.2),
    Row("int8", "decode 1 sequence after 512", {"pytgi": 44.0, "llama.cpp": 40.0}, 1.5),
    Row("int8", "share of the memory's bandwidth", {"pytgi": 0.81, BOUND: 1.0}, 0.82),
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


def test_decoding_lasts_from_the_last_first_token_to_the_first_last_one(clock: Callable[[float], None]) -> None:
    def generate(prompts: Sequence[list[int]], num_tokens: int, report: Callable[[int, int], None]) -> None:
        assert (prompts, num_tokens) == ([[1, 2], [1, 2]], 3)
        for seconds, sequence in [(1, 0), (1, 0), (1, 1), (0.5, 1), (0.5, 0), (1, 1)]:
            clock(seconds)
            report(sequence, sequence + 7)

    answer = timed(generate, {"prompt_ids": [1, 2], "num_tokens": 3, "num_sequences": 2})
    assert answer == {"prefill_s": 3.0, "decode_s": 1.0, "num_decoded": 2, "token_ids": [7, 7, 7]}


def test_a_share_is_of_the_bandwidth_of_its_round() -> None:
    """A memory that is twice as quick for a while makes no share larger than one."""
    answers = [{"num_decoded": 63, "decode_s": seconds, "prefill_s": 0.5} for seconds in (0.7, 0.7, 1.4, 1.4, 1.4)]
    readings = [{"gb_per_s": 100.0}, {"gb_per_s": 100.0}, {"gb_per_s": 50.0}, {"gb_per_s": 50.0}, {"gb_per_s": 50.0}]
    assert bandwidth_share(answers, readings, 10**9) == pytest.approx(0.9)
    rates = median_rates(Work(1, 512, 64, ("prefill", "decode")), {(OURS, ""): answers, ("peer", "x"): answers[:2]})
    assert rates == {"prefill": {OURS: 1024.0, "peer": 1024.0}, "decode": {OURS: 45.0, "peer": 90.0}}


def test_sequences_that_were_never_decoded_together_are_told(clock: Callable[[float], None]) -> None:
    def generate(prompts: Sequence[list[int]], num_tokens: int, report: Callable[[int, int], None]) -> None:
        for sequence in (0, 0, 1, 1):
            clock(1)
            report(sequence, 7)

    with pytest.raises(ValueError, match="decode more tokens"):
        timed(generate, {"prompt_ids": [1, 2], "num_tokens": 2, "num_sequences": 2})


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
    assert list(quiet_rounds(functools.partial(next, played), 3, max_load=1.0)) == [0, 2, 3]


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
    assert take_turns(sides, 3, 1.0) == ({"good": ["good", "good", "good"]}, {"bad": "out of memory"})
    assert calls == "good bad good bad good".split()


def test_a_row_is_judged_by_the_best_peer() -> None:
    assert [(row.best_peer, row.ratio, row.has_passed) for row in ROWS] == [
        ("OpenVINO", 1.5, True),
        ("llama.cpp", 1.1, False),
        (BOUND, 0.81, False),
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


def answer_of(*chunks: dict[str, Any]) -> Exchange:
    """A streamed answer as the load has it."""
    lines = [f"data: {json.dumps(chunk)}" for chunk in chunks]
    body = "\n\n".join([*lines, "data: [DONE]", "", ""])
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    return Exchange(0.0, [(1.0, (head + body).encode())])


def test_an_answer_that_is_too_short_is_no_answer() -> None:
    text: dict[str, Any] = {"choices": [{"text": "a"}]}
    answer = answer_of(text, text, {"choices": [], "usage": {"completion_tokens": 2}})
    assert whole_record(answer, WIRES["completions"], 2).num_output_tokens == 2
    with pytest.raises(ValueError, match="2 tokens came, 4 were asked for"):
        whole_record(answer, WIRES["completions"], 4)
    with pytest.raises(ValueError, match="out of memory"):
        whole_record(answer_of({"error": {"message": "out of memory"}}), WIRES["completions"], 2)


def test_the_next_turn_of_a_chat_has_the_text_of_the_last() -> None:
    deltas = [{"role": "assistant", "content": ""}, {"content": "one"}, {"content": " two"}, {}]
    answer = answer_of(*({"choices": [{"delta": delta}]} for delta in deltas), {"choices": []})
    assert text_of(answer) == "one two"


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


ABOUT = {"model": "demo", "rounds": 5}


def test_an_interrupted_run_goes_on_with_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "peers" / "results.json"
    first = Results(path, ABOUT)
    first.add(ROWS[0])
    first.tell("vLLM: not installed")
    again = Results(path, ABOUT, is_continued=True)
    assert (again.rows, again.not_measured) == (ROWS[:1], ["vLLM: not installed"])
    assert again.has("int8", ["prompt of 512"])
    assert not again.has("int4", ["prompt of 512"])
    assert not again.has("int8", ["prompt of 512", "decode 1 sequence after 512"])
    again.tell("vLLM: not installed")
    assert again.not_measured == ["vLLM: not installed"]
    assert not Results(path, ABOUT).rows
    assert not Results(path, ABOUT, is_continued=True).rows, "the file still has rows of a run before"


def test_a_run_does_not_go_on_with_rows_of_another_kind(tmp_path: Path) -> None:
    Results(tmp_path / "results.json", ABOUT).add(ROWS[0])
    with pytest.raises(OtherRunError, match="'rounds': 5"):
        Results(tmp_path / "results.json", {**ABOUT, "rounds": 3}, is_continued=True)


def test_a_run_plans_what_it_has_not_got(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json", ABOUT)
    args = argparse.Namespace(rows=["16-bit", "served", "steady"], peers=["llama.cpp", "vLLM"], rounds=5)
    everything = planned_parts(args, results)
    assert [part for part in everything if part[0] == "16-bit"] == [("16-bit", work) for work in WORKS]
    assert sorted({group for group, _ in everything}) == ["16-bit", "served", "steady"]
    for label in WORKS[0].labels:
        results.add(Row("16-bit", label, {"pytgi": 1.0}, 1.0))
    assert everything.keys() - planned_parts(args, results).keys() == {("16-bit", WORKS[0])}
    args.rounds = 2
    assert sum(planned_parts(args, results).values()) < sum(everything.values())


def test_what_takes_long_has_fewer_rounds() -> None:
    assert [Work(1, 8, 8, (), is_long=is_long).num_rounds(5) for is_long in (False, True)] == [5, 3]
    assert Work(1, 8, 8, (), is_long=True).num_rounds(2) == 2


def test_what_is_left_is_told_by_how_long_the_parts_before_took(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmarks.peers.progress.time.monotonic", lambda: now[0])
    progress = Progress({("int8", "a"): 60.0, ("int8", "b"): 120.0})
    now[0] = 120.0  # twice what was planned
    progress.advance(("int8", "a"))
    now[0] = 360.0
    progress.advance(("int8", "b"))
    assert capsys.readouterr().out.splitlines() == [
        "2 parts, about 3.0 min on two quiet cores",
        "-- 1 of 2 parts in 2.0 min, about 4.0 min left",
        "-- 2 of 2 parts in 6.0 min, about 0.0 min left",
    ]
