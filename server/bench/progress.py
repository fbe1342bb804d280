"""What a terminal shows while a benchmark runs: one line, written again and again."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from engine.link.logs import BAR_CELLS, CLEAR

INTERVAL_S = 0.2


class Progress:
    """Counts steps to a known end. Without a terminal it says only what each part is called."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """None: standard error."""
        self._stream = stream or sys.stderr
        self._is_live = self._stream.isatty()
        self._text, self._num_done, self._num_all = "", 0, 0
        self._started = self._shown = 0.0

    def begin(self, text: str, num_all: int) -> None:
        self.end()
        self._text, self._num_done, self._num_all = text, 0, num_all
        self._started, self._shown = time.monotonic(), 0.0
        if not self._is_live:
            print(text, file=self._stream, flush=True)

    def advance(self) -> None:
        self._num_done += 1
        now = time.monotonic()
        if self._is_live and (now - self._shown > INTERVAL_S or self._num_done == self._num_all):
            self._shown = now
            rate = self._num_done / max(now - self._started, 1e-9)
            bar = "#" * (BAR_CELLS * self._num_done // self._num_all)
            line = f"{self._text} [{bar:{BAR_CELLS}}] {self._num_done}/{self._num_all}, {rate:.1f}/s"
            print(CLEAR + line, end="", file=self._stream, flush=True)

    def end(self) -> None:
        """Take the line away."""
        if self._is_live and self._num_all:
            print(CLEAR, end="", file=self._stream, flush=True)
