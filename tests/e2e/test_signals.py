"""Signals, the drain and its limit, admission, and what the log says of it: from outside, under load."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.diagonal import long_but
from tests.e2e.launched import START_TIMEOUT_S, LaunchedServer, free_port, launched, read_streams


@pytest.mark.parametrize("number", long_but([signal.SIGTERM, signal.SIGINT, signal.SIGHUP], signal.SIGINT))
def test_8_running_streams_end_properly_after_a_signal(tiny_model_dir: Path, tmp_path: Path, number: int) -> None:
    with launched(tiny_model_dir, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        futures = read_streams(server, 8, pool, 400)
        server.process.send_signal(number)
        for future in futures:
            assert future.result()[-1]["details"]["finish_reason"] in ("length", "eos_token")
        assert server.wait_for_end() == 0
        for text in ("Terminating webserver", "webserver terminated", "Shutting down shards"):
            assert text in server.log


def test_a_signal_to_every_process_drains_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Send a signal to every process of the group, as a service manager does."""
    with launched(tiny_model_dir, tmp_path) as server, ThreadPoolExecutor(8) as pool:
        futures = read_streams(server, 8, pool, 400)
        for process in [server.child("engine"), server.child("server"), server.process]:
            process.send_signal(signal.SIGTERM)
        for future in futures:
            assert future.result()[-1]["details"]["finish_reason"] in ("length", "eos_token")
        assert server.wait_for_end() == 0


def test_nobody_new_is_let_in_while_streams_end(small_demo_model: Path, tmp_path: Path) -> None:
    with launched(small_demo_model, tmp_path) as server, ThreadPoolExecutor(1) as pool:
        (future,) = read_streams(server, 1, pool, 100)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("Waiting for webserver")
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        assert future.result()[-1]["details"]["generated_tokens"] == 100
        assert server.wait_for_end() == 0


def test_streams_that_outlast_the_drain_end_with_an_error_event(small_demo_model: Path, tmp_path: Path) -> None:
    flags = ("--graceful-termination-timeout", "1")
    with launched(small_demo_model, tmp_path, *flags) as server, ThreadPoolExecutor(8) as pool:
        futures = read_streams(server, 8, pool, 1000)
        signalled = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for future in futures:
            last = future.result()[-1]
            assert (last["error_type"], last["error"]) == (
                "generation",
                "Request failed during generation: Server error: the server is stopping",
            )
        assert server.wait_for_end() == 0
        assert time.monotonic() - signalled < 8


def test_a_second_signal_ends_at_once(small_demo_model: Path, tmp_path: Path) -> None:
    with launched(small_demo_model, tmp_path) as server, ThreadPoolExecutor(2) as pool:
        futures = read_streams(server, 2, pool, 1000)
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("Waiting for webserver")
        time.sleep(0.6)  # two signals at one moment are one
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_for_end(3) == 0
        assert not psutil.wait_procs(children, timeout=1)[1]
        for future in futures:
            assert future.exception() is None or isinstance(future.exception(), httpx.HTTPError)


def test_a_stopped_engine_is_detected_and_everything_ends(tiny_model_dir: Path, tmp_path: Path) -> None:
    with launched(tiny_model_dir, tmp_path) as server, ThreadPoolExecutor(2) as pool:
        children = psutil.Process(server.process.pid).children(recursive=True)
        futures = read_streams(server, 2, pool, 450)
        server.child("engine").suspend()
        stopped = time.monotonic()
        assert server.wait_for_end(30) == 1
        assert time.monotonic() - stopped < 30
        assert not psutil.wait_procs(children, timeout=1)[1]
        assert "the engine hangs: nothing was heard of it for 20 s" in server.log
        assert "ShardFailed: engine rank 0 hangs and was killed" in server.log.splitlines()[-1]
        for future in futures:
            last = future.result()[-1]
            assert "error" in last or "details" in last, "it had ended before the engine was stopped"


def test_json_lines_without_prompts_and_without_the_key(tiny_model_dir: Path, tmp_path: Path) -> None:
    key, prompt = "k3y-k3y-k3y", "a very private prompt"
    environ = {"API_KEY": key, "HF_TOKEN": "hf_t0ken"}
    with launched(tiny_model_dir, tmp_path, "--json-output", "--trust-remote-code", environ=environ) as server:
        body = {"inputs": prompt, "parameters": {"max_new_tokens": 5, "do_sample": True, "seed": 7}}
        assert httpx.post(f"{server.url}/generate", json=body).status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.post(f"{server.url}/generate", json=body, headers=headers).status_code == 200
        bad = {"inputs": prompt, "parameters": {"top_k": 0}}
        assert httpx.post(f"{server.url}/generate", json=bad, headers=headers).status_code == 422
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_for_end() == 0
        lines = [json.loads(line) for line in server.log.splitlines()]
        for secret in (key, prompt, "hf_t0ken"):
            assert secret not in server.log
    for line in lines:
        assert {"timestamp", "level", "message", "target", "filename", "line_number"} <= set(line)
    by_message = {line["message"]: line for line in lines}
    span = by_message["Success"]["span"]
    assert span["seed"] == "Some(7)" and span["total_time"].endswith("s")
    assert by_message["`top_k` must be strictly positive"]["level"] == "WARN"
    (warning,) = (line for line in lines if line["message"].startswith("--trust-remote-code has no effect"))
    assert warning["level"] == "WARN"
    assert by_message["Connected"]["level"] == "INFO"


def test_debug_shows_nothing_of_the_libraries_and_error_is_quiet(tiny_model_dir: Path, tmp_path: Path) -> None:
    read: Callable[[str], str] = lambda level: _log_of_a_short_life(tiny_model_dir, tmp_path, level)  # noqa: E731
    assert "numba" not in read("debug")
    assert read("error").strip() == ""


def _log_of_a_short_life(model: Path, log_dir: Path, level: str) -> str:
    with launched(model, log_dir, environ={"LOG_LEVEL": level}, is_awaited=False) as server:
        wait_until_served(server.port)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_for_end() == 0
        return server.log


def test_a_late_body_is_served_while_every_process_drains(tiny_model_dir: Path, tmp_path: Path) -> None:
    """As a service manager signals them; an idle engine must not leave before the request has reached it."""
    body = json.dumps({"inputs": "hello", "parameters": {"max_new_tokens": 3}}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with launched(tiny_model_dir, tmp_path) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + body[:-5])
        time.sleep(0.5)
        for process in [server.child("engine"), server.child("server"), server.process]:
            process.send_signal(signal.SIGTERM)
        time.sleep(2)
        client.sendall(body[-5:])
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert server.wait_for_end() == 0


def test_a_log_that_nobody_reads_stops_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [
        sys.executable,
        "-P",
        "-m",
        "server.launcher",
        "--model-id",
        str(tiny_model_dir),
        "--port",
        str(port),
    ]
    reader, writer = os.pipe()
    process = subprocess.Popen(command, stderr=writer)
    try:
        server = LaunchedServer(process, port, tmp_path / "none")
        wait_until_served(port)
        children = psutil.Process(process.pid).children(recursive=True)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        for _ in range(3):
            assert server.generate("hello", max_new_tokens=2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert not psutil.wait_procs(children, timeout=1)[1]
    finally:
        process.kill()
        process.wait()
        os.close(reader)
        os.close(writer)


def wait_until_served(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_closed_standard_streams_are_no_obstacle(tiny_model_dir: Path) -> None:
    """All three; `tests/slow` closes each alone."""
    check_closed_streams("<&- >&- 2>&-", tiny_model_dir)


def check_closed_streams(redirection: str, model: Path) -> None:
    """A server that a shell starts with this redirection serves, and no process has a socket for a standard stream."""
    port = free_port()
    command = [
        sys.executable,
        "-P",
        "-m",
        "server.launcher",
        "--model-id",
        str(model),
        "--port",
        str(port),
    ]
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {redirection}', "sh", *command], stderr=subprocess.DEVNULL)
    try:
        wait_until_served(port)
        for child in psutil.Process(process.pid).children(recursive=True):
            for number in ("0", "1", "2"):
                target = os.readlink(f"/proc/{child.pid}/fd/{number}")
                assert target.startswith(("/dev/", "pipe:", "/")), f"descriptor {number} is {target}"
    finally:
        process.terminate()
        assert process.wait(30) == 0


@pytest.mark.long
def test_an_engine_stopped_while_it_loads_is_detected(tiny_model_dir: Path, tmp_path: Path) -> None:
    with launched(tiny_model_dir, tmp_path, is_awaited=False) as server:
        children = server.wait_for_ranks()
        server.child("engine").suspend()
        assert server.wait_for_end(35) == 1
        assert not psutil.wait_procs(children, timeout=1)[1]
        assert "engine rank 0 has been stopped (SIGSTOP) for 25 s: killing it" in server.log


def test_a_stopped_engine_goes_with_a_killed_launcher(tiny_model_dir: Path, tmp_path: Path) -> None:
    with launched(tiny_model_dir, tmp_path) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.child("engine").suspend()
        server.process.kill()
        assert not psutil.wait_procs(children, timeout=10)[1]


def test_two_kinds_of_signals_at_one_moment_are_one_wish(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A closing terminal, or a service manager that sends SIGHUP as well."""
    with launched(tiny_model_dir, tmp_path) as server, ThreadPoolExecutor(1) as pool:
        (future,) = read_streams(server, 1, pool, 400)
        server.process.send_signal(signal.SIGHUP)
        server.process.send_signal(signal.SIGTERM)
        assert future.result()[-1]["details"]["finish_reason"] in ("length", "eos_token")
        assert server.wait_for_end() == 0
