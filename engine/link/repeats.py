"""Warnings that come again and again are counted: a client that is refused a thousand times a second fills no disk."""

from __future__ import annotations

import dataclasses
import logging

MAX_LINES = 50
"""Lines of one kind that are written in one period."""
PERIOD_S = 10.0


@dataclasses.dataclass(slots=True)
class _Period:
    """The lines of one kind since a moment."""

    started: float
    sample: logging.LogRecord
    """The line that the count is written in the name of."""
    num_written: int = 0
    num_counted: int = 0


class RepeatCounter:
    """Lets through the first lines of a kind in each period, and counts the others.

    A kind is the place in the code and, where a record has one, its `kind`. Lines below WARNING tell what was served
    and are always written.
    """

    def __init__(self, max_lines: int = MAX_LINES, period_s: float = PERIOD_S) -> None:
        self._max_lines = max_lines
        self._period_s = period_s
        self._periods: dict[tuple[str, int, str], _Period] = {}

    def admits(self, record: logging.LogRecord, now: float) -> bool:
        """Whether the line is to be written."""
        if record.levelno < logging.WARNING:
            return True
        key = (record.pathname, record.lineno, str(getattr(record, "kind", "")))
        period = self._periods.get(key)
        if period is None:
            period = self._periods[key] = _Period(now, record)
        if period.num_written < self._max_lines:
            period.num_written += 1
            return True
        period.num_counted += 1
        return False

    def take_counts(self, now: float) -> list[logging.LogRecord]:
        """Lines with the counts of the periods that have ended; those begin anew."""
        ended = [key for key, period in self._periods.items() if now - period.started >= self._period_s]
        periods = [self._periods.pop(key) for key in ended]
        return [_count_line(period, self._period_s) for period in periods if period.num_counted]


def _count_line(period: _Period, period_s: float) -> logging.LogRecord:
    sample = period.sample
    kind = getattr(sample, "kind", "")
    line = logging.makeLogRecord({**sample.__dict__, "exc_info": None, "span": {}})
    line.msg = "%d more lines of this kind%s within %g s were counted, not written"
    line.args = (period.num_counted, f" ({kind})" if kind else "", period_s)
    return line
