"""The processes that check grammars, and who is checked next: a hard grammar holds up no other one.

A grammar that is new runs at once, or as soon as one before it has had its slice. Whoever needs more than a slice while
others wait is killed and begins again in a queue of hard grammars, of which one runs at a time, with the whole time
limit. So any number of hard grammars delays a new one by a slice. Everything but
`CheckingProcess.check` runs on the event loop.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import hashlib
import itertools
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from server.errors import OverloadedError
from server.piped_process import PipedProcess, has_answer
from server.requests.grammar_check import PID_BYTES, Checked

MAX_CACHED = 1024
"""Answers that are remembered."""
MAX_CACHED_CHARS = 1 << 23
"""Characters of the remembered answers in all."""
NUM_PROCESSES = 2
TIMEOUT_S = 5.0
"""Usual schemas take a millisecond, 2,000 properties 0.3 s."""
SLICE_S = 0.03
"""Time of a processor; its unit is a hundredth of a second."""
HARD_NICENESS = 10
MAX_WAIT_S = 10.0
"""Longest time in a queue."""
START_TIMEOUT_S = 30.0
"""Longest time in which a process begins, a tenth of a second on a free core."""
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
"""Units of a processor's time in a second."""
TOO_COMPLEX = Checked(error="it is too complex")


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLimits:
    """Times, which tests shorten."""

    timeout_s: float = TIMEOUT_S
    slice_s: float = SLICE_S
    max_wait_s: float = MAX_WAIT_S


class CheckingProcess(PipedProcess):
    """One process that compiles. To be used by one thread, but for `interrupt`, `kill` and `cpu_s`."""

    def __init__(self) -> None:
        super().__init__("server.requests.grammar_check")
        self._ready: subprocess.Popen[bytes] | None = None
        """The child that has said that it is ready."""
        self._worker = 0
        """The process that is at the last grammar; 0: none has begun."""

    def check(
        self, request: bytes, timeout_s: float, *, on_begin: Callable[[], None], is_given_up: Callable[[], bool]
    ) -> Checked | None:
        """The answer to a line; None if work ended because it `is_given_up`. `on_begin` is called as the work begins.

        A process that says nothing in time gives way to a new one. What ends without an answer twice is too complex.
        """
        for _ in range(2):
            if self._is_ready():
                questions, answers = self.pipes()
                with contextlib.suppress(BrokenPipeError):  # it has died between two requests
                    questions.write(request)
                    questions.flush()
                    self._worker = int(os.read(answers.fileno(), PID_BYTES) or 0)  # and no byte of the answer
                    on_begin()
                    if not has_answer(answers, timeout_s):
                        break
                    checked = msgspec.json.decode(answers.readline() or b"null", type=Checked | None)
                    if checked is not None:
                        return checked
            if is_given_up():
                return None
        self.close()
        return TOO_COMPLEX

    def interrupt(self) -> None:
        """End the work at a grammar; `check` returns. Harmless, but for time, if that work has just ended."""
        if (child := self.child) is not None:
            child.send_signal(signal.SIGUSR1)

    def cpu_s(self) -> float:
        """Seconds of a processor that the last grammar has taken; 0 if its process has ended."""
        try:
            fields = Path(f"/proc/{self._worker}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS

    def _is_ready(self) -> bool:
        """Whether there is a process; a new one says so once it has loaded what it needs."""
        _, answers = self.pipes()
        if self.child is not self._ready:
            if not has_answer(answers, START_TIMEOUT_S) or not answers.readline():
                self.close()
                return False
            self._ready = self.child
        return True


@dataclass(eq=False, slots=True)
class _Job:
    """A grammar that is being checked, for all who ask for it."""

    request: bytes
    answer: asyncio.Future[Checked]
    num_askers: int = 0
    is_hard: bool = False
    is_over: bool = False
    """It has had its slice."""
    is_given_up: bool = False
    """The work was ended before there was an answer."""
    timer: asyncio.TimerHandle | None = None
    """The end of its slice or of its time in a queue."""

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


@dataclass(eq=False, slots=True)
class _Place:
    """A process, the thread that speaks with it, and what it checks."""

    process: CheckingProcess = field(default_factory=CheckingProcess)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="grammars"))
    job: _Job | None = None


class CheckingPool:
    """Checks grammars in a few processes, which are started as they are needed."""

    def __init__(self, limits: PoolLimits) -> None:
        self.limits = limits
        self._places = [_Place() for _ in range(NUM_PROCESSES)]
        self._fresh: collections.deque[_Job] = collections.deque()
        self._hard: collections.deque[_Job] = collections.deque()
        self._jobs: dict[bytes, _Job] = {}
        self._answers = _Answers()
        self._is_closed = False

    @property
    def processes(self) -> list[CheckingProcess]:
        return [place.process for place in self._places]

    async def check(self, request: bytes) -> Checked:
        """The answer to a line for `server.requests.grammar_check`. Raises OverloadedError.

        What several ask for at a time is checked once; what nobody asks for any longer isn't checked.
        """
        known = self._answers.get(request)
        if known is not None:
            return known
        job = self._jobs.get(request)
        if job is None:
            job = self._jobs[request] = _Job(request, asyncio.get_running_loop().create_future())
            self._enqueue(job, self._fresh)
        job.num_askers += 1
        try:
            return await asyncio.shield(job.answer)
        finally:
            job.num_askers -= 1
            if not job.num_askers and not job.answer.done():
                self._abandon(job)

    def _enqueue(self, job: _Job, queue: collections.deque[_Job]) -> None:
        queue.append(job)
        loop = asyncio.get_running_loop()
        job.timer = loop.call_later(self.limits.max_wait_s, self._refuse, job)
        self._fill_places()

    def _refuse(self, job: _Job) -> None:
        """End the wait of a job."""
        self._remove(job)
        if not job.answer.done():
            job.answer.set_exception(OverloadedError("Too many grammars are waiting to be checked"))

    def _abandon(self, job: _Job) -> None:
        """Drop a job that nobody asks for; work is ended for it only once that saves time."""
        place = next((place for place in self._places if place.job is job), None)
        if place is None:
            self._remove(job)
        elif job.is_over or job.is_hard:
            self._give_up(place)

    def _remove(self, job: _Job) -> None:
        job.stop_timer()
        for queue in (self._fresh, self._hard):
            if job in queue:
                queue.remove(job)
        self._jobs.pop(job.request, None)

    def _fill_places(self) -> None:
        for place in self._places:
            if place.job is None and (job := self._next()) is not None:
                self._start(place, job)
        if self._fresh:
            over = (place for place in self._places if place.job and place.job.is_over and not place.job.is_hard)
            for place in itertools.islice(over, 1):
                self._give_up(place)

    def _next(self) -> _Job | None:
        if self._fresh:
            return self._fresh.popleft()
        if self._hard and not any(place.job and place.job.is_hard for place in self._places):
            return self._hard.popleft()
        return None

    def _start(self, place: _Place, job: _Job) -> None:
        job.stop_timer()
        job.is_over = job.is_given_up = False
        place.job = job
        loop = asyncio.get_running_loop()

        def on_begin() -> None:
            loop.call_soon_threadsafe(self._begin, place, job)

        check = functools.partial(
            place.process.check,
            b"%d %s" % (HARD_NICENESS if job.is_hard else 0, job.request),
            self.limits.timeout_s,
            on_begin=on_begin,
            is_given_up=lambda: job.is_given_up,
        )
        ended = loop.run_in_executor(place.thread, check)
        ended.add_done_callback(functools.partial(self._end, place, job))

    def _begin(self, place: _Place, job: _Job) -> None:
        """The process is at the job now, so its slice begins."""
        job.stop_timer()
        if place.job is job:
            job.timer = asyncio.get_running_loop().call_later(self.limits.slice_s, self._end_slice, place, job)

    def _end_slice(self, place: _Place, job: _Job) -> None:
        """A slice is time of a processor: on a busy machine an easy grammar takes long, too."""
        if place.process.cpu_s() < self.limits.slice_s:
            self._begin(place, job)
            return
        job.is_over = True
        if not job.num_askers:
            self._give_up(place)
        self._fill_places()

    def _give_up(self, place: _Place) -> None:
        """End the work at a job; `_end` has the rest."""
        assert place.job is not None
        if not place.job.is_given_up:
            place.job.is_given_up = True
            place.process.interrupt()

    def _end(self, place: _Place, job: _Job, ended: asyncio.Future[Checked | None]) -> None:
        place.job = None
        job.stop_timer()
        if self._is_closed:
            job.answer.cancel()
            return
        error = None if ended.cancelled() else ended.exception()
        checked = None if ended.cancelled() or error else ended.result()
        if checked is None and error is None and job.num_askers:
            job.is_hard = True
            self._enqueue(job, self._hard)
            return
        self._jobs.pop(job.request, None)
        if checked is not None:
            self._answers.put(job.request, checked)
        if not job.answer.done():
            if error is not None:
                job.answer.set_exception(error)
            else:
                job.answer.set_result(checked or TOO_COMPLEX)
        self._fill_places()

    def close(self) -> None:
        """End the processes, whatever they are at."""
        self._is_closed = True
        for place in self._places:
            if place.job is not None:
                place.job.is_given_up = True
            place.process.kill()
            place.thread.submit(place.process.close)
            place.thread.shutdown()


class _Answers:
    """The last answers, as many as fit, by hashes of their requests."""

    def __init__(self) -> None:
        self._answers: collections.OrderedDict[bytes, Checked] = collections.OrderedDict()
        self._num_chars = 0

    def get(self, request: bytes) -> Checked | None:
        key = _digest(request)
        checked = self._answers.get(key)
        if checked is not None:
            self._answers.move_to_end(key)
        return checked

    def put(self, request: bytes, checked: Checked) -> None:
        key = _digest(request)
        if key in self._answers:
            return
        self._answers[key] = checked
        self._num_chars += _num_chars(checked)
        while len(self._answers) > MAX_CACHED or self._num_chars > MAX_CACHED_CHARS:
            self._num_chars -= _num_chars(self._answers.popitem(last=False)[1])


def _digest(request: bytes) -> bytes:
    return hashlib.blake2b(request, digest_size=32).digest()


def _num_chars(checked: Checked) -> int:
    return sum(map(len, (checked.grammar, checked.error or "", *checked.left_open)))
