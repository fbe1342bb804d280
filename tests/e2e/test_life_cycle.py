"""Start, readiness, drain, and every way a process can die: seen from outside, on a tiny model."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.launched import LaunchedServer, free_port, launched

LONG = {"max_new_tokens": 450}


@pytest.fixture
def server(tiny_model_dir: Path, tmp_path: Path) -> Iterator[LaunchedServer]:
    """A server for a test that ends it."""
    with launched(tiny_model_dir, tmp_path) as server:
        yield server


@pytest.fixture(scope="module")
def lasting_server(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    """A server that every test leaves running."""
    with launched(tiny_model_dir, tmp_path_factory.mktemp("logs")) as server:
        yield server


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return psutil.wait_procs(processes, timeout=10)[1]


def children_of(server: LaunchedServer) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def test_ready_line_means_ready(lasting_server: LaunchedServer) -> None:
    response = httpx.get(f"{lasting_server.url}/health")
    assert (response.status_code, response.content) == (200, b"")
    assert httpx.get(f"{lasting_server.url}/info").json()["max_input_tokens"] > 0


def test_the_http_process_has_no_libtorch_and_is_small(lasting_server: LaunchedServer) -> None:
    body = {"model": "", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    assert httpx.post(f"{lasting_server.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
    process = lasting_server.child("server")
    assert not [path for path in process.memory_maps() if "torch" in path.path]
    assert process.memory_info().rss < 300e6


def test_port_of_strict_tgi_is_closed_until_ready(tiny_model_dir: Path, tmp_path: Path) -> None:
    with launched(tiny_model_dir, tmp_path, "--strict-tgi", is_awaited=False) as server:
        server.wait_for_log("Starting shard")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
        server.wait_for_log("Connected")


def test_busy_port_ends_the_start_before_the_model_loads(tiny_model_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with launched(tiny_model_dir, tmp_path, port=busy.getsockname()[1], is_awaited=False) as server:
            assert server.wait_for_end() == 1
            assert "give another --port" in server.log
            assert "Warming up" not in server.log


def test_two_launchers_on_one_port_do_not_both_connect(tiny_model_dir: Path, tmp_path: Path) -> None:
    with launched(tiny_model_dir, tmp_path, is_awaited=False) as first:
        with launched(tiny_model_dir, tmp_path, port=first.port, is_awaited=False) as second:
            codes = [server.process.wait(60) for server in (first, second) if not is_connected(server)]
        assert codes == [1]


def is_connected(server: LaunchedServer) -> bool:
    while "Connected" not in server.log and server.process.poll() is None:
        time.sleep(0.05)
    return "Connected" in server.log


def test_a_refused_start_names_its_cause_last(tiny_model_dir: Path, tmp_path: Path) -> None:
    with launched(tiny_model_dir, tmp_path, "--max-total-tokens", "99999", is_awaited=False) as server:
        assert server.wait_for_end() == 1
        assert "lower --max-total-tokens to" in server.log
        last = server.log.splitlines()[-1]
        assert last.endswith("ShardCannotStart: engine rank 0 ended with exit code 5; its messages are above")


def test_code_where_it_is_started_is_not_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("server", "engine", "torch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('somebody else')")
    with launched(tiny_model_dir, tmp_path, directory=tmp_path) as server:
        assert server.generate("hello", max_new_tokens=2)
        assert "somebody else" not in server.log


def test_sigterm_lets_a_running_stream_end_and_exits_with_0(server: LaunchedServer) -> None:
    """An open dashboard, whose stream has no end, does not hold that up."""
    with httpx.stream("GET", f"{server.url}/dashboard/events", timeout=60) as dashboard:
        events = server.stream("hello", max_new_tokens=400, details=True)
        next(events)
        server.process.send_signal(signal.SIGTERM)
        *_, last = events
        assert last["details"]["generated_tokens"] == 400
        dashboard.read()
    assert server.wait_for_end() == 0


def test_sigterm_while_loading_exits_with_0(tiny_model_dir: Path, tmp_path: Path) -> None:
    with launched(tiny_model_dir, tmp_path, is_awaited=False) as server:
        server.wait_for_log("Starting")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_for_end() == 0


def test_a_dead_webserver_ends_everything_with_the_cause(server: LaunchedServer) -> None:
    children = children_of(server)
    server.child("server").kill()
    assert server.wait_for_end() == 1
    assert not alive(children)
    assert "webserver was killed by SIGKILL" in server.log


def test_a_dead_engine_ends_open_streams_with_an_error_event_and_all_with_the_cause(server: LaunchedServer) -> None:
    children = children_of(server)
    events = server.stream("hello", **LONG)
    next(events)
    server.child("engine").kill()
    *_, last = events
    assert last["error_type"] == "generation"
    assert server.wait_for_end() == 1
    assert not alive(children)
    assert "engine rank 0 was killed by SIGKILL" in server.log


@pytest.mark.long
def test_children_of_a_killed_launcher_go_within_10_s(server: LaunchedServer) -> None:
    """By default those of two shards go, and a stopped engine does."""
    children = children_of(server)
    assert len(children) == 2
    server.process.kill()
    assert not alive(children)


def test_a_bad_model_type_is_one_sentence_and_exit_1(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "llama"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with launched(model, tmp_path, is_awaited=False) as server:
        assert server.wait_for_end() == 1
        assert "model_type 'llama' is not supported; supported: qwen2, qwen2_moe, qwen3, qwen3_moe" in server.log
        assert "Traceback" not in server.log


def test_what_is_neither_folder_nor_id_is_refused(tmp_path: Path) -> None:
    environ = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    for model, text in (("no/such/folder", "neither a folder nor"), ("Qwen/Nothing", "not in the cache")):
        with launched(model, tmp_path, is_awaited=False, environ=environ) as server:
            assert server.wait_for_end() == 1
            assert text in server.log


def test_a_cached_snapshot_is_served_without_any_network_call(tiny_model_dir: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--Tiny--Qwen2"
    shutil.copytree(tiny_model_dir, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    flags = ("--huggingface-hub-cache", str(tmp_path / "hub"))
    environ = {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}  # nobody is there
    with launched("Tiny/Qwen2", tmp_path, *flags, environ=environ) as server:
        info = httpx.get(f"{server.url}/info").json()
        assert (info["model_id"], info["model_sha"]) == ("Tiny/Qwen2", commit)
        assert "Skipping download" in server.log


def test_200_requests_half_of_them_dropped_leave_no_block_behind(lasting_server: LaunchedServer) -> None:
    def request(index: int) -> None:
        events = lasting_server.stream(f"request number {index}", max_new_tokens=32)
        for position, _ in enumerate(events):
            if index % 2 and position == 10:
                events.close()  # type: ignore[attr-defined]
                return

    for _ in range(2):
        threads = [threading.Thread(target=request, args=(index,)) for index in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    time.sleep(2)
    metrics = lasting_server.metrics()
    assert metrics["pytgi_kv_blocks_used"] == 0
    assert metrics["tgi_queue_size"] == metrics["tgi_batch_current_size"] == 0


def test_the_launcher_runs_as_a_console_script() -> None:
    script = Path(sys.executable).parent / "text-generation-launcher"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "--max-batch-prefill-tokens" in done.stdout
