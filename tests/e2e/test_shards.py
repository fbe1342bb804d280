"""A model on several processes of one host: the same tokens, and every way one of them can fail, from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.diagonal import long_but
from tests.e2e.launched import LaunchedServer, free_port, launched, read_streams
from tests.tiny_model import write_tiny_qwen2

TWO = ("--num-shard", "2", "--dtype", "float32")
PROMPTS = [f"{number} is a number, and so is {number + 1}" for number in range(8)]
NUM_TOKENS = 60
LONG = 12_000
"""Tokens of a stream that is still running when something happens to it."""
END_S = 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose window a stream doesn't fill in a moment, and whose head is its own, so that tokens differ."""
    folder = tmp_path_factory.mktemp("shards") / "model"
    write_tiny_qwen2(folder, is_tied=False, max_position_embeddings=32_768)
    return folder


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def expected(model: Path, log_dir: Path) -> list[list[int]]:
    """The answer of one process to each prompt alone."""
    with launched(model, log_dir, "--dtype", "float32") as server:
        ids = [plain_ids(server, prompt) for prompt in PROMPTS]
    assert all(len(set(of_prompt)) > 5 for of_prompt in ids), "a token that repeats proves little"
    return ids


def plain_ids(server: LaunchedServer, prompt: str) -> list[int]:
    tokens = server.generate(prompt, max_new_tokens=NUM_TOKENS)["details"]["tokens"]
    return [token["id"] for token in tokens]


def streamed_ids(server: LaunchedServer, prompt: str) -> list[int]:
    return [event["token"]["id"] for event in server.stream(prompt, max_new_tokens=NUM_TOKENS)]


@pytest.fixture(scope="module")
def lasting_server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedServer]:
    """Two shards that every test leaves running."""
    with launched(model, tmp_path_factory.mktemp("lasting"), *TWO, "--shard-timeout", "3") as server:
        yield server


def processes_of(server: LaunchedServer) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def errors(log: str) -> list[str]:
    return [line for line in log.splitlines() if " ERROR " in line]


def shared_memory() -> set[Path]:
    """Files of shared memory but for the semaphores of `multiprocessing`: tests that run beside these have some."""
    return {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("sem.mp-")}


@pytest.fixture
def is_nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that uses this leaves no file where shared memory and sockets usually lie."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = shared_memory()
    yield
    assert not list(temporary.iterdir())
    assert not shared_memory() - before


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that the test starts see one GPU."""
    paths = [str(Path(__file__).parent / "one_gpu"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def test_two_shards_give_the_ids_of_one_process(lasting_server: LaunchedServer, expected: list[list[int]]) -> None:
    server = lasting_server
    assert "2 shards on 1 host, collectives through shared memory" in server.log
    assert [plain_ids(server, prompt) for prompt in PROMPTS] == expected
    assert [streamed_ids(server, prompt) for prompt in PROMPTS] == expected
    with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
        plain = pool.map(lambda prompt: plain_ids(server, prompt), PROMPTS)
        streamed = pool.map(lambda prompt: streamed_ids(server, prompt), PROMPTS)
        assert list(plain) == expected
        assert list(streamed) == expected
    assert server.metrics()["pytgi_kv_blocks_used"] == 0


def test_an_idle_server_never_times_out(lasting_server: LaunchedServer, expected: list[list[int]]) -> None:
    assert plain_ids(lasting_server, PROMPTS[0]) == expected[0]
    time.sleep(2 * 3 + 1)
    assert plain_ids(lasting_server, PROMPTS[1]) == expected[1]
    assert not errors(lasting_server.log)


def test_nobody_listens_but_on_the_hostname_once_the_ranks_have_met(model: Path, tmp_path: Path) -> None:
    with launched(model, tmp_path, *TWO, "--master-addr", "127.0.0.3", hostname="127.0.0.2") as server:
        assert server.generate("hello", max_new_tokens=2)
        assert listening(server.process.pid) == {("127.0.0.2", server.port)}


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses at which a process or one of its children could be reached."""
    root = psutil.Process(pid)
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in [root, *root.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.laddr and not connection.raddr
    }


def test_shards_that_differ_and_more_shards_than_kv_heads(
    model: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    """Three; `tests/slow` has four."""
    check_ids(model, tmp_path, expected, 3)


def check_ids(model: Path, log_dir: Path, expected: list[list[int]], num_shards: int) -> None:
    """So many shards on this host give the ids of one process, to one prompt alone and to all at once."""
    with (
        launched(model, log_dir, "--num-shard", str(num_shards), "--dtype", "float32") as server,
        ThreadPoolExecutor(len(PROMPTS)) as pool,
    ):
        assert streamed_ids(server, PROMPTS[0]) == expected[0]
        assert list(pool.map(lambda prompt: streamed_ids(server, prompt), PROMPTS)) == expected


@pytest.mark.usefixtures("is_nothing_left")
@pytest.mark.parametrize("rank", long_but([0, 1], 1))
def test_a_killed_rank_ends_everything_and_is_named(
    model: Path, tmp_path: Path, rank: int, lasting_server: LaunchedServer, expected: list[list[int]]
) -> None:
    """Another server on the same host goes on: two do not get in each other's way."""
    with launched(model, tmp_path, *TWO) as server, ThreadPoolExecutor(2) as pool:
        assert plain_ids(lasting_server, PROMPTS[0]) == plain_ids(server, PROMPTS[0]) == expected[0]
        processes = processes_of(server)
        assert len(processes) == 3
        futures = read_streams(server, 2, pool, LONG)
        server.rank(rank).kill()
        killed = time.monotonic()
        assert server.wait_for_end(END_S) == 1
        assert not psutil.wait_procs(processes, timeout=max(0.0, killed + END_S - time.monotonic()))[1]
        assert server.log.splitlines()[-1].endswith(
            f"ShardFailed: engine rank {rank} was killed by SIGKILL (the kernel does this when memory runs out)"
        )
        assert f"Shard {rank} crashed" in server.log
        assert f"Shard {1 - rank} crashed" not in server.log
        assert "Traceback" not in server.log
        for future in futures:
            assert future.result()[-1]["error_type"] == "generation"
        assert plain_ids(lasting_server, PROMPTS[1]) == expected[1]


@pytest.mark.usefixtures("is_nothing_left")
@pytest.mark.parametrize(
    ("rank", "is_busy"),
    [(0, False), pytest.param(0, True, marks=pytest.mark.long), pytest.param(1, False, marks=pytest.mark.long)],
)
def test_a_rank_that_hangs_ends_everything_and_is_named(model: Path, tmp_path: Path, rank: int, is_busy: bool) -> None:
    """Rank 0, idle; by default test_two_hosts.py has rank 1, busy, and `tests/slow` has it here."""
    check_hang(model, tmp_path, rank, is_busy)


def check_hang(model: Path, log_dir: Path, rank: int, is_busy: bool) -> None:
    """A rank that is stopped ends the server within seconds, and the log names it."""
    with launched(model, log_dir, *TWO, "--shard-timeout", "3") as server, ThreadPoolExecutor(1) as pool:
        processes = processes_of(server)
        futures = read_streams(server, 1, pool, LONG) if is_busy else []
        server.rank(rank).suspend()
        stopped = time.monotonic()
        assert server.wait_for_end(3 + END_S) == 1
        seconds = time.monotonic() - stopped
        assert 3 <= seconds < 3 + 7, f"after {seconds:.1f} s"
        assert not psutil.wait_procs(processes, timeout=1)[1]
        (cause,) = (line for line in errors(server.log) if "Lost another rank" in line)
        assert cause.endswith(f"rank {rank} on 127.0.0.1 hangs: nothing was heard of it for 3 s")
        assert server.log.splitlines()[-1].endswith(f"ShardFailed: engine rank {rank} hangs and was killed")
        assert "Traceback" not in server.log
        for future in futures:
            assert future.result()[-1]["error_type"] == "generation"


@pytest.mark.usefixtures("is_nothing_left")
def test_a_model_that_cannot_be_cut_is_one_sentence(model: Path, tmp_path: Path) -> None:
    with launched(model, tmp_path, "--num-shard", "5", is_awaited=False) as server:
        processes = processes_of(server)
        assert server.wait_for_end() == 1
        assert not psutil.wait_procs(processes, timeout=1)[1]
        assert len([line for line in server.log.splitlines() if "--num-shard" in line]) == 2, server.log
        told = [line for line in errors(server.log) if "--num-shard" in line]
        assert len(told) == 1 and "5" in told[0], server.log
        assert "Traceback" not in server.log
        assert told[0] == server.log.splitlines()[-1]
        assert "Starting shard" not in server.log, "no process starts for it"


def told_of_too_few_gpus(log: str) -> list[str]:
    return [line for line in errors(log) if "shard 1 of this host has no GPU, torch sees 1" in line]


@pytest.mark.usefixtures("one_gpu", "is_nothing_left")
def test_too_few_gpus_are_one_sentence(model: Path, tmp_path: Path) -> None:
    with launched(model, tmp_path, "--num-shard", "2", is_awaited=False) as server:
        processes = processes_of(server)
        assert server.wait_for_end(3 * END_S) == 1, "the ranks import torch first"
        assert not psutil.wait_procs(processes, timeout=1)[1]
        assert len(told_of_too_few_gpus(server.log)) == 1, server.log
        assert "another rank ended" not in server.log
        assert "Traceback" not in server.log


@pytest.mark.long
@pytest.mark.usefixtures("one_gpu")
def test_too_few_gpus_are_one_sentence_under_torchrun(model: Path, tmp_path: Path) -> None:
    process, server = under_torchrun(model, tmp_path / "log")
    processes: list[psutil.Process] = []
    try:
        server.wait_for_log("no GPU")
        processes = processes_of(server)
        assert server.wait_for_end(3 * END_S) == 1
        assert len(told_of_too_few_gpus(server.log)) == 1, server.log
        assert "another rank ended" not in server.log
    finally:
        end(process, processes)


def test_a_rank_killed_while_it_starts_is_named(model: Path, tmp_path: Path) -> None:
    with launched(model, tmp_path, *TWO, is_awaited=False) as server:
        processes = server.wait_for_ranks(2)
        server.rank(1).kill()
        assert server.wait_for_end(END_S) == 1
        assert not psutil.wait_procs(processes, timeout=1)[1]
        assert "engine rank 1 was killed by SIGKILL" in server.log.splitlines()[-1]


@pytest.mark.usefixtures("is_nothing_left")
def test_sigterm_lets_streams_end_on_all_shards(model: Path, tmp_path: Path) -> None:
    with launched(model, tmp_path, *TWO) as server, ThreadPoolExecutor(3) as pool:
        processes = processes_of(server)
        futures = read_streams(server, 3, pool, 400)
        server.process.send_signal(signal.SIGTERM)
        for future in futures:
            assert future.result()[-1]["details"]["generated_tokens"] == 400
        assert server.wait_for_end() == 0
        assert not psutil.wait_procs(processes, timeout=1)[1]
        assert not errors(server.log)
        for rank in (0, 1):
            assert f"engine rank {rank} terminated" in server.log


@pytest.mark.long
def test_a_signal_to_every_process_lets_streams_end_on_all_shards(model: Path, tmp_path: Path) -> None:
    """The signal goes to every process of the group, as from a service manager."""
    with launched(model, tmp_path, *TWO) as server, ThreadPoolExecutor(1) as pool:
        (future,) = read_streams(server, 1, pool, 1000)
        for process in [*processes_of(server), server.process]:
            process.send_signal(signal.SIGTERM)
        assert future.result()[-1]["details"]["generated_tokens"] == 1000
        assert server.wait_for_end() == 0
        assert not errors(server.log)


@pytest.mark.parametrize("text", ["Starting Webserver", "Warming up"])
def test_sigterm_while_shards_start_exits_with_0(model: Path, tmp_path: Path, text: str) -> None:
    with launched(model, tmp_path, *TWO, is_awaited=False) as server:
        server.wait_for_log(text)
        processes = processes_of(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_for_end(END_S) == 0
        assert not psutil.wait_procs(processes, timeout=1)[1]
        assert not errors(server.log)


def test_shards_go_with_a_killed_launcher(model: Path, tmp_path: Path) -> None:
    with launched(model, tmp_path, *TWO) as server:
        processes = processes_of(server)
        assert len(processes) == 3
        server.process.kill()
        assert not psutil.wait_procs(processes, timeout=END_S)[1]


def test_a_busy_meeting_port_ends_the_start_before_the_model_loads(model: Path, tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        with launched(model, tmp_path, *TWO, "--master-port", port, is_awaited=False) as server:
            assert server.wait_for_end() == 1
            assert "give another --master-port" in server.log.splitlines()[-1]
            assert "Starting" not in server.log


def under_torchrun(model: Path, log_path: Path) -> tuple[subprocess.Popen[bytes], LaunchedServer]:
    """A launcher for each of two ranks, by plain torchrun; the process is torchrun's own."""
    port = free_port()
    torchrun = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    launcher = ["-m", "server.launcher", "--model-id", str(model), "--port", str(port), "--hostname", "127.0.0.1"]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "torch.distributed.run", *torchrun, *launcher, "--dtype", "float32"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return process, LaunchedServer(process, port, log_path)


def launcher_of(agent: LaunchedServer, rank: int) -> psutil.Process:
    for process in psutil.Process(agent.process.pid).children():
        if process.environ().get("RANK") == str(rank):
            return process
    raise AssertionError(f"torchrun has no child of rank {rank}; log:\n{agent.log}")


def test_plain_torchrun_serves_and_ends(model: Path, tmp_path: Path, expected: list[list[int]]) -> None:
    process, server = under_torchrun(model, tmp_path / "log")
    processes: list[psutil.Process] = []
    try:
        server.wait_for_log("Connected")
        processes = processes_of(server)
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert list(pool.map(lambda prompt: plain_ids(server, prompt), PROMPTS)) == expected
        launcher_of(server, 0).send_signal(signal.SIGTERM)
        assert server.wait_for_end() == 0
        assert not psutil.wait_procs(processes, timeout=1)[1]
        assert not errors(server.log)
        assert "The first host has ended the service" in server.log
    finally:
        end(process, processes)


def end(process: subprocess.Popen[bytes], processes: list[psutil.Process]) -> None:
    survivors: list[Any] = [process, *processes]
    for survivor in survivors:
        if isinstance(survivor, psutil.Process) and not survivor.is_running():
            continue
        survivor.kill()
    process.wait()
