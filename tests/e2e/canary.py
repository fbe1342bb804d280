"""One honest stream beside every attack: `python -m tests.e2e.canary [--scripted] [--seconds S] [NAME ...]`.

Prints a line for each attack: the canary's largest gap between two events without and with it, the HTTP process's
memory, the statuses. Exit code 1 if an attack stalls the canary, takes too much memory or breaks the server. Without
`--scripted` the small demo model is served by the launcher as a user would. Sequences then share the engine's steps, so
an attack that adds more to the gap is measured against its fair share: right after it as many plain greedy sequences,
with prompts as long, keep the canary company, and its gaps beside the attack may be twice those.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.attacks import ATTACKS, plain_sequences
from tests.e2e.conftest import build_demo_model
from tests.e2e.http_process import http_process, ready
from tests.e2e.launched import launched
from tests.e2e.mutations import whole
from tests.e2e.scripted_engine import scripted_engine

MAX_ADDED_GAP_S = 0.25
"""The gap that an attack may add to the canary's largest one."""
MAX_FAIR_SHARES = 2
"""Beyond that gap a real engine's canary may wait this many times as long as beside plain greedy sequences."""
MAX_RESIDENT_BYTES = 400e6
ALONE_S = 0.5
PEACEFUL_GAP_S = 0.15
MAX_PAUSES = 20
SAMPLE_S = 0.02
COMPANY_SAMPLE_S = 0.1
STEP_S = 0.01
WINDOW = 2048
STREAM = b'{"inputs":"Tell me a story.","parameters":{"max_new_tokens":%d,"ignore_eos":true}}'
NUM_TRIES = 3
"""A gap that others of the machine have made does not come again; one that the attack makes does."""


@dataclass(frozen=True)
class Target:
    """A server under attack."""

    port: int
    process: psutil.Process
    """The HTTP process."""
    log: Callable[[], str]
    is_real: bool
    """The engine computes."""


class Canary:
    """A client that reads one stream after another and notes the time of everything that comes."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="canary")
        self._moments: list[float] = []
        self.num_lost = 0
        """Streams that ended before their time."""

    def __enter__(self) -> Canary:
        self._thread.start()
        while not self._moments:
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def mark(self) -> int:
        return len(self._moments)

    def gap_since(self, mark: int) -> float:
        """The largest gap from the event before `mark` until now, in seconds."""
        moments = [*self._moments[max(0, mark - 1) :], time.perf_counter()]
        return max(later - earlier for earlier, later in zip(moments, moments[1:], strict=False))

    def _read(self) -> None:
        while not self._is_over.is_set():
            with socket.create_connection(("127.0.0.1", self._port)) as client:
                client.settimeout(120)
                client.sendall(whole("/generate_stream", STREAM % (WINDOW - 20)))
                tail = b""
                while not self._is_over.is_set() and not tail.endswith(b"\r\n0\r\n\r\n"):
                    data = client.recv(1 << 16)
                    if not data:
                        self.num_lost += 1
                        break
                    self._moments.append(time.perf_counter())
                    tail = (tail + data)[-7:]


class Watch:
    """A thread that looks at something again and again."""

    def __init__(self, look: Callable[[], None], pause_s: float) -> None:
        """`look` may raise psutil.Error or OSError: then it is tried again."""
        self._look = look
        self._pause_s = pause_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="watch")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _repeat(self) -> None:
        while not self._is_over.wait(self._pause_s):
            with contextlib.suppress(psutil.Error, OSError):
                self._look()


class Company:
    """What the engine computes beside the canary, by the server's own metrics."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._first = self._last = self._metrics()
        self.num_sequences = 1
        """The largest number at a time."""

    def look(self) -> None:
        self._last = self._metrics()
        num_sequences = int(self._last["tgi_batch_current_size"] + self._last["tgi_queue_size"]) - 1
        self.num_sequences = max(self.num_sequences, num_sequences)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of a usual prompt that came meanwhile."""
        total, count = (
            self._last[f"tgi_request_input_length_{kind}"] - self._first[f"tgi_request_input_length_{kind}"]
            for kind in ("sum", "count")
        )
        return max(1, round(total / max(1, count)))

    def _metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@dataclass(frozen=True)
class Measured:
    """A row beside the canary."""

    alone_s: float
    """The canary's largest gap without the row."""
    beside_s: float
    mean_s: float
    """The canary's mean gap beside the row."""
    max_bytes: int
    counts: dict[str, int]
    num_lost: int
    has_traceback: bool
    plain: str
    """The row of as many plain sequences as this one had in the engine at a time."""

    @property
    def added_s(self) -> float:
        return self.beside_s - self.alone_s


@dataclass(frozen=True)
class Outcome:
    """What one attack did."""

    name: str
    attack: Measured
    fair: Measured | None
    """Beside plain sequences, whose company the canary has to bear; None: it was not needed."""
    complaints: list[str]
    is_broken: bool
    """Whether it did what no other process of the machine explains: lost a stream, an internal error, a traceback."""

    @property
    def counts(self) -> dict[str, int]:
        return self.attack.counts

    def line(self) -> str:
        attack, fair = self.attack, self.fair
        share = f"{1000 * fair.beside_s:6.0f}" if fair else " " * 6
        means = f"means {1000 * attack.mean_s:.0f}, {1000 * fair.mean_s:.0f} ({attack.plain})" if fair else ""
        return (
            f"{self.name:45} {1000 * attack.alone_s:6.0f} {1000 * attack.beside_s:7.0f} {share} "
            f"{attack.max_bytes / 1e6:6.0f}  {means} {attack.counts} {'; '.join(self.complaints)}"
        )


class AttackTable:
    """A target, the program that attacks it, and what watches it."""

    def __init__(self, target: Target, *, seconds: float, alone_s: float = ALONE_S, num_tries: int = NUM_TRIES) -> None:
        self._target = target
        self._seconds = seconds
        self._alone_s = alone_s
        self._num_tries = num_tries
        self._max_bytes = 0
        self._memory = Watch(self._look_at_memory, SAMPLE_S)
        command = [sys.executable, "-m", "tests.e2e.attacks", str(target.port), *["--leave"] * target.is_real]
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> AttackTable:
        self._memory.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._memory.__exit__()
        assert self._program.stdin is not None
        self._program.stdin.close()
        with self._program:
            self._program.wait()

    def outcome(self, name: str) -> Outcome:
        """What the attack did, on that try of a few on which it did least, or on the first that broke something."""
        outcome = self._once(name)
        for _ in range(self._num_tries - 1):
            if not outcome.complaints or outcome.is_broken:
                break
            outcome = min(outcome, self._once(name), key=lambda item: (not item.is_broken, len(item.complaints)))
        return outcome

    def _gap_in_peace(self, canary: Canary) -> float:
        """The canary's gap once the work of the attack before is done."""
        for _ in range(MAX_PAUSES):
            mark = canary.mark()
            time.sleep(self._alone_s)
            alone_s = canary.gap_since(mark)
            if alone_s < PEACEFUL_GAP_S:
                break
        return alone_s

    def _look_at_memory(self) -> None:
        self._max_bytes = max(self._max_bytes, self._target.process.memory_info().rss)

    def _measure(self, name: str) -> Measured:
        program = self._program
        assert program.stdin is not None and program.stdout is not None
        log_length = len(self._target.log())
        with Canary(self._target.port) as canary:
            alone_s = self._gap_in_peace(canary)
            self._max_bytes = 0
            company = Company(self._target.port)
            mark, started = canary.mark(), time.perf_counter()
            with Watch(company.look, COMPANY_SAMPLE_S) if self._target.is_real else contextlib.nullcontext():
                program.stdin.write(f"{name} {self._seconds}\n")
                program.stdin.flush()
                counts = json.loads(program.stdout.readline())
                beside_s = canary.gap_since(mark)
                mean_s = (time.perf_counter() - started) / max(1, canary.mark() - mark)
        return Measured(
            alone_s,
            beside_s,
            mean_s,
            self._max_bytes,
            counts,
            canary.num_lost,
            has_traceback="Traceback" in self._target.log()[log_length:],
            plain=plain_sequences(company.num_sequences, company.num_prompt_tokens),
        )

    def _once(self, name: str) -> Outcome:
        attack = self._measure(name)
        needs_fair = self._target.is_real and attack.added_s > MAX_ADDED_GAP_S
        fair = self._measure(attack.plain) if needs_fair else None
        is_broken = attack.num_lost > 0 or "500" in attack.counts or attack.has_traceback
        return Outcome(name, attack, fair, complaints_about(attack, fair), is_broken)


def complaints_about(attack: Measured, fair: Measured | None) -> list[str]:
    """What is wrong with an attack's outcome; `fair` is beside as many plain sequences, None: nothing was computed."""
    if fair is None:
        complaints = {f"the canary waits {attack.added_s:.2f} s longer": attack.added_s > MAX_ADDED_GAP_S}
    else:
        gaps, means = attack.beside_s / fair.beside_s, attack.mean_s / fair.mean_s
        complaints = {
            f"{gaps:.1f} times a fair gap": gaps > MAX_FAIR_SHARES,
            f"{means:.1f} times a fair mean": means > MAX_FAIR_SHARES,
        }
    complaints |= {
        f"{attack.num_lost} streams are lost": attack.num_lost > 0,
        f"{attack.max_bytes / 1e6:.0f} MB": attack.max_bytes > MAX_RESIDENT_BYTES,
        "an internal error": "500" in attack.counts,
        "no answer": "silence" in attack.counts,
        "a traceback": attack.has_traceback,
    }
    return [text for text, applies in complaints.items() if applies]


@contextlib.contextmanager
def scripted_target(model: Path, folder: Path, **config: Any) -> Iterator[Target]:
    """The HTTP process alone, with an engine that computes nothing behind it. `config`: fields of ServerConfig."""
    log_path = folder / "log"
    with http_process(model, log_path, graceful_termination_timeout_s=1, **config) as http:
        http.endpoint.send(ready(model, max_total_tokens=WINDOW))
        with scripted_engine(http.endpoint, list(range(300, 400)), STEP_S):
            while "Connected" not in log_path.read_text():
                time.sleep(0.05)
            yield Target(http.port, http.process, log_path.read_text, is_real=False)


@contextlib.contextmanager
def launched_target(model: Path, folder: Path, *flags: str) -> Iterator[Target]:
    """A server as a user starts it, whose flags let clients ask for much. `flags`: more of them."""
    much = ("--max-logit-bias", "50000", "--max-best-of", "128")
    with launched(model, folder, "--max-total-tokens", str(WINDOW), "-g", "2", *much, *flags) as server:
        yield Target(server.port, server.child("server"), lambda: server.log, is_real=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="One honest stream beside every attack")
    parser.add_argument("names", nargs="*", help="attacks; all of them if none is named")
    parser.add_argument("--scripted", action="store_true", help="an engine that computes nothing")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each attack takes")
    parser.add_argument("--tries", type=int, default=NUM_TRIES, help="how often an attack that succeeds is tried")
    args = parser.parse_args()
    model = build_demo_model("--small")
    is_good = True
    with tempfile.TemporaryDirectory() as folder:
        make = scripted_target if args.scripted else launched_target
        with make(model, Path(folder)) as target:
            print(f"{'attack':45}  alone  beside   fair     MB  statuses")
            with AttackTable(target, seconds=args.seconds, num_tries=args.tries) as table:
                for name in args.names or ATTACKS:
                    outcome = table.outcome(name)
                    print(outcome.line(), flush=True)
                    is_good = is_good and not outcome.complaints
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
