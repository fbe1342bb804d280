"""Every process killed with SIGKILL under load, many times, at random moments: nothing hangs, nothing is left."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.launched import LaunchedServer, launched

NUM_KILLS = 30
NUM_RANK_KILLS = 10
"""Kills of each rank."""
NUM_CLIENTS = 6
DEADLINE_S = 10.0
SEED = 3
CAUSES = {"engine": "engine rank 0 was killed by SIGKILL", "server": "webserver was killed by SIGKILL"}


@contextlib.contextmanager
def load(server: LaunchedServer) -> Iterator[None]:
    """Clients that stream one request after the other until the server is gone; none of them may be left waiting."""

    def work(index: int) -> None:
        with contextlib.suppress(httpx.HTTPError):
            while True:
                for _ in server.stream(f"client {index}", max_new_tokens=300):
                    pass

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads), "a client waits for ever"


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").iterdir())


def wait_until_gone(processes: list[psutil.Process], since: float) -> None:
    alive = psutil.wait_procs(processes, timeout=max(0.0, since + DEADLINE_S - time.monotonic()))[1]
    assert not alive, f"alive after {DEADLINE_S} s: {alive}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("victim", ["engine", "server", "launcher"])
def test_kills_at_random_moments(victim: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    before = shared_memory()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    longest_s = 0.0
    for _ in range(NUM_KILLS):
        with launched(tiny_model_dir, tmp_path, environ={"TMPDIR": str(temporary)}) as server:
            processes = psutil.Process(server.process.pid).children(recursive=True)
            assert len(processes) == 2
            with load(server):
                time.sleep(chance.uniform(0.0, 1.0))
                killed = time.monotonic()
                if victim == "launcher":
                    server.process.kill()
                else:
                    server.child(victim).kill()
                code = server.wait_for_end(DEADLINE_S)
                wait_until_gone(processes, killed)
                longest_s = max(longest_s, time.monotonic() - killed)
            if victim != "launcher":
                assert code == 1
                assert CAUSES[victim] in server.log.splitlines()[-1]
    assert not list(temporary.iterdir()), "a socket or another file is left"
    assert shared_memory() <= before
    print(f"{NUM_KILLS} kills of the {victim}: all gone after {longest_s:.1f} s at most")


@pytest.mark.timeout(1200)
def test_kills_of_ranks_and_others_at_random_moments(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Two shards: half of the kills hit a rank, the others the webserver or the launcher."""
    chance = random.Random(SEED)
    before = shared_memory()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    victims = [*["rank 0", "rank 1"] * NUM_RANK_KILLS, *["server", "launcher"] * (NUM_RANK_KILLS // 2)]
    chance.shuffle(victims)
    longest_s = dict.fromkeys(victims, 0.0)
    for victim in victims:
        with launched(tiny_model_dir, tmp_path, "--num-shard", "2", environ={"TMPDIR": str(temporary)}) as server:
            processes = psutil.Process(server.process.pid).children(recursive=True)
            assert len(processes) == 3
            with load(server):
                time.sleep(chance.uniform(0.0, 1.0))
                killed = time.monotonic()
                kill(server, victim)
                code = server.wait_for_end(DEADLINE_S)
                wait_until_gone(processes, killed)
                longest_s[victim] = max(longest_s[victim], time.monotonic() - killed)
            if victim != "launcher":
                name = "webserver" if victim == "server" else f"engine {victim}"
                assert code == 1
                assert f"{name} was killed by SIGKILL" in server.log.splitlines()[-1]
            assert "Traceback" not in server.log
    assert not list(temporary.iterdir()), "a socket or another file is left"
    assert shared_memory() <= before
    print(
        f"{len(victims)} kills: all gone after", {victim: f"{seconds:.1f} s" for victim, seconds in longest_s.items()}
    )


def kill(server: LaunchedServer, victim: str) -> None:
    if victim == "launcher":
        server.process.kill()
    elif victim == "server":
        server.child(victim).kill()
    else:
        server.rank(int(victim.removeprefix("rank "))).kill()


@pytest.mark.timeout(600)
def test_kills_of_ranks_while_starting(tiny_model_dir: Path, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for rank in [0, 1] * (NUM_RANK_KILLS // 2):
        with launched(tiny_model_dir, tmp_path, "--num-shard", "2", is_awaited=False) as server:
            processes = server.wait_for_ranks(2)
            time.sleep(chance.uniform(0.0, 3.0))
            killed = time.monotonic()
            server.rank(rank).kill()
            assert server.wait_for_end(DEADLINE_S) == 1
            wait_until_gone(processes, killed)
            assert f"engine rank {rank} was killed by SIGKILL" in server.log.splitlines()[-1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["engine", "server", "launcher"])
def test_kills_while_starting(victim: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for _ in range(10):
        with launched(tiny_model_dir, tmp_path, is_awaited=False) as server:
            processes = server.wait_for_ranks()
            time.sleep(chance.uniform(0.0, 2.0))
            killed = time.monotonic()
            if victim == "launcher":
                server.process.kill()
            else:
                os.kill(server.child(victim).pid, 9)
            code = server.wait_for_end(DEADLINE_S)
            wait_until_gone(processes, killed)
            if victim != "launcher":
                assert code == 1
                assert CAUSES[victim] in server.log.splitlines()[-1]
