"""Log filters and the two forms of a line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from engine.link.logs import HumanFormatter, JsonFormatter, parse_log_filter
from engine.link.repeats import MAX_LINES, RepeatCounter


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("info", {"": logging.INFO}),
        ("WARN", {"": logging.WARNING}),
        ("trace", {"": logging.DEBUG}),
        ("warn,text_generation_router=debug", {"": logging.WARNING, "server": logging.DEBUG}),
        (
            "text_generation_launcher=error, text_generation_server=debug",
            {"": logging.INFO, "launcher": logging.ERROR, "engine": logging.DEBUG},
        ),
        ("text_generation_router::server=debug", {"": logging.INFO, "server.server": logging.DEBUG}),
        (
            "engine.scheduling.scheduler=debug,tower=info",
            {"": logging.INFO, "engine.scheduling.scheduler": 10, "tower": logging.INFO},
        ),
    ],
)
def test_filters(text: str, levels: dict[str, int]) -> None:
    assert parse_log_filter(text) == levels


@pytest.mark.parametrize("text", ["loud", "", "server=", "=x", "info,", "server=loud"])
def test_bad_filters(text: str) -> None:
    with pytest.raises(ValueError, match="not a log filter"):
        parse_log_filter(text)


def record(level: int, message: str, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "server.generation", "levelno": level, "msg": message, **extra})
    made.levelname = logging.getLevelName(level)
    made.created, made.filename, made.lineno = 1700000000.123456, "generation.py", 7
    return made


SPAN = {"name": "generate", "total_time": "1.5s", "seed": "None"}


def test_a_human_line() -> None:
    formatter = HumanFormatter("webserver", has_colours=False)
    line = formatter.format(record(logging.INFO, "Success", span=SPAN))
    assert line == '2023-11-14T22:13:20.123Z  INFO webserver: Success total_time="1.5s" seed="None"'
    assert formatter.format(record(logging.WARNING, "careful")) == "2023-11-14T22:13:20.123Z  WARN webserver: careful"
    assert "\033[33m WARN\033[0m" in HumanFormatter("x", has_colours=True).format(record(logging.WARNING, "careful"))


def test_a_message_can_neither_colour_the_log_nor_begin_a_line_of_its_own() -> None:
    line = HumanFormatter("webserver", has_colours=False).format(record(logging.ERROR, "no \033[31m\r\n2026 INFO fake"))
    assert line == "2023-11-14T22:13:20.123Z ERROR webserver: no \\x1b[31m\\x0d\n  2026 INFO fake"


@pytest.mark.parametrize(
    "character", ["\x00", "\x1b", "\x7f", "\x85", "\x9b", "\u2028", "\u2029", "\u202e", "\u2066", "\u200f", "\u061c"]
)
def test_no_character_can_break_or_turn_a_line_of_either_form(character: str) -> None:
    """NEL and the C1 set are line breaks and escapes to some terminals; bidi marks show a name other than it is."""
    try:
        raise ValueError(f"a{character}b")
    except ValueError:
        failed = record(
            logging.ERROR, f"a{character}b", span={"name": "x", "field": character}, exc_info=sys.exc_info()
        )
    for formatter in (HumanFormatter("webserver", has_colours=False), JsonFormatter()):
        line = formatter.format(failed)
        assert character not in line
        assert all(part.startswith(("2023", "  ", "{")) for part in line.splitlines())


def test_a_long_message_is_cut() -> None:
    line = HumanFormatter("webserver", has_colours=False).format(record(logging.INFO, "x" * 10**6))
    assert len(line) < 17_000
    assert line.endswith("x... (1000000 characters)")


def test_where_users_write_a_traceback_does_without_the_words_of_the_exceptions() -> None:
    try:
        try:
            raise KeyError("secret word")
        except KeyError as error:
            raise ExceptionGroup("secret group", [ValueError("secret value")]) from error
    except ExceptionGroup:
        failed = record(logging.ERROR, "failed", exc_info=sys.exc_info())
    for formatter in (
        HumanFormatter("webserver", has_colours=False, is_hiding_words=True),
        JsonFormatter(is_hiding_words=True),
    ):
        lines = formatter.format(failed)
        assert all(name in lines for name in ("KeyError", "ExceptionGroup", "ValueError", "test_logs.py"))
        shown = [line for line in lines.replace("\\n", "\n").splitlines() if "raise" not in line and "secret" in line]
        assert shown == []


def test_warnings_of_one_kind_are_counted_beyond_a_rate() -> None:
    counter = RepeatCounter(max_lines=3, period_s=10.0)
    refusal = record(logging.ERROR, "%s", args=("no",), kind="validation")
    assert [counter.admits(refusal, now) for now in (0.0, 1.0, 2.0, 3.0, 4.0)] == [True, True, True, False, False]
    assert counter.admits(record(logging.ERROR, "%s", args=("no",), kind="overloaded"), 4.0)
    assert all(counter.admits(record(logging.INFO, "Success"), 4.0) for _ in range(10))
    assert counter.take_counts(9.0) == []
    (line,) = counter.take_counts(10.0)
    assert line.getMessage() == "2 more lines of this kind (validation) within 10 s were counted, not written"
    assert line.levelno == logging.ERROR
    assert counter.take_counts(30.0) == []
    assert counter.admits(refusal, 30.0)


def test_the_counts_are_written_at_the_end_at_the_latest() -> None:
    program = (
        "import logging\n"
        "from engine.link.logs import configure_logging\n"
        "configure_logging('info', 'test', is_json=True)\n"
        "for number in range(5000): logging.error('%d', number)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    messages = [json.loads(line)["message"] for line in done.stderr.splitlines()]
    assert messages[:-1] == [str(number) for number in range(MAX_LINES)]
    assert messages[-1] == f"{5000 - MAX_LINES} more lines of this kind within 10 s were counted, not written"


def test_a_json_line() -> None:
    line = json.loads(JsonFormatter().format(record(logging.WARNING, "größer\nzwei", span=SPAN)))
    assert line == {
        "timestamp": "2023-11-14T22:13:20.123456Z",
        "level": "WARN",
        "message": "größer\nzwei",
        "target": "server.generation",
        "filename": "generation.py",
        "line_number": 7,
        "span": SPAN,
        "spans": [SPAN],
    }


def test_a_traceback_stays_in_its_line_or_below_it() -> None:
    try:
        raise ValueError("the reason")
    except ValueError:
        failed = record(logging.ERROR, "failed", exc_info=sys.exc_info())
    assert HumanFormatter("engine", has_colours=False).format(failed).splitlines()[-1] == "  ValueError: the reason"
    text = JsonFormatter().format(failed)
    assert "\n" not in text
    assert json.loads(text)["exception"].endswith("ValueError: the reason")


def test_a_log_that_nobody_reads_holds_up_nobody() -> None:
    """A pipe takes 64 KB; a process that writes more would wait for ever."""
    program = (
        "import logging, time\n"
        "from engine.link.logs import configure_logging\n"
        "configure_logging('info', 'test')\n"
        "started = time.monotonic()\n"
        "for number in range(20_000): logging.info('%d %s', number, 'x' * 100)\n"
        "print(time.monotonic() - started, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert float(process.stdout.readline()) < 10
    assert process.wait(10) == 0
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()


def test_every_line_is_there_at_the_end() -> None:
    program = (
        "import logging\n"
        "from engine.link.logs import configure_logging\n"
        "configure_logging('info', 'test', is_json=True)\n"
        "for number in range(5000): logging.info('%d', number)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == [str(n) for n in range(5000)]
