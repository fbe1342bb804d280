"""A model on two hosts, from outside: the same tokens, a link that is cut, a host that goes, and orderly ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.diagonal import long_but
from tests.e2e.launched import launched, read_streams
from tests.e2e.namespaces import Hosts, HostServer, launched_on, two_hosts, why_not
from tests.e2e.test_shards import END_S, LONG, PROMPTS, errors, plain_ids, streamed_ids
from tests.tiny_model import write_tiny_qwen2

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

FLAGS = ("--num-shard", "2", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts") / "model"
    write_tiny_qwen2(folder, is_tied=False, max_position_embeddings=32_768)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The answer of one process to each prompt alone."""
    with launched(model, tmp_path_factory.mktemp("logs"), "--dtype", "float32") as server:
        return [plain_ids(server, prompt) for prompt in PROMPTS]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as hosts:
        yield hosts


@contextlib.contextmanager
def served(hosts: Hosts, model: Path, log_dir: Path, *flags: str) -> Iterator[tuple[HostServer, HostServer]]:
    """Launchers on both hosts, ready."""
    flags = flags or FLAGS
    with (
        launched_on(hosts, 0, model, log_dir, *flags) as first,
        launched_on(hosts, 1, model, log_dir, *flags) as second,
    ):
        first.wait_for_log("Connected")
        yield first, second


Lasting = tuple[Hosts, HostServer, HostServer]
"""Hosts and the launcher on each."""


@pytest.fixture(scope="module")
def lasting(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lasting]:
    """A shard on each of two hosts, which every test leaves running."""
    log_dir = tmp_path_factory.mktemp("lasting")
    with two_hosts() as hosts, served(hosts, model, log_dir, *FLAGS, "--shard-timeout", "3") as (first, second):
        yield hosts, first, second


def test_two_hosts_give_the_ids_of_one_process(lasting: Lasting, expected: list[list[int]]) -> None:
    """A shard on each; `tests/slow` has two on each."""
    hosts, first, _ = lasting
    check_ids(hosts, first, expected, 2)


def check_ids(hosts: Hosts, first: HostServer, expected: list[list[int]], num_shards: int) -> None:
    """So many shards, half of them on each host, give the ids of one process, one by one and all at once."""
    with hosts.clients(len(PROMPTS)) as pool:
        assert f"{num_shards} shards on 2 hosts, collectives through gloo" in first.log
        assert [pool.submit(plain_ids, first, prompt).result() for prompt in PROMPTS] == expected
        assert list(pool.map(lambda prompt: streamed_ids(first, prompt), PROMPTS)) == expected


def test_nobody_listens_but_on_the_address_given_and_within_a_host(lasting: Lasting) -> None:
    hosts, first, _ = lasting
    with hosts.clients(1) as pool:
        assert pool.submit(plain_ids, first, PROMPTS[0]).result()
        assert hosts.listening(0) - {"127.0.0.1"} == {"10.77.0.1"}
        assert hosts.listening(1) <= {"127.0.0.1", "10.77.0.2"}


@pytest.mark.long
def test_idle_hosts_never_time_out(lasting: Lasting, expected: list[list[int]]) -> None:
    hosts, first, second = lasting
    with hosts.clients(1) as pool:
        assert pool.submit(plain_ids, first, PROMPTS[0]).result() == expected[0]
        time.sleep(3 * 3)
        assert pool.submit(plain_ids, first, PROMPTS[1]).result() == expected[1]
        assert not errors(first.log) and not errors(second.log)


def test_the_second_host_may_be_first(hosts: Hosts, model: Path, tmp_path: Path, expected: list[list[int]]) -> None:
    with launched_on(hosts, 1, model, tmp_path, *FLAGS) as second:
        second.wait_for_log("Waiting for rank 0 at 10.77.0.1:29500")
        with launched_on(hosts, 0, model, tmp_path, *FLAGS) as first, hosts.clients(1) as pool:
            first.wait_for_log("Connected")
            assert pool.submit(plain_ids, first, PROMPTS[0]).result() == expected[0]


CUTS: dict[str, Callable[[Hosts], None]] = {
    "first host's interface down": lambda hosts: hosts.take_down(0),
    "second host's interface down": lambda hosts: hosts.take_down(1),
    "silent": lambda hosts: hosts.cut_in_silence(),
}


@pytest.mark.parametrize(
    ("cut", "is_busy"),
    [pytest.param("second host's interface down", False, marks=pytest.mark.long), ("silent", True)],
)
def test_a_cut_link_ends_both_hosts(hosts: Hosts, model: Path, tmp_path: Path, cut: str, is_busy: bool) -> None:
    """A host's own interface, or the way between both; `tests/slow` has the other host's."""
    check_cut(hosts, model, tmp_path, cut, is_busy)


def check_cut(hosts: Hosts, model: Path, log_dir: Path, cut: str, is_busy: bool) -> None:
    """Both hosts end with the cause when they can't reach each other any more."""
    with served(hosts, model, log_dir) as (first, second), hosts.clients(2) as pool:
        futures = read_streams(first, 2, pool, LONG) if is_busy else []
        CUTS[cut](hosts)
        cut_s = time.monotonic()
        assert first.wait_for_end(END_S) == 1
        assert second.wait_for_end(max(0.1, cut_s + END_S - time.monotonic())) == 1
        for log, lost in ((first.log, "rank 1 on 10.77.0.2"), (second.log, "rank 0 on 10.77.0.1")):
            (cause,) = (line for line in errors(log) if "Lost another rank" in line)
            assert f"{lost} can't be reached any more" in cause
            assert "which and why is above" in log.splitlines()[-1]
            assert "Traceback" not in log
        for future in futures:
            assert future.result()[-1]["error_type"] == "generation"


@pytest.mark.parametrize("rank", long_but([0, 1], 0))
def test_a_killed_rank_ends_both_hosts(hosts: Hosts, model: Path, tmp_path: Path, rank: int) -> None:
    """By default rank 1 goes with its launcher."""
    with served(hosts, model, tmp_path) as servers, hosts.clients(1) as pool:
        (future,) = read_streams(servers[0], 1, pool, LONG)
        servers[rank].rank(rank).kill()
        killed = time.monotonic()
        for server in servers:
            assert server.wait_for_end(max(0.1, killed + END_S - time.monotonic())) == 1
        assert f"engine rank {rank} was killed by SIGKILL" in servers[rank].log.splitlines()[-1]
        other = servers[1 - rank].log
        assert f"Lost another rank: rank {rank} on 10.77.0.{rank + 1} is gone: its own log may say why" in other
        assert f"engine rank {1 - rank} has lost another rank" in other.splitlines()[-1]
        assert future.result()[-1]["error_type"] == "generation"


def test_a_killed_launcher_of_the_second_host_ends_the_first(hosts: Hosts, model: Path, tmp_path: Path) -> None:
    with served(hosts, model, tmp_path) as (first, second), hosts.clients(1) as pool:
        (future,) = read_streams(first, 1, pool, LONG)
        second.launcher.kill()
        assert first.wait_for_end(END_S) == 1
        assert "rank 1 on 10.77.0.2 is gone" in first.log
        assert future.result()[-1]["error_type"] == "generation"


def test_a_rank_of_the_other_host_that_hangs_is_named(hosts: Hosts, model: Path, tmp_path: Path) -> None:
    with (
        served(hosts, model, tmp_path, *FLAGS, "--shard-timeout", "3") as (first, second),
        hosts.clients(1) as pool,
    ):
        (future,) = read_streams(first, 1, pool, LONG)
        second.rank(1).suspend()
        stopped = time.monotonic()
        assert first.wait_for_end(3 + 7) == 1
        assert time.monotonic() - stopped >= 3
        assert "Lost another rank: rank 1 on 10.77.0.2 hangs: nothing was heard of it for 3 s" in first.log
        assert future.result()[-1]["error_type"] == "generation"


def test_sigterm_of_the_first_host_drains_and_ends_both(hosts: Hosts, model: Path, tmp_path: Path) -> None:
    with served(hosts, model, tmp_path) as (first, second), hosts.clients(2) as pool:
        futures = read_streams(first, 2, pool, 200)
        first.terminate()
        for future in futures:
            assert future.result()[-1]["details"]["generated_tokens"] == 200
        assert first.wait_for_end() == 0
        assert second.wait_for_end(END_S) == 0
        assert not errors(first.log) and not errors(second.log)
        assert "The first host has ended the service" in second.log


@pytest.mark.long
def test_sigterm_of_both_hosts_drains(hosts: Hosts, model: Path, tmp_path: Path) -> None:
    """A scheduler signals both hosts when it ends a job. The second host lets the first one end its requests."""
    with served(hosts, model, tmp_path) as (first, second), hosts.clients(1) as pool:
        (future,) = read_streams(first, 1, pool, 400)
        second.terminate()
        time.sleep(0.3)
        first.terminate()
        assert future.result()[-1]["details"]["generated_tokens"] == 400
        assert first.wait_for_end() == 0
        assert second.wait_for_end(END_S) == 0
        assert not errors(first.log) and not errors(second.log)


def test_sigterm_ends_a_second_host_that_waits_for_the_first(hosts: Hosts, model: Path, tmp_path: Path) -> None:
    with launched_on(hosts, 1, model, tmp_path, *FLAGS) as second:
        second.wait_for_log("Starting shard")
        time.sleep(3)
        assert second.process.poll() is None
        processes = second.launcher.children(recursive=True)
        second.terminate()
        assert second.wait_for_end(END_S) == 0
        assert not psutil.wait_procs(processes, timeout=1)[1]
        assert not errors(second.log)


def test_other_flags_on_the_other_host_are_refused_on_both(hosts: Hosts, model: Path, tmp_path: Path) -> None:
    with (
        launched_on(hosts, 0, model, tmp_path, "--num-shard", "2", "--dtype", "float32") as first,
        launched_on(hosts, 1, model, tmp_path, "--num-shard", "2", "--dtype", "bfloat16") as second,
    ):
        for server in (first, second):
            assert server.wait_for_end() == 1
            told = [line for line in errors(server.log) if "dtype" in line]
            assert len(told) == 1, server.log
            assert told[0].endswith(
                "rank 1 was started with dtype 'bfloat16', rank 0 with 'float32': "
                "start every host with the same flags, model and version"
            )
            assert "ShardCannotStart" in server.log.splitlines()[-1]
            assert "Traceback" not in server.log
