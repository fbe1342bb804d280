"""A start seen from outside: stages, the page, and the same connection once the model is there."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.link.messages import EngineStarting
from engine.link.progress import Stage
from server.ui.pages import SOURCE
from tests.e2e.http_process import HttpProcess, http_process, ready
from tests.e2e.hub_stand_in import Failure, hub_stand_in
from tests.e2e.launched import launched
from tests.e2e.scripted_engine import scripted_engine
from tests.e2e.test_download import hub_environment
from tests.unit.server.test_ui import CHROMIUM

TIMEOUT_S = 30.0


class Connection:
    """A client's connection, which is never opened again once it is there."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        deadline = time.monotonic() + TIMEOUT_S
        while self._connection.sock is None:
            with contextlib.suppress(ConnectionRefusedError):
                self._connection.connect()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self._connection.auto_open = 0

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        text = None if body is None else json.dumps(body)
        self._connection.request(method, path, text, {"content-type": "application/json", **headers})
        response = self._connection.getresponse()
        return response.status, response.read()

    def start(self) -> dict[str, Any]:
        """What /readyz says of the start; empty once the server is ready."""
        status, body = self.ask("GET", "/readyz")
        assert (status, body) == (200, b"") or status == 503
        return json.loads(body) if body else {}

    def wait_for(self, stage: str) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while (start := self.start()).get("stage") != stage:
            assert time.monotonic() < deadline, start
            time.sleep(0.02)
        return start

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def http_alone(tmp_path: Path) -> Iterator[HttpProcess]:
    with http_process("", tmp_path / "log", is_listening_early=True, graceful_termination_timeout_s=1) as http:
        yield http


def test_stages_are_told_until_the_same_connection_serves(
    http_alone: HttpProcess, tiny_model_dir: Path, tmp_path: Path
) -> None:
    with contextlib.closing(Connection(http_alone.port)) as connection:
        assert connection.start()["stage"] == "finding the model"
        http_alone.tell(stage="downloading", done=0.25, text="Download: 25 %")
        assert connection.wait_for("downloading")["progress"] == 0.25
        page = (503, (SOURCE / "starting.html").read_bytes())
        assert connection.ask("GET", "/", accept=CHROMIUM) == page
        assert connection.ask("GET", "/ui/starting.js")[0] == 200
        http_alone.tell(model_path=str(tiny_model_dir), lora_adapters=["sql"], model_sha="abc")
        for stage in (Stage.LOADING, Stage.WARMING_UP):
            http_alone.endpoint.send(EngineStarting(stage=stage, done=0.5, text=f"{stage}: half"))
            assert connection.wait_for(stage)["message"] == f"{stage}: half"
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 2}}
        assert connection.ask("POST", "/generate", body)[0] == 503
        http_alone.endpoint.send(ready(tiny_model_dir, max_total_tokens=100))
        with scripted_engine(http_alone.endpoint, list(b"hello"), 0.01):
            while connection.start():
                time.sleep(0.02)
            assert connection.ask("POST", "/generate", body)[0] == 200
            assert json.loads(connection.ask("GET", "/info")[1])["model_sha"] == "abc"
            assert b'"id":"sql"' in connection.ask("GET", "/v1/models")[1]
    log = (tmp_path / "log").read_text()
    assert log.count("Connected") == 1 and "Traceback" not in log


def test_a_start_goes_through_its_stages_in_order_and_the_ready_line_means_ready(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    order = [str(stage) for stage in Stage]
    with launched(tiny_model_dir, tmp_path, is_awaited=False) as server:
        with contextlib.closing(Connection(server.port)) as connection:
            stages: list[str] = []
            while stage := connection.start().get("stage"):
                if stage not in stages[-1:]:
                    stages.append(stage)
                time.sleep(0.01)
            assert stages == sorted(stages, key=order.index)
            assert "starting the engine" in stages and order.index(stages[-1]) > order.index("starting the engine")
            assert (
                connection.ask("POST", "/generate", {"inputs": "hello", "parameters": {"max_new_tokens": 2}})[0] == 200
            )
            assert json.loads(connection.ask("GET", "/info")[1])["max_input_tokens"] > 0
            assert connection.ask("GET", "/health") == (200, b"")
        server.wait_for_log("Connected")
        assert " of 0.00 GB" not in server.log, "a quick start has no line about its progress"


def test_a_download_is_told_and_ends_with_the_server(tiny_model_dir: Path, tmp_path: Path) -> None:
    with hub_stand_in() as hub:
        hub.add("tiny/Qwen2", tiny_model_dir)
        hub.failures.append(Failure("model.safetensors", hangs=True))
        environ = hub_environment(hub.url, tmp_path)
        with launched("tiny/Qwen2", tmp_path, environ=environ, is_awaited=False) as server:
            with contextlib.closing(Connection(server.port)) as connection:
                connection.wait_for("downloading")
            server.process.terminate()
            assert server.wait_for_end() == 0
            assert "webserver terminated" in server.log and "Traceback" not in server.log
