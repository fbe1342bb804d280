"""The stages of a start: who hears of them, lines in a log, and a bar on a (pseudo-)terminal."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
import termios
import tty
from collections.abc import Iterator

import pytest

from engine.link import logs, progress
from engine.link.logs import CLEAR, HumanFormatter, JsonFormatter, PatientHandler, drawn
from engine.link.progress import Bar, Stage, StartProgress

PROGRAM = """
import logging, sys, time
from engine.link import logs, progress
from engine.link.progress import Stage, StartProgress
logs.PatientHandler.COUNTS_S, progress.TELL_S = 0.05, 0.0
logs.configure_logging("info", "engine", is_json="--json" in sys.argv)
start = StartProgress()
start.begin(Stage.LOADING)
for done in range(5):
    start.advance(done / 4, f"Loading weights: {25 * done} % of 1.00 GB")
    time.sleep(0.02)
time.sleep(0.2)
logging.getLogger("engine").info("Weights loaded in 0.3 s")
start.advance(None, "Compiling kernels: 3 compiled")
time.sleep(0.02)
logging.getLogger("engine").warning("The end")
logging.shutdown()
"""


def run_on_terminal(*args: str, term: str = "xterm") -> str:
    """What the program writes to standard error, which is a terminal of 60 columns."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    termios.tcsetwinsize(theirs, (24, 60))
    environ = {**os.environ, "TERM": term, "LOG_COLORIZE": "0"}
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *args], stderr=theirs, env=environ) as process:
        os.close(theirs)
        written = b""
        while chunk := read_or_nothing(ours):
            written += chunk
    os.close(ours)
    assert process.returncode == 0
    return written.decode()


def read_or_nothing(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that nobody has the other end
        return b""


def test_a_terminal_shows_one_bar_that_grows_and_gives_way_to_the_next_line() -> None:
    *shown, last = run_on_terminal().split(CLEAR)[1:]
    bars = [text for text in shown if text.startswith("[")]
    assert bars[0] == "[------------------------] Loading weights: 0 % of 1.00 GB, 0 s"[:59]
    assert bars[2].startswith("[############------------] Loading weights: 50 % of 1.00 GB")
    assert len(bars) > 5, "the last one is drawn again while nothing is said"
    assert bars[-1] == bars[4] and bars[4].startswith(f"[{'#' * 24}] ")
    assert not any("\n" in bar or len(bar) > 59 for bar in bars)
    lines = [text for text in [*shown, last] if "\n" in text]
    assert [re.sub(r"^\S+ +", "", line) for line in lines] == [
        "INFO engine: Weights loaded in 0.3 s\n",
        "WARN engine: The end\n",
    ]
    assert shown[-1] == "Compiling kernels: 3 compiled, 0 s", "how many there will be is not known"


@pytest.mark.parametrize(("args", "term"), [(["--json"], "xterm"), ([], "dumb")])
def test_json_and_a_terminal_that_can_not_move_have_lines_alone(args: list[str], term: str) -> None:
    written = run_on_terminal(*args, term=term)
    assert "\r" not in written and "\033" not in written
    assert len(written.splitlines()) == 2, "a quick start has no line about its progress"


class Kept(PatientHandler):
    """Keeps what it would write."""

    def __init__(self, *, has_bars: bool = False) -> None:
        super().__init__(has_bars=has_bars)
        self.texts: list[str] = []

    def _put_text(self, text: str) -> None:
        self.texts.append(text)


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def handler() -> Iterator[Kept]:
    handler = Kept()
    handler.setFormatter(HumanFormatter("engine", has_colours=False))
    progress.logger.addHandler(handler)
    progress.logger.setLevel(logging.INFO)
    yield handler
    progress.logger.removeHandler(handler)
    progress.logger.setLevel(logging.NOTSET)


def test_a_log_has_a_line_every_few_seconds(clock: Clock, handler: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_S", 0.0)
    start = StartProgress()
    start.begin(Stage.LOADING)
    for tenth in range(200):
        clock.now = 100 + tenth / 10
        start.advance(tenth / 200, f"Loading: {tenth / 2:.0f} %")
    start.begin(Stage.PACKING)
    for tenth in range(60):
        clock.now = 120 + tenth / 10
        start.advance(None, "Packing")
    texts = [line.split("engine: ")[1].strip() for line in handler.texts]
    assert texts == ["Loading: 25 %", "Loading: 50 %", "Loading: 75 %", "Packing"]


def test_whoever_waits_hears_of_every_stage_and_five_times_a_second_at_most(clock: Clock, handler: Kept) -> None:
    heard: list[tuple[str, float | None, str]] = []
    start = StartProgress(lambda *report: heard.append(report))
    start.begin(Stage.LOADING)
    for hundredth in range(100):
        clock.now = 100 + hundredth / 100
        start.advance(hundredth / 100, "Loading")
    start.begin(Stage.WARMING_UP)
    assert heard[0] == ("loading weights", None, "Loading weights")
    assert heard[-1] == ("warming up", None, "Warming up")
    assert 3 <= len(heard) - 2 <= 5


def test_a_bar_is_one_line_of_the_terminal_whatever_it_tells_of() -> None:
    assert drawn("a\nb\033[31m", Bar(0.5, 0.0), 3.4, 80) == f"[{'#' * 12}{'-' * 12}] a b\\x1b[31m, 3 s"
    assert drawn("a" * 100, Bar(1.0, 0.0), 0.0, 40) == f"[{'#' * 24}] {'a' * 12}"
    assert drawn("waiting", Bar(None, 0.0), 61.0, 80) == "waiting, 61 s"


def test_a_line_of_json_has_no_bar() -> None:
    record = logging.makeLogRecord(
        {"msg": "Loading weights: 42 %", "bar": Bar(0.42, 0.0), "filename": "x", "lineno": 1}
    )
    assert '"message": "Loading weights: 42 %"' in JsonFormatter().format(record)
