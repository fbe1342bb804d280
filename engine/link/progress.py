"""How far a start has come: the log hears of it, and whoever waits for the engine. Standard library only."""

from __future__ import annotations

import dataclasses
import enum
import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

TELL_S = 0.2
"""Seconds between two reports of one stage."""


class Stage(enum.StrEnum):
    """The stages of a start in their order, as /readyz names them. A start leaves out those that it has no need of."""

    FINDING = "finding the model"
    DOWNLOADING = "downloading"
    STARTING = "starting the engine"
    LOADING = "loading weights"
    PACKING = "packing weights"
    PLANNING = "planning memory"
    CAPTURING = "capturing graphs"
    READING_VOCABULARY = "reading the vocabulary"
    WARMING_UP = "warming up"
    COMPILING = "compiling kernels"


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """What a log record carries (`extra={"bar": ...}`) whose message tells how far something is."""

    done: float | None
    """From 0 to 1; None: nobody knows."""
    since: float
    """The time of `time.monotonic` at which it began."""


Tell = Callable[[Stage, float | None, str], None]


def tell_nobody(stage: Stage, done: float | None, text: str) -> None:
    """Nobody waits for this start."""


class StartProgress:
    """Reports the stages of one start, one after the other."""

    def __init__(self, tell: Tell = tell_nobody) -> None:
        """`tell` gets the stage, how much of it is done (0 to 1, None: nobody knows), and that in words."""
        self._tell = tell
        self._stage = Stage.STARTING
        self._since = time.monotonic()
        self._next_time = 0.0

    def begin(self, stage: Stage) -> None:
        self._stage = stage
        self._since = time.monotonic()
        self._next_time = self._since + TELL_S
        self._tell(stage, None, stage.capitalize())

    def advance(self, done: float | None, text: str) -> None:
        """Report within a stage. Calls that come quickly one after the other cost nothing but the first."""
        now = time.monotonic()
        if now >= self._next_time:
            self._next_time = now + TELL_S
            logger.info("%s", text, extra={"bar": Bar(done, self._since)})
            self._tell(self._stage, done, text)
