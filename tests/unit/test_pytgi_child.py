"""The Python API between the program and its server: the log's thread, the socket, requests that are broken off."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from pytgi.child import Log, command_line, environment
from pytgi.wire import Calls
from server.launcher.args import parse_args
from server.launcher.embedded import remove_socket

ROOT = Path(__file__).parents[2]


class Handler(logging.Handler):
    """A program's handler that does what it likes with the lines of the log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.log: Log | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if "close" in self.lines[-1]:
            assert self.log is not None
            self.log.close()
        if "raise" in self.lines[-1]:
            raise ValueError("the handler's own")


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Handler:
    handler = Handler()
    monkeypatch.setattr(logging.getLogger("pytgi"), "handlers", [handler])
    return handler


def pipe() -> tuple[IO[bytes], IO[bytes]]:
    reader, writer = os.pipe()
    return open(reader, "rb"), open(writer, "wb", buffering=0)


def test_a_handler_that_raises_does_not_end_the_reading(handler: Handler, capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = pipe()
    log = Log(reader)
    writer.write(b"raise\nand go on\n")
    writer.close()
    assert log.last_words() == "raise\nand go on" and handler.lines == ["raise", "and go on"]
    log.close()
    assert "ValueError: the handler's own" in capsys.readouterr().err


def test_the_logs_own_thread_may_close_it(handler: Handler, capsys: pytest.CaptureFixture[str]) -> None:
    """As where an LLM is collected there."""
    reader, writer = pipe()
    log = handler.log = Log(reader)
    writer.write(b"close\nand go on\n")
    writer.close()
    assert log.last_words() == "close\nand go on"
    log.close()
    assert reader.closed and capsys.readouterr().err == ""


@pytest.mark.parametrize("closed", ["0", "0, 1", "0, 1, 2", "2"])
def test_the_childs_socket_is_none_of_its_standard_streams(closed: str, tmp_path: Path) -> None:
    program = f"""
import os
for number in ({closed},):
    os.close(number)
from pytgi.child import _listener
with _listener() as listener:
    listener.bind("socket")
    assert listener.fileno() > 2 and not listener.get_inheritable()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and (tmp_path / "socket").exists()


@pytest.mark.parametrize(
    ("variables", "options", "limit"),
    [
        ({}, {}, 4096),
        ({"MAX_CONCURRENT_REQUESTS": ""}, {}, 4096),
        ({"MAX_CONCURRENT_REQUESTS": "7"}, {}, 7),
        ({"MAX_CONCURRENT_REQUESTS": "7"}, {"max_concurrent_requests": 8}, 8),
        ({"MAX_CONCURRENT_REQUESTS": "many"}, {"max_concurrent_requests": 8}, 8),
        ({"PORT": "abc"}, {}, 4096),
        ({"PORT": "99999", "HOSTNAME": "my host", "MODEL_ID": "another", "JSON_OUTPUT": "maybe"}, {}, 4096),
        ({"API_KEY": "\n"}, {}, 4096),
        ({"AIP_HTTP_PORT": "abc", "AIP_MODE": "PREDICTION"}, {}, 4096),
        ({"SM_NUM_GPUS": "1", "SAGEMAKER_BIND_TO_PORT": "http"}, {}, 4096),
        ({"ENV": "production"}, {}, 4096),
    ],
)
def test_variables_that_are_another_servers_do_not_count(
    variables: dict[str, str], options: dict[str, object], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    args = parse_args(command_line("model", options), environment())
    assert args.model_id == "model" and args.is_json_output and "api_key" not in args.server
    assert args.server["max_concurrent_requests"] == limit


def test_requests_whose_answers_close_the_connection_are_broken_off(tmp_path: Path) -> None:
    path, calls = str(tmp_path / "socket"), Calls()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with calls._connection(path) as connection:
            connection.close()  # as when such an answer has begun
            calls.break_off()
    with pytest.raises(ConnectionError, match="broken off"):
        calls.get(path, "/")


def test_the_servers_folder_goes_with_it_and_no_other_folder_does(tmp_path: Path) -> None:
    for name in ("mine", "shared"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "socket").touch()
    (tmp_path / "shared" / "other").touch()
    for _ in range(2):
        remove_socket(str(tmp_path / "mine" / "socket"))
        remove_socket(str(tmp_path / "shared" / "socket"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other", "shared"]
