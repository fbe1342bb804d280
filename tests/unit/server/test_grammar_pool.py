"""Who is checked next: hard grammars hold up nobody else, and nothing is checked twice or in vain."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from server.errors import OverloadedError
from server.requests.grammar_check import Checked
from server.requests.grammar_pool import TOO_COMPLEX, CheckingPool, CheckingProcess, PoolLimits

TIMEOUT_S = 0.25
LIMITS = PoolLimits(timeout_s=TIMEOUT_S, slice_s=0.02, max_wait_s=30.0)


class ScriptedProcess(CheckingProcess):
    """Takes its whole time for grammars that begin with `hard`, and none for others."""

    def __init__(self, begun: list[bytes]) -> None:
        super().__init__()
        self._begun = begun
        self._interrupted = threading.Event()

    def check(
        self, request: bytes, timeout_s: float, *, on_begin: Callable[[], None], is_given_up: Callable[[], bool]
    ) -> Checked | None:
        self._interrupted.clear()
        name = request.split(b" ", 1)[1]
        self._begun.append(name)
        on_begin()
        if not name.startswith(b"hard"):
            return Checked(name.decode())
        self._interrupted.wait(timeout_s)
        return None if is_given_up() else TOO_COMPLEX

    def interrupt(self) -> None:
        self._interrupted.set()

    def kill(self) -> None:
        self._interrupted.set()

    def cpu_s(self) -> float:
        return 1.0


class ScriptedPool(CheckingPool):
    """A pool of such processes, and the grammars in the order in which work at them began."""

    def __init__(self, limits: PoolLimits = LIMITS) -> None:
        super().__init__(limits)
        self.begun: list[bytes] = []
        for place in self._places:
            place.process = ScriptedProcess(self.begun)


@pytest.fixture
def pool() -> Iterator[ScriptedPool]:
    with contextlib.closing(ScriptedPool()) as pool:
        yield pool


def ask(pool: CheckingPool, *requests: bytes) -> list[asyncio.Task[Checked]]:
    return [asyncio.create_task(pool.check(request)) for request in requests]


async def test_many_hard_grammars_delay_an_easy_one_by_their_slices(pool: ScriptedPool) -> None:
    hard = ask(pool, *(b"hard %d" % index for index in range(10)))
    await asyncio.sleep(3 * TIMEOUT_S)
    easy = 0
    while not all(task.done() for task in hard):
        await asyncio.wait_for(pool.check(b"easy %d" % easy), TIMEOUT_S)
        easy += 1
        await asyncio.sleep(TIMEOUT_S / 8)
    assert easy > 10, "easy ones pass all the time that hard ones wait"
    assert {task.result() for task in hard} == {TOO_COMPLEX}, "and each hard one has its whole time at last"


async def test_a_long_grammar_has_its_place_for_as_long_as_nobody_waits(pool: ScriptedPool) -> None:
    assert await pool.check(b"hard") == TOO_COMPLEX
    assert pool.begun == [b"hard"]


async def test_what_has_failed_is_refused_at_once(pool: ScriptedPool) -> None:
    for _ in range(3):
        assert await pool.check(b"hard") == TOO_COMPLEX
    assert pool.begun == [b"hard"]


async def test_a_text_that_several_ask_for_is_checked_once(pool: ScriptedPool) -> None:
    asking = ask(pool, *[b"hard"] * 5)
    await asyncio.sleep(0.05)
    asking[0].cancel()
    assert set(await asyncio.gather(*asking[1:])) == {TOO_COMPLEX}
    assert pool.begun == [b"hard"]


async def test_what_nobody_waits_for_any_longer_is_not_checked(pool: ScriptedPool) -> None:
    running = ask(pool, b"hard 0", b"hard 1")
    waiting = ask(pool, *(b"hard %d" % index for index in range(2, 8)), b"easy")
    for task in waiting:
        await asyncio.sleep(0)
        task.cancel()
    started = time.monotonic()
    for task in running:
        task.cancel()
    await asyncio.sleep(0.1)
    assert await pool.check(b"another") == Checked("another")
    assert time.monotonic() - started < TIMEOUT_S, "work that nobody waits for ends after its slice"
    assert pool.begun == [b"hard 0", b"hard 1", b"another"]


async def test_whoever_waits_too_long_is_told_so() -> None:
    limits = PoolLimits(timeout_s=TIMEOUT_S, slice_s=0.02, max_wait_s=0.2)
    with contextlib.closing(ScriptedPool(limits)) as pool:
        outcomes = await asyncio.gather(*ask(pool, *(b"hard %d" % index for index in range(8))), return_exceptions=True)
    refusals = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
    assert 1 <= len(refusals) < 8 and str(refusals[0]) == "Too many grammars are waiting to be checked"
    assert [outcome for outcome in outcomes if isinstance(outcome, Checked)] == [TOO_COMPLEX] * (8 - len(refusals))


async def test_the_end_of_the_pool_waits_for_no_grammar() -> None:
    pool = ScriptedPool(PoolLimits(timeout_s=60.0))
    (task,) = ask(pool, b"hard")
    await asyncio.sleep(0.05)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5.0
    with pytest.raises(asyncio.CancelledError):
        await task
