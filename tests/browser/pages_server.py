"""The server of the pages: the HTTP process as the launcher starts it, behind it an engine of the test's."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import tokenizers

from engine.link.messages import EngineReady, EngineStarting
from engine.link.progress import Stage
from server.requests.infill import MARKS
from tests.browser.writing_engine import WritingEngine, writing_engine
from tests.e2e.http_process import http_process
from tests.unit.server.harness import write_model_folder

TEMPLATE = Path(__file__).parents[1] / "unit" / "server" / "qwen2_5.jinja"
MAX_TOTAL_TOKENS = 8192
LIMITS = EngineReady(
    max_input_tokens=MAX_TOTAL_TOKENS - 1,
    max_total_tokens=MAX_TOTAL_TOKENS,
    max_batch_prefill_tokens=4096,
    max_batch_total_tokens=1 << 20,
    vocab_size=1 << 20,
)
LONG_REQUEST = {"inputs": "Tell me a story.", "parameters": {"max_new_tokens": 4000}}
TIMEOUT_S = 60.0


def write_pages_model(folder: Path) -> None:
    """A tokenizer that knows calls of tools, marks of thoughts and those of filling in the middle."""
    write_model_folder(folder, TEMPLATE.read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    marks = [*MARKS, "<think>", "</think>", "<tool_call>", "</tool_call>"]
    tokenizer.add_tokens([tokenizers.AddedToken(mark, special=False, normalized=False) for mark in marks])
    tokenizer.save(str(folder / "tokenizer.json"))


class PagesServer:
    """A server that can be stopped, killed and started again on the same port."""

    def __init__(self, folder: Path, **config: Any) -> None:
        """`config`: more fields of ServerConfig."""
        self._folder = folder
        self._config = {"graceful_termination_timeout_s": 1, **config}
        self._log_path = folder / "log"
        self._stack = contextlib.ExitStack()
        self._port = 0
        self.engine: WritingEngine
        self.url: str

    def start(self) -> None:
        self.begin()
        self.become_ready()

    def begin(self) -> None:
        """Start the HTTP process; its engine is still loading."""
        http = self._stack.enter_context(http_process(self._folder, self._log_path, port=self._port, **self._config))
        self.process, self._port, self.url = http.process, http.port, http.url
        self._endpoint = http.endpoint

    def tell(self, stage: Stage, done: float, text: str) -> None:
        """Say how far the start of the engine is, as the engine does before it is ready."""
        self._endpoint.send(EngineStarting(stage=stage, done=done, text=text))

    def become_ready(self) -> None:
        tokenizer = tokenizers.Tokenizer.from_file(str(self._folder / "tokenizer.json"))
        self._endpoint.send(LIMITS)
        self.engine = self._stack.enter_context(writing_engine(self._endpoint, tokenizer))
        self.until(lambda: "Connected" in self._log_path.read_text())

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, self._log_path.read_text()
            time.sleep(0.02)

    def is_alive(self) -> bool:
        """Whether its port answers, be it with 503."""
        try:
            return httpx.get(f"{self.url}/livez", timeout=10).is_success
        except httpx.ConnectError:
            return False

    def stop(self) -> None:
        self._stack.close()

    def kill(self) -> None:
        """End it as the kernel does when memory is short."""
        self.process.send_signal(signal.SIGKILL)
        self.stop()

    @contextlib.contextmanager
    def streaming(self, count: int) -> Iterator[None]:
        """So many requests that are being answered in the block, of which each has its first token."""
        self.engine.answers = ["once upon a time " * 1000] * count
        self.engine.step_s = 0.02
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(httpx.Client(base_url=self.url, timeout=30))
            for _ in range(count):
                response = stack.enter_context(client.stream("POST", "/generate_stream", json=LONG_REQUEST))
                lines = response.iter_lines()
                stack.callback(lines.close)  # a stream whose iterator is forgotten is closed
                assert next(lines).startswith("data:")
            yield

    def metric(self, name: str) -> float:
        """The value of a metric without labels, of a server without a key."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        [value] = [line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"{name} ")]
        return float(value)

    def info(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/info", timeout=10).json()
        return answer


@contextlib.contextmanager
def pages_server(folder: Path, **config: Any) -> Iterator[PagesServer]:
    """A server that has a folder for itself; `config`: more fields of ServerConfig."""
    write_pages_model(folder)
    server = PagesServer(folder, **config)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def loading_server(folder: Path) -> Iterator[PagesServer]:
    """A server that listens while its engine loads, until it is told to become ready."""
    write_pages_model(folder)
    server = PagesServer(folder, is_listening_early=True)
    try:
        server.begin()
        server.until(server.is_alive)
        yield server
    finally:
        server.stop()
