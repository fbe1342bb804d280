"""The soak's judgement: a good run passes, and each planted fault is found by the check that it concerns."""

from __future__ import annotations

import collections
import dataclasses
import random
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

from benchmarks.soak.bodies import essence
from benchmarks.soak.clients import KINDS, OTHER_ANSWER, Repeats
from benchmarks.soak.judging import Soak, growth_of, judge, resident
from benchmarks.soak.load import Tally, choose_kind
from benchmarks.soak.report import percentile, write_report
from benchmarks.soak.samples import METRICS, ProcessSample, Sample, parse_metrics
from benchmarks.soak.wire import Answer
from server.bench.charts import MAX_POINTS, line_chart, nice_step, thinned

HOURS = 8 * 3600.0
SIZES = {"server.launcher": 24e6, "server": 98e6, "engine": 1500e6}
CHANCE = random.Random(0)


def sample(seconds: float, *, running: float = 0, leak: float = 0, module: str = "server", **changes: int) -> Sample:
    """The server at a moment, with some noise; `leak` bytes a second and `changes` are of the process `module`."""
    processes = {
        name: ProcessSample(int(size + CHANCE.uniform(-3e6, 3e6)), int(size / 2), 20, 8) for name, size in SIZES.items()
    }
    sizes = processes[module]
    grown = ProcessSample(sizes.resident + int(leak * seconds), sizes.anonymous + int(leak * seconds), 20, 8)
    processes[module] = dataclasses.replace(grown, **changes)
    return Sample(seconds, processes, dict.fromkeys(METRICS, running), 6, 1.0)


def soak(**changes: object) -> Soak:
    """A run in which nothing is wrong, but for `changes`."""
    outcomes = {kind.name: collections.Counter({kind.good: 100}) for kind in KINDS}
    good = Soak(
        seconds=HOURS,
        base=sample(0),
        samples=[sample(second, running=5) for second in range(0, int(HOURS), 60)],
        final=sample(HOURS),
        tally=Tally(collections.defaultdict(collections.Counter, outcomes), [(float(i), 1.0) for i in range(9)], 8),
        log="INFO webserver: Success\nERROR webserver: grammar is not valid\n",
        exit_code=0,
        num_survivors=0,
    )
    return dataclasses.replace(good, **changes)  # type: ignore[arg-type]


def tally_with(kind: str, outcome: str) -> Tally:
    tally = soak().tally
    tally.outcomes[kind][outcome] += 1
    return tally


def failed_checks(run: Soak) -> list[str]:
    return [check.name for check in judge(run) if not check.is_ok]


def test_a_run_in_which_nothing_is_wrong_passes() -> None:
    assert failed_checks(soak()) == []


def leaking(module: str, leak: float) -> list[Sample]:
    return [sample(second, running=5, module=module, leak=leak) for second in range(0, int(HOURS), 60)]


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ({"samples": leaking("server", 30e6 / HOURS)}, "memory of server"),
        ({"samples": leaking("engine", 70e6 / HOURS)}, "memory of engine"),
        ({"tally": tally_with("repeated requests", OTHER_ANSWER)}, "ids, texts and logprobs"),
        ({"tally": tally_with("chats", "500")}, "answers"),
        ({"tally": tally_with("refusals", "500 for {} at /generate")}, "answers"),
        ({"tally": tally_with("slow readers", "the connection was lost")}, "answers"),
        ({"tally": tally_with("streams dropped", "503")}, "answers"),
        ({"tally": Tally()}, "coverage"),
        ({"samples": [sample(0)] * 3}, "coverage"),
        ({"final": sample(HOURS, descriptors=21)}, "processes, descriptors and tasks"),
        ({"final": sample(HOURS, count=2)}, "processes, descriptors and tasks"),
        ({"final": dataclasses.replace(sample(HOURS), num_tasks=7)}, "processes, descriptors and tasks"),
        ({"final": sample(HOURS, threads=13)}, "threads"),
        ({"final": sample(HOURS, running=1)}, "KV blocks and queues"),
        ({"final": dataclasses.replace(sample(HOURS), processes={})}, "nothing is gone"),
        ({"log": "Traceback (most recent call last):\n"}, "log"),
        ({"log": "thread '<unnamed>' panicked at src/lib.rs\n"}, "log"),
        ({"exit_code": 1}, "end"),
        ({"num_survivors": 1}, "end"),
    ],
)
def test_a_planted_fault_is_found(fault: dict[str, object], check: str) -> None:
    assert check in failed_checks(soak(**fault))


def test_what_grows_at_first_and_then_stays_is_no_leak() -> None:
    samples = [sample(s, running=5, leak=-50e6 / s if s < HOURS / 10 else 0) for s in range(60, int(HOURS), 60)]
    assert failed_checks(soak(samples=samples)) == []


def test_a_leak_is_measured_in_bytes_per_hour() -> None:
    growth = growth_of(soak(samples=leaking("engine", 1e8 / 3600)), "engine", resident)
    assert growth.bytes_per_hour == pytest.approx(1e8, rel=0.02)


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        (b'{"generated_text":"a","details":{"tokens":[{"id":5}]}}', None, "200"),
        (b'{"details":{"tokens":[{"id":5}]}}', b'{"details":{"tokens":[{"id":6}]}}', OTHER_ANSWER),
        (b'{"details":{"tokens":[{"logprob":-1.5}]}}', b'{"details":{"tokens":[{"logprob":-1.6}]}}', OTHER_ANSWER),
        (b'{"object":"o","id":"1","created":1,"x":1}', b'{"object":"o","id":"2","created":9,"x":1}', "200"),
        (
            b'{"object":"o","id":"1","usage":{"a":1},"x":1}',
            b'{"object":"o","id":"2","usage":{"a":2},"x":2}',
            OTHER_ANSWER,
        ),
        (b'data:{"token":{"id":1}}\n\ndata:{"token":{"id":2}}\n\n', b'data:{"token":{"id":1}}\n\n', OTHER_ANSWER),
    ],
)
def test_repeated_answers_are_compared_token_by_token(first: bytes, second: bytes | None, outcome: str) -> None:
    repeats = Repeats([("/generate", {})])
    assert repeats.outcome(0, Answer(200, first)) == "200"
    assert repeats.outcome(0, Answer(200, second or first)) == outcome
    assert repeats.outcome(0, Answer(500, b"")) == "500"


def test_the_last_event_of_a_stream_is_no_json() -> None:
    assert essence(Answer(200, b'data: {"a":1}\n\ndata: [DONE]\n\n')) == [{"a": 1}]


def test_kinds_come_as_often_as_they_weigh() -> None:
    chance = random.Random(1)
    counts = collections.Counter(choose_kind(KINDS, chance).name for _ in range(5000))
    total = sum(kind.weight for kind in KINDS)
    assert all(abs(counts[kind.name] / 5000 - kind.weight / total) < 0.03 for kind in KINDS)


def test_the_report_names_what_failed_and_has_its_plots(tmp_path: Path) -> None:
    run = soak(exit_code=3)
    write_report(run, judge(run), "make soak", tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "**FAILED**" in page and "| FAILED | end | exit code 3 after SIGTERM |" in page
    assert "| ok | answers | 1400 requests, 0 wrong |" in page
    for name in re.findall(r"\]\((.+\.svg)\)", page):
        assert xml.etree.ElementTree.parse(tmp_path / name).getroot().tag.endswith("svg")


def test_a_chart_has_a_line_for_each_series_and_escapes_names() -> None:
    chart = line_chart("a < b", {"one": [(0, 0), (10, 10)], "two": [], "zero": [(0, 0)]})
    assert chart.count("<polyline") == 3
    assert "a &lt; b" in chart
    assert 'points="64.0,260.0 570.0,34.0"' in chart


def test_a_chart_has_room_for_its_legend_and_no_two_lines_look_alike() -> None:
    names = [f"http://host-{index}.example.org:8080, 16 at a time, a long name" for index in range(16)]
    chart = xml.etree.ElementTree.fromstring(line_chart("many", {name: [(0, 0), (1, 1)] for name in names}))
    assert float(chart.get("width", "0")) > 570 + 6 * len(names[0])
    assert float(chart.get("height", "0")) > max(float(part.get("y", "0")) for part in chart)
    lines = [part for part in chart if part.tag.endswith("polyline")]
    assert len({(line.get("stroke"), line.get("stroke-dasharray")) for line in lines}) == len(names)


@pytest.mark.parametrize(("value", "step"), [(10, 2), (11, 2.5), (1, 0.2), (1534, 500), (0.03, 0.01)])
def test_axes_have_round_numbers(value: float, step: float) -> None:
    assert nice_step(value) == pytest.approx(step)


def test_many_points_are_thinned_and_the_last_one_stays() -> None:
    points = [(float(index), 0.0) for index in range(3001)]
    assert len(thinned(points)) <= MAX_POINTS and thinned(points)[-1] == points[-1]


def test_percentiles_are_values_that_were_there() -> None:
    assert [percentile([3, 1, 2], percent) for percent in (0, 50, 99)] == [1, 2, 3]


def test_metrics_are_read_with_and_without_labels() -> None:
    assert parse_metrics('# TYPE a gauge\na 1\n\nb{x="a b"} 2.5\n') == {"a": 1.0, 'b{x="a b"}': 2.5}


def test_of_several_processes_of_a_module_the_largest_numbers_count() -> None:
    both = ProcessSample(10, 5, 4, 3).beside(ProcessSample(20, 4, 6, 1))
    assert both == ProcessSample(20, 5, 6, 3, count=2)
