"""The time of a file's patterns: by the processor's count and by the clock's, whichever is over first."""

from __future__ import annotations

import signal
import time

import pytest

from quant.matching_time import TIMERS, MatchingTime


class TooLongError(Exception):
    pass


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        sum(range(10_000))  # not in the system's time, which does not count


@pytest.mark.parametrize(
    "name, work", [("MAX_MATCHING_S", spin), ("MAX_WAITING_S", time.sleep)], ids=["working", "kept waiting"]
)
def test_either_count_ends_it_and_goes_on_from_block_to_block(
    name: str, work: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(work)
    monkeypatch.setattr(f"quant.matching_time.{name}", 0.2)
    handlers = [signal.getsignal(number) for number in TIMERS.values()]
    matching = MatchingTime(TooLongError)
    with matching:
        work(0.12)
    time.sleep(0.12)  # nothing counts between blocks
    with pytest.raises(TooLongError, match=r"takes more than 0\.2 s"), matching:
        work(0.12)
    assert all(signal.getitimer(timer) == (0, 0) for timer in TIMERS)
    assert [signal.getsignal(number) for number in TIMERS.values()] == handlers
