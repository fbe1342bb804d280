"""The benchmark: traces, streams cut at every byte, statistics, reports, and servers that answer in every way."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
import re
import socketserver
import statistics
import threading
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.answers import BrokenAnswerError, Read, read_answer
from server.bench.command import main
from server.bench.connection import Address, Exchange, exchange
from server.bench.errors import BenchmarkError
from server.bench.options import server_flags
from server.bench.records import Record, record_of
from server.bench.reports import WRITERS, Report, Table, as_html, as_markdown
from server.bench.results import Level, build_report, compare
from server.bench.statistics import estimates, is_good, percentile, summarize
from server.bench.trace import Lengths, Shape, make_trace
from server.bench.wires import WIRES, Options

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [b'data: {"token": {"text": "caf\xc3\xa9"}}\n\n', b": ping\r\n\r\n", b'data:{"token": {"text": "b"}}\r\n\r\n']
LAST = b'data: {"token": {"text": "c"}, "details": {"generated_tokens": 4, "input_length": 7}}\n\ndata: [DONE]\n\n'


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


STREAM = HEAD + chunked(*EVENTS, LAST[:11], LAST[11:])


def cut(data: bytes, *places: int) -> list[Read]:
    edges = [0, *sorted(places), len(data)]
    return [(float(index), data[a:b]) for index, (a, b) in enumerate(itertools.pairwise(edges)) if b > a]


# ---- traces ----


def test_a_seed_gives_the_same_trace_and_another_seed_another() -> None:
    shape = Shape(Lengths.parse("uniform:3:9"), Lengths.parse("lognormal:20:0.5"), 2)
    first = make_trace(shape, 50, 4.0, "1", None)
    assert first == make_trace(shape, 50, 4.0, "1", None) != make_trace(shape, 50, 4.0, "2", None)
    assert {len(plan.prompt.split()) for plan in first} == set(range(3, 10))
    assert len({tuple(plan.prompt.split()[:2]) for plan in first}) == 1
    assert [plan.at_s for plan in first] == sorted(plan.at_s for plan in first)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    plans = make_trace(Shape(Lengths.parse("1"), Lengths.parse("1")), 4000, 5.0, "1", None)
    gaps = [after.at_s - before.at_s for before, after in itertools.pairwise(plans)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1)  # exponential: the mean


def test_a_lognormal_has_its_median() -> None:
    lengths, rng = Lengths.parse("lognormal:100:0.6"), random.Random(0)
    assert statistics.median(lengths.draw(rng) for _ in range(4000)) == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("text", ["x", "0", "-1", "uniform:9:3", "uniform:1", "gauss:1:2", "fixed:", "nan", "inf"])
def test_what_is_no_distribution_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="token|smaller"):
        Lengths.parse(text)


@pytest.mark.parametrize("per_word", [1, 2, 3])
def test_a_prompt_has_exactly_so_many_tokens(per_word: int) -> None:
    """Words of several tokens, too, where the number is one that such words can have."""

    def tokenize(text: str) -> int:
        return per_word * len(text.split())

    plans = make_trace(Shape(Lengths.parse("30"), Lengths.parse("1")), 5, None, "1", tokenize)
    assert {tokenize(plan.prompt) for plan in plans} == {30}


def test_a_length_that_no_text_has_ends_with_a_sentence() -> None:
    with pytest.raises(BenchmarkError, match="no text of 3 tokens"):
        make_trace(Shape(Lengths.parse("3"), Lengths.parse("1")), 1, None, "1", lambda text: 2 * len(text.split()))


# ---- streams ----


@pytest.mark.parametrize("place", range(1, len(STREAM)))
def test_a_stream_cut_anywhere_reads_the_same(place: int) -> None:
    events = list(read_answer(cut(STREAM, place)).events())
    assert [event["token"]["text"] for _, event in events] == ["café", "b", "c"]


def test_an_event_has_the_moment_of_its_last_byte() -> None:
    """One byte in each read, whose moment is its place."""
    reads = [(float(place), STREAM[place : place + 1]) for place in range(len(STREAM))]
    moments = [moment for moment, _ in read_answer(reads).events()]
    for moment, event in zip(moments, [EVENTS[0], EVENTS[2]], strict=False):
        assert STREAM[: int(moment) + 1].endswith(event)
    assert STREAM[: int(moments[2]) + 1].endswith(b'"input_length": 7}}\n\n') and len(moments) == 3


@pytest.mark.parametrize("place", range(len(STREAM) - 5))
def test_a_stream_that_breaks_off_anywhere_is_said_to(place: int) -> None:
    with pytest.raises(BrokenAnswerError):
        read_answer(cut(STREAM[:place]))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_a_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


# ---- statistics ----


def record(start: float, times: list[float], num_tokens: int | None = None) -> Record:
    return Record(start, times[-1], None, times, 5, num_tokens or len(times), num_tokens is not None)


def test_a_summary_has_the_numbers_that_one_counts_by_hand() -> None:
    records = [record(0.0, [1.0, 1.5, 2.0], 5), record(1.0, [2.0, 4.0], 3), Record(0.0, 3.0, "status 429: full")]
    summary = summarize([records], {"ttft": 1.0, "inter_token": 0.6}, 0)
    assert (summary.num_completed, summary.failures) == (2, {"status 429: full": 1})
    assert (summary.duration_s, summary.num_output_tokens, summary.output_tokens_per_s) == (4.0, 8, 2.0)
    assert summary.goodput_per_s == 0.25  # the second pauses for 2 s
    assert summary.latencies["ttft"][50].value == 1.0
    assert summary.latencies["inter_token"][50].value == 0.5
    assert summary.latencies["tpot"][50].value == pytest.approx((0.25 + 1.0) / 2)
    assert summary.latencies["e2e"][99].value == pytest.approx(2.99)


def test_time_between_rounds_does_not_count() -> None:
    summary = summarize([[record(0.0, [1.0])], [record(100.0, [101.0])]], {}, 0)
    assert summary.duration_s == 2.0


def test_a_request_at_its_objective_is_good() -> None:
    assert is_good(record(0.0, [1.0, 2.0]), {"ttft": 1.0, "inter_token": 1.0, "e2e": 2.0})
    assert not is_good(record(0.0, [1.0, 2.0]), {"ttft": 0.9})


def test_a_confidence_interval_holds_the_truth_as_often_as_it_says() -> None:
    """The median of exponential values is ln 2, which 95 of 100 intervals of 60 values should have."""
    rng, num_held = random.Random(1), 0
    for _ in range(60):
        found = estimates([[rng.expovariate(1.0)] for _ in range(60)], rng)[50]
        assert found.low <= found.value <= found.high
        num_held += found.low <= 0.6931 <= found.high
    assert 52 <= num_held <= 60


def test_ratios_are_of_rounds_side_by_side() -> None:
    """The machine is twice as slow in the second round, for both."""
    fast, slow = [record(0.0, [1.0, 2.0])], [record(0.0, [2.0, 4.0])]
    slower = [record(0.0, [4.0, 8.0])]
    ratios = compare(Level("x", {"a": [fast, slow], "b": [slow, slower]}), 0)
    assert ratios["Time to first token"].value == 2.0
    assert ratios["Output tokens per second"].value == 0.5


# ---- reports ----


@pytest.mark.parametrize("ending", WRITERS)
def test_every_report_has_its_numbers_and_no_reference_to_elsewhere(ending: str) -> None:
    name = "<b>http://host|a</b>"
    level = Level(
        "2 at a time", {name: [[record(0.0, [1.0, 1.25])], [Record(0.0, 1.0, "no <byte>")]], "other": [[], []]}
    )
    text = WRITERS[ending](build_report({"seed": 7}, [level], {}, 0))
    assert "1000" in text or '"value": 1.0' in text
    if ending == ".html":
        assert name not in text and "<svg" in text and "<script" not in text and "src=" not in text
    if ending == ".json":
        data = json.loads(text)
        assert data["levels"][0]["latencies"]["inter_token"]["p50"]["value"] == 0.25
        assert data["levels"][0]["failures"] == {"no <byte>": 1}


@pytest.mark.parametrize("ending", WRITERS)
def test_a_report_in_which_everything_failed_is_written(ending: str) -> None:
    failed = Level("1 at a time", {"http://host": [[Record(0.0, 1.0, "status 503: no")]]})
    assert "status 503: no" in WRITERS[ending](build_report({"seed": 7}, [failed], {}, 0))


def test_numbers_stand_on_the_right_and_words_on_the_left() -> None:
    table = Table("T", ["load", "tokens", "p50", "empty"], [["4 at a time", "12", "1.5 (1.0 to 2.0)", ""]])
    both = dataclasses.replace(table, rows=[*table.rows, ["16 at a time", "not said", "2", ""]])
    assert both.are_numbers == [False, True, True, True]
    assert "| --- | ---: | ---: | ---: |" in as_markdown(Report({}, [both])).splitlines()
    html = as_html(Report({}, [table]))
    assert '<td>4 at a time</td><td class="number">12</td>' in html


# ---- servers ----

Reply = Callable[[bytes], bytes | None]
"""A request's path -> the whole answer; None: nothing comes."""


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], str]]:
    """Real HTTP servers, each on a thread of its own."""
    servers: list[socketserver.ThreadingTCPServer] = []
    released = threading.Event()

    def start(reply: Reply) -> str:
        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                path = self.rfile.readline().split()[1]
                while self.rfile.readline().strip():
                    pass
                answer = reply(path)
                if answer is None:
                    released.wait(10)
                else:
                    self.wfile.write(answer)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    released.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def plain(status: int, body: str) -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def tgi(path: bytes) -> bytes:
    return plain(200, '{"model_id": "m"}') if path == b"/info" else STREAM


OPENAI_EVENTS = [
    b'data: {"choices": [{"text": "", "delta": {"role": "assistant", "content": ""}}]}\n\n',
    b'data: {"choices": [{"text": "a", "delta": {"content": "a"}}]}\n\n',
    b'data: {"choices": [{"text": "", "delta": {}, "finish_reason": "length"}]}\n\n',
    b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\ndata: [DONE]\n\n',
]


def openai(path: bytes) -> bytes:
    if path == b"/info":
        return plain(404, "no")
    return plain(200, '{"data": [{"id": "m"}]}') if path == b"/v1/models" else HEAD + chunked(*OPENAI_EVENTS)


@pytest.mark.parametrize(("wire", "reply"), [(None, tgi), (None, openai), ("chat", openai), ("completions", openai)])
def test_a_server_is_measured_on_its_own_wire(
    serve: Callable[[Reply], str],
    wire: str | None,
    reply: Reply,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [f"--wire={wire}"] if wire else []
    report = tmp_path / "report.json"
    assert main(["--url", serve(reply), "-b2", "-r3", "--slo=e2e:60000", f"-o{report}", *flags], environ={}) == 0
    (level,) = json.loads(report.read_text())["levels"]
    per_request = {tgi: (7, 4), openai: (3, 2)}[reply]
    assert (level["num_completed"], level["num_prompt_tokens"], level["num_output_tokens"]) == (
        6,
        *(6 * number for number in per_request),
    )
    assert level["goodput_per_s"] == level["requests_per_s"] > 0
    assert "| 2 at a time |" in capsys.readouterr().out


def test_two_servers_take_turns_and_their_ratios_are_printed(
    serve: Callable[[Reply], str], capsys: pytest.CaptureFixture[str]
) -> None:
    urls = [serve(tgi), serve(openai)]
    flags = "--request-rate 500 --num-requests 4 --rounds 2".split()
    assert main(["--url", urls[0], "--compare", urls[1], *flags], environ={}) == 0
    printed = capsys.readouterr()
    assert "second / first server" in printed.out and "| Time to first token | less |" in printed.out
    turns = [line.split(": ")[0] for line in printed.err.splitlines() if "round" in line]
    assert turns == [urls[0], urls[1], urls[1], urls[0]]


def test_without_a_usage_events_are_counted_and_the_report_says_so(
    serve: Callable[[Reply], str], capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(path: bytes) -> bytes:
        return openai(path) if path == b"/v1/models" else HEAD + chunked(*OPENAI_EVENTS[:3])

    assert main(["--url", serve(reply), "-b1", "-r1", "--wire=chat"], environ={}) == 0
    assert "did not say how many tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (plain(422, '{"error": "too long", "error_type": "validation"}'), "status 422: too long"),
        (plain(400, '{"error": {"message": "bad model"}}'), "status 400: bad model"),
        (plain(401, ""), "status 401: Unauthorized"),
        (plain(502, "<html>Bad Gateway"), "status 502: <html>Bad Gateway"),
        (HEAD + chunked(b'data: {"error": "overloaded"}\n\n'), "overloaded"),
        (HEAD + chunked(b"data: [DONE]\n\n"), "the answer has no token"),
        (HEAD + chunked(b"data: nonsense\n\n"), "no JSON object: nonsense"),
        (STREAM[:-30], "in the middle of its answer"),
        (b"", "without an answer"),
        (b"SSH-2.0\r\n\r\n", "no HTTP answer"),
        (HEAD + b"-2\r\n", "'-2' is no length"),
        (HEAD + b"{}\r\n", "'{}' is no length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "'many' is no length"),
        (None, "no byte came for 0.2 s"),
    ],
)
def test_a_server_that_refuses_breaks_or_hangs_is_told_in_a_sentence(
    serve: Callable[[Reply], str], answer: bytes | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-b1", "-r1", "--wire=tgi", "--timeout=0.2"]
    assert main(["--url", serve(lambda path: answer), *flags], environ={}) == 1
    printed = capsys.readouterr()
    assert words in printed.err and "Traceback" not in printed.err and not printed.out


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (plain(401, '{"error": "no key"}'), " (status 401: no key): give its key with --api-key"),
        (plain(503, '{"error": "loading"}'), " (status 503: loading): it is not ready, try again in a moment"),
        (plain(404, "no"), " (status 404: no): name it with --model"),
        (plain(200, '{"data": []}'), ": name it with --model"),
    ],
)
def test_a_server_that_lists_no_model_is_told_with_what_to_do(
    serve: Callable[[Reply], str], models: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve(lambda path: models)
    assert main(["--url", url, "--wire=chat"], environ={}) == 1
    assert capsys.readouterr().err == f"error: {url} lists no model at /v1/models{words}\n"


def test_a_length_that_no_text_has_is_told_in_a_sentence(
    serve: Callable[[Reply], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with a tokenizer that puts a token of its own before every text."""
    monkeypatch.setattr("server.bench.measure.open_tokenizer", lambda *_: lambda text: 1 + len(text.split()))
    assert main(["--url", serve(tgi), "-t", "m", "-s1", "-b1"], environ={}) == 1
    assert "no text of 1 tokens was found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "host"), [("http://[::1]:80/v1", "[::1]:80"), ("https://example.org", "example.org:443")]
)
def test_a_request_names_its_host_as_the_address_does(url: str, host: str) -> None:
    assert f"\r\nHost: {host}\r\n".encode() in Address.parse(url).request("/info")


def test_an_address_where_nobody_listens_is_told() -> None:
    result = asyncio.run(exchange(Address.parse("127.0.0.1:1"), b"", 1.0))
    assert result.failure is not None and "can't be reached" in result.failure


def test_ctrl_c_prints_what_was_measured(
    serve: Callable[[Reply], str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = itertools.count()

    def stop(target: object, plans: object, num_streams: int, report: Callable[[Exchange], None]) -> object:
        if next(count) == 3:  # the second load, after its warm-up
            raise KeyboardInterrupt
        return run_closed(target, plans, num_streams, report)  # type: ignore[arg-type]

    from server.bench.load import run_closed

    monkeypatch.setattr("server.bench.measure.run_closed", stop)
    assert main(["--url", serve(tgi), "-b1", "-b2", "-r2"], environ={}) == 130
    printed = capsys.readouterr().out
    assert "| 1 at a time |" in printed and "| 2 at a time |" not in printed


# ---- flags ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "name a running server with --url"),
        ("-t m -m /tmp/socket", "shards have no socket"),
        ("-t m -s uniform:1:2", "are numbers"),
        ("-t m --compare http://x", "--compare is for a server"),
        ("--url x --rounds 2", "name the second with --compare"),
        ("--url x -b 1 --request-rate 2", "exclude each other"),
        ("--url x -b 0", "no whole number from 1 on"),
        ("--url x --slo ttfb:3", "METRIC:MS"),
        ("--url x -o report.pdf", "ends in none of"),
        ("--url x -o /nowhere/report.md", "there is no folder"),
        ("--url x --wire chat --watermark", "--watermark does not exist on OpenAI's routes"),
        ("--url ftp://x", "is no http"),
    ],
)
def test_flags_that_make_no_sense_are_refused_with_the_next_step(
    flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(flags.split(), environ={})
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flag", server_flags())
def test_no_flag_for_a_server_is_ignored_without_one(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    value = {"--wire": "=chat", "--slo": "=e2e:1", "--stop-at-eos": ""}.get(flag, "=1")
    with pytest.raises(SystemExit, match="2"):
        main(["-t", "m", f"{flag}{value}"], environ={})
    assert f"{flag} is for a server: name it with --url" in capsys.readouterr().err


def test_tgis_variables_are_read_and_flags_beat_them(serve: Callable[[Reply], str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    environ = {"RUNS": "2", "WARMUPS": "0", "DECODE_LENGTH": "5", "TOP_K": "4", "DO_SAMPLE": "true"}
    assert main(["--url", serve(tgi), "-b3", "-d6", f"--output={report}"], environ=environ) == 0
    data = json.loads(report.read_text())
    assert data["levels"][0]["num_completed"] == 6
    assert data["parameters"]["output tokens"] == "fixed:6"
    assert data["parameters"]["sampling"] == "top_k=4, do_sample=True"


@pytest.mark.parametrize(
    ("reply", "flags", "model"),
    [
        (tgi, [], "m"),
        (tgi, ["--model=m"], "m"),
        (tgi, ["--model=sql"], "m, adapter sql"),
        (openai, [], "m"),
        (openai, ["--model=sql"], "sql"),
    ],
)
def test_a_report_says_what_was_measured_when_and_where(
    serve: Callable[[Reply], str], tmp_path: Path, reply: Reply, flags: list[str], model: str
) -> None:
    paths = [tmp_path / f"report.{ending}" for ending in ("json", "md", "html")]
    url = serve(reply)
    assert main(["--url", url, "-b1", "-r1", *(f"-o{path}" for path in paths), *flags], environ={}) == 0
    parameters = json.loads(paths[0].read_text())["parameters"]
    assert parameters[f"model of {url}"] == model
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", parameters["date"])
    assert re.fullmatch(r"\d+ cores of .+", parameters["machine that asked"])
    for path in paths[1:]:
        assert all(parameters[name] in unescape(path.read_text()) for name in ("date", "machine that asked"))
        assert f"model of {url}" in path.read_text()


def test_an_adapter_is_named_on_tgis_wire() -> None:
    (plan,) = make_trace(Shape(Lengths.parse("3"), Lengths.parse("9")), 1, None, "1", None)
    assert WIRES["tgi"].body(plan, Options("sql", True, {}, "m, adapter sql"))["parameters"]["adapter_id"] == "sql"
    assert "adapter_id" not in WIRES["tgi"].body(plan, Options("", True, {}, "m"))["parameters"]


@pytest.mark.parametrize("wire", WIRES)
def test_a_body_asks_for_exactly_so_many_tokens(wire: str) -> None:
    (plan,) = make_trace(Shape(Lengths.parse("3"), Lengths.parse("9")), 1, None, "1", None)
    text = json.dumps(WIRES[wire].body(plan, Options("m", True, {}, "m")))
    assert '"ignore_eos": true' in text and ": 9" in text
    assert "ignore_eos" not in json.dumps(WIRES[wire].body(plan, Options("m", False, {}, "m")))


def test_a_failed_exchange_is_a_failed_record() -> None:
    assert record_of(Exchange(1.0, [], "gone"), WIRES["tgi"]) == Record(1.0, 1.0, "gone")
