"""Log lines of every process: for people, or one JSON object per line as in TGI. Standard library only.

A record may carry more fields, `logger.info("Success", extra={"span": {"name": "generate", ...}})`: JSON has them under
`span`, and in `spans` after those of `outer_spans`; the human line ends in `key="value"` pairs. A record may have a
`bar` (`engine.link.progress`): a terminal shows it in one place again and again, a log has a line of it now and then.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from engine.link.progress import Bar
from engine.link.repeats import RepeatCounter

TARGETS = {
    "text_generation_launcher": "launcher",
    "text_generation_router": "server",
    "text_generation_server": "engine",
}
"""Name of a TGI module in LOG_LEVEL -> our logger."""

LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}
LEVEL_NAMES = {logging.WARNING: "WARN", logging.CRITICAL: "ERROR"}
COLOURS = {logging.DEBUG: "\033[34m", logging.INFO: "\033[32m", logging.WARNING: "\033[33m", logging.ERROR: "\033[31m"}
STDERR = 2
CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
BREAKS_AND_DIRECTIONS = {
    code: f"\\u{code:04x}"
    for code in (0x61C, 0x200E, 0x200F, 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
ESCAPES = CONTROL_CHARACTERS | BREAKS_AND_DIRECTIONS | {10: "\n  "}
"""A message may quote names; with these replaced it can't colour the log, begin a line or turn its direction."""
MAX_CHARS = 16_384
"""Characters of a message with its fields; what is longer is cut."""
PROGRESS_LINE_S = 5.0
"""Seconds between two lines of a log about the same thing that takes its time."""
CLEAR = "\r\033[2K"
"""Takes away the bar in the terminal's last line, whichever process has drawn it."""
BAR_CELLS = 24
USUAL_COLUMNS = 80
QUIET_LIBRARIES = "numba asyncio uvicorn httpx httpcore httpx2 httpcore2 huggingface_hub filelock urllib3".split()
"""Libraries that would drown our lines; some of them log whole addresses."""


def parse_log_filter(text: str) -> dict[str, int]:
    """Levels by logger name, "" for all others, of `info` or `warn,text_generation_router=debug`. Raises ValueError."""
    levels = {"": logging.INFO}
    for part in text.lower().split(","):
        target, _, level = part.strip().rpartition("=")
        if level not in LEVELS:
            raise ValueError(f"not a log filter: {text}")
        first, *rest = target.split("::")
        levels[".".join([TARGETS.get(first, first), *rest])] = LEVELS[level]
    return levels


def configure_logging(log_filter: str, process: str, *, is_json: bool = False, has_user_text: bool = False) -> None:
    """Write to stderr the lines that `log_filter` (see parse_log_filter) lets through, with the name of the process.

    `has_user_text`: the process reads what clients write, so a traceback does without the exceptions' own words, which
    may quote it, unless the filter asks for debug lines.
    """
    levels = parse_log_filter(log_filter)
    is_hiding = has_user_text and logging.DEBUG not in levels.values()
    handler = PatientHandler(has_bars=not is_json and _is_terminal())
    handler.setFormatter(
        JsonFormatter(is_hiding_words=is_hiding)
        if is_json
        else HumanFormatter(process, has_colours=_has_colours(), is_hiding_words=is_hiding)
    )
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


class PatientHandler(logging.Handler):
    """Writes to stderr on a thread: a log that nobody reads must not hold up serving or stopping.

    Lines beyond `MAX_LINES` unwritten ones are dropped; `flush` waits at most `FLUSH_S`. Warnings that repeat are
    counted (`engine.link.repeats`); their counts are looked for every `COUNTS_S`.
    """

    MAX_LINES = 10_000
    FLUSH_S = 1.0
    COUNTS_S = 1.0

    def __init__(self, *, has_bars: bool = False) -> None:
        """`has_bars`: stderr is a terminal, where bars can be drawn."""
        super().__init__()
        self._texts: queue.Queue[str] = queue.Queue(self.MAX_LINES)
        self._repeats = RepeatCounter()
        self._has_bars = has_bars
        self._bar: tuple[str, Bar] | None = None
        """The bar that the terminal shows, with its text."""
        self._next_progress = 0.0
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        self._write_counts(now)
        bar: Bar | None = getattr(record, "bar", None)
        if bar is not None and self._has_bars:
            self._bar = record.getMessage(), bar
            self._draw(now)
        elif bar is not None:
            if now >= max(self._next_progress, bar.since + PROGRESS_LINE_S):
                self._next_progress = now + PROGRESS_LINE_S
                self._put(record)
        elif self._repeats.admits(record, now):
            self._bar = None  # what it told of has ended, or draws it again at once
            self._put(record)

    def _put(self, record: logging.LogRecord) -> None:
        self._put_text(f"{CLEAR if self._has_bars else ''}{self.format(record)}\n")

    def _put_text(self, text: str) -> None:
        with contextlib.suppress(queue.Full):
            self._texts.put_nowait(text)

    def _draw(self, now: float) -> None:
        if self._bar is not None:
            self._put_text(CLEAR + drawn(*self._bar, now, _num_columns()))

    def _write_counts(self, now: float) -> None:
        for line in self._repeats.take_counts(now):
            self._put(line)

    def _next_text(self) -> str:
        while True:
            try:
                return self._texts.get(timeout=self.COUNTS_S)
            except queue.Empty:
                with self.lock or contextlib.nullcontext():  # logging's type allows a handler without a lock
                    now = time.monotonic()
                    self._write_counts(now)
                    self._draw(now)

    def _write_all(self) -> None:
        while True:
            data = self._next_text().encode(errors="backslashreplace")
            with contextlib.suppress(OSError):  # the reader is gone, or stderr is closed
                # Not through sys.stderr: its lock, held by a write without end, would hold up the interpreter's end.
                while data:
                    data = data[os.write(STDERR, data) :]
            self._texts.task_done()

    def flush(self) -> None:
        with self.lock or contextlib.nullcontext():
            self._write_counts(math.inf)
        deadline = time.monotonic() + self.FLUSH_S
        while self._texts.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)


def drawn(text: str, bar: Bar, now: float, num_columns: int) -> str:
    """One line of a terminal: the bar, unless nobody knows how much is done, the text, and the seconds so far."""
    cells = "" if bar.done is None else f"[{'#' * int(BAR_CELLS * bar.done):-<{BAR_CELLS}}] "
    line = f"{cells}{text}, {now - bar.since:.0f} s".replace("\n", " ").translate(ESCAPES)
    return line[: num_columns - 1]  # a full line would make the terminal begin another one


def _num_columns() -> int:
    with contextlib.suppress(OSError):
        return os.get_terminal_size(STDERR).columns or USUAL_COLUMNS
    return USUAL_COLUMNS


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _has_colours() -> bool:
    wish = os.environ.get("LOG_COLORIZE")
    if wish:
        return wish.lower() in ("1", "true")
    return sys.stderr is not None and sys.stderr.isatty()


def _level_name(record: logging.LogRecord) -> str:
    return LEVEL_NAMES.get(record.levelno, record.levelname)


class _Formatter(logging.Formatter):
    """The parts that both forms share."""

    def __init__(self, *, is_hiding_words: bool = False) -> None:
        super().__init__()
        self._is_hiding_words = is_hiding_words

    def traceback_of(self, record: logging.LogRecord) -> str:
        """The record's traceback; empty: it has none."""
        if not record.exc_info or record.exc_info[1] is None:
            return ""
        if self._is_hiding_words:
            return "\n".join(_frames(record.exc_info[1]))
        return self.formatException(record.exc_info)


def _frames(error: BaseException) -> Iterator[str]:
    """The traceback of an exception and of those behind it, with their classes and without their words."""
    behind = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if behind is not None:
        yield from _frames(behind)
        yield "which led to:"
    yield from traceback.format_tb(error.__traceback__)
    yield type(error).__qualname__
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _frames(part)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}... ({len(text)} characters)"


class HumanFormatter(_Formatter):
    """`2026-11-23T10:00:00.123Z  INFO webserver: Connected`, in UTC."""

    def __init__(self, process: str, *, has_colours: bool, is_hiding_words: bool = False) -> None:
        super().__init__(is_hiding_words=is_hiding_words)
        self._process = process
        self._has_colours = has_colours

    def format(self, record: logging.LogRecord) -> str:
        level = f"{_level_name(record):>5}"
        if self._has_colours:
            level = f"{COLOURS.get(record.levelno, '')}{level}\033[0m"
        pairs = "".join(f' {key}="{value}"' for key, value in _span(record).items() if key != "name")
        text = "\n".join(filter(None, [_shortened(record.getMessage() + pairs), self.traceback_of(record)]))
        return f"{_timestamp(record, 'milliseconds')} {level} {self._process}: {text.translate(ESCAPES)}"


class JsonFormatter(_Formatter):
    """TGI's JSON form, one object per line; a traceback is in `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "timestamp": _timestamp(record, "microseconds"),
            "level": _level_name(record),
            "message": _shortened(record.getMessage()),
            "target": record.name,
            "filename": record.filename,
            "line_number": record.lineno,
        }
        if span := _span(record):
            line |= {"span": span, "spans": [*getattr(record, "outer_spans", []), span]}
        if exception := self.traceback_of(record):
            line["exception"] = exception
        return json.dumps(line)  # ASCII, whatever the encoding of stderr is


def _span(record: logging.LogRecord) -> Mapping[str, Any]:
    span: Mapping[str, Any] = getattr(record, "span", {})
    return span


def _timestamp(record: logging.LogRecord, precision: str) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return moment.isoformat(timespec=precision).replace("+00:00", "Z")
