"""Ranks that find each other over loopback, and those who don't belong to them."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from parallel import greeting, world
from parallel.connect import make_collectives
from parallel.greeting import greet, send_line
from parallel.shared_memory import SharedMemoryCollectives
from parallel.state import RankLostError
from parallel.world import Rendezvous, RendezvousError, World, interface_of, listen_at, meet, read_line

ADDRESS = "127.0.0.1"
SECRET = "a secret"
ELSEWHERE = "127.0.0.2"
"""An address of this host other than 127.0.0.1."""


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "RETRY_S", 0.02)
    monkeypatch.setattr(world, "RENDEZVOUS_TIMEOUT_S", 20.0)
    monkeypatch.setattr(world, "RENDEZVOUS_LOG_S", 1.0)


class Ranks:
    """Threads that meet; a context manager that closes their connections."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._listener = listen_at(ADDRESS, 0)
        self.port: int = self._listener.getsockname()[1]
        self._pool = ThreadPoolExecutor(2 * size)
        self._futures: list[Future[Rendezvous]] = []

    def start(self, rank: int, secret: str = SECRET) -> Future[Rendezvous]:
        found = World(rank=rank, size=self._size, address=ADDRESS, port=self.port)
        future = self._pool.submit(meet, found, self._listener.detach() if rank == 0 else None, secret)
        self._futures.append(future)
        return future

    def meet(self) -> list[Rendezvous]:
        futures = [self.start(rank) for rank in range(self._size)]
        return [future.result(30) for future in futures]

    def exchange(self, all_rendezvous: list[Rendezvous], values: list[object]) -> list[list[object]]:
        return list(self._pool.map(lambda rendezvous, value: rendezvous.exchange(value), all_rendezvous, values))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()
        self._listener.close()
        for future in self._futures:
            if future.exception() is None:
                close(future.result())


def close(rendezvous: Rendezvous) -> None:
    for peer in rendezvous.peers:
        peer.control.close()
        peer.heartbeat.close()


@pytest.fixture
def three() -> Iterator[Ranks]:
    with Ranks(3) as ranks:
        yield ranks


@pytest.fixture
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def test_without_torchruns_variables_there_is_one_rank() -> None:
    assert World.from_environ({}) == World(rank=0, size=1, local_rank=0, local_size=1, address="127.0.0.1", port=0)
    assert World.from_environ({"OMP_PLACES": "cores"}).has_thread_places


def test_torchruns_variables() -> None:
    environ = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "HOME": "/root"}
    assert World.from_environ(environ) == World(rank=5, size=8, local_size=8, address="10.0.0.1", port=29500)
    environ |= {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert World.from_environ(environ) == World(
        rank=5, size=8, local_rank=1, local_size=4, address="10.0.0.1", port=29500, has_agent_store=True
    )


def test_everybody_is_connected_with_the_first(three: Ranks) -> None:
    all_rendezvous = three.meet()
    assert [[peer.rank for peer in rendezvous.peers] for rendezvous in all_rendezvous] == [[1, 2], [0], [0]]
    assert {peer.host for rendezvous in all_rendezvous for peer in rendezvous.peers} == {ADDRESS}
    for peer in all_rendezvous[0].peers:
        theirs = all_rendezvous[peer.rank].peers[0]
        theirs.control.send(f"control of {peer.rank}".encode())
        theirs.heartbeat.send(f"heartbeat of {peer.rank}".encode())
        assert peer.control.recv(100) == f"control of {peer.rank}".encode()
        assert peer.heartbeat.recv(100) == f"heartbeat of {peer.rank}".encode()


def test_the_store_opens_for_all_ranks_when_it_is_needed(three: Ranks) -> None:
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(Rendezvous.open_store, three.meet()))
    stores[1].set("key", "value")
    assert stores[2].get("key") == b"value"


def test_what_is_exchanged_is_in_the_order_of_the_ranks(three: Ranks) -> None:
    all_rendezvous = three.meet()
    values: list[object] = ["first", {"of": [2, None]}, 3.5]
    assert three.exchange(all_rendezvous, values) == [values] * 3
    assert three.exchange(all_rendezvous, [None, "ü\n", []]) == [[None, "ü\n", []]] * 3


def test_a_rank_that_ends_before_it_has_exchanged(two: Ranks) -> None:
    first, second = two.meet()
    close(second)
    with pytest.raises(RankLostError, match="another rank ended while they were starting"):
        first.exchange(None)


def test_a_line_is_read_and_nothing_more() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_line(theirs, ["a"])
        theirs.send(b"what follows")
        assert read_line(ours) == ["a"]
        assert ours.recv(100) == b"what follows"


def test_rank_0_listens_at_its_address_and_nowhere_else(two: Ranks) -> None:
    first = two.start(0)
    socket.create_connection((ADDRESS, two.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((ELSEWHERE, two.port))
    second = two.start(1)
    assert [first.result(30).peers[0].rank, second.result(30).peers[0].rank] == [1, 0]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((ADDRESS, two.port))  # all are there


def is_closed(sock: socket.socket) -> bool:
    """Whether the other end closes the connection without a word."""
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:  # something was left unread
        return True


def hello(**changes: object) -> bytes:
    return json.dumps({"rank": 1, "channel": "control", "nonce": "0", **changes}).encode() + b"\n"


@pytest.mark.parametrize(
    "nonsense",
    [
        b"",
        b"\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"\xff\xfe\x00\n",
        b"x" * 5000,
        b"[" * 1000 + b"\n",
        b"[]\n",
        b"{}\n",
        b'"hello"\n',
        hello(rank=None),
        hello(rank="1"),
        hello(rank=True),
        hello(nonce=None),
        hello(channel=None),
        hello(rank=1).replace(b"1", b"9" * 500) + b"\n",
        hello() + b'{"proof": "guessed"}\n',
        hello() + b'{"proof": null}\n',
        hello() + b'{"proof": "\xc3\xa9"}\n',
        hello() + hello(),
        hello() + b"\n",
    ],
    ids=range(20),
)
def test_strangers_are_ignored(nonsense: bytes, two: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    first = two.start(0)
    with socket.create_connection((ADDRESS, two.port)) as stranger:
        stranger.send(nonsense)
        if not nonsense.endswith(b"\n"):
            with contextlib.suppress(OSError):  # rank 0 may have reset the connection, as the line is too long
                stranger.shutdown(socket.SHUT_WR)
        while not is_closed(stranger):
            pass
    second = two.start(1)
    assert first.result(30).peers[0].rank == 1
    assert second.result(30).peers[0].rank == 0
    assert "Somebody who is no rank of ours connected: 127.0.0.1" in caplog.text
    assert SECRET not in caplog.text


def test_a_proof_of_rank_0_can_not_be_sent_back_to_it(two: Ranks) -> None:
    """A stranger that learns the proof which rank 0 sends first has nothing to show."""
    first = two.start(0)
    with socket.create_connection((ADDRESS, two.port)) as stranger:
        stranger.send(hello())
        challenge = read_line(stranger)
        assert SECRET not in str(challenge)
        send_line(stranger, {"proof": challenge["proof"]})
        assert is_closed(stranger)
    two.start(1)
    assert first.result(30).peers[0].rank == 1


@pytest.mark.parametrize("secret", ["", "another secret"])
def test_a_rank_with_another_secret_says_so_and_is_ignored(two: Ranks, secret: str) -> None:
    first = two.start(0)
    with pytest.raises(RendezvousError, match="has another secret: give all hosts the same SHARD_SECRET"):
        two.start(1, secret).result(30)
    two.start(1)
    assert first.result(30).peers[0].rank == 1


def test_strangers_that_say_nothing_hold_up_nobody(two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "MAX_STRANGERS", 8)
    first = two.start(0)
    strangers = [socket.create_connection((ADDRESS, two.port)) for _ in range(50)]
    for stranger in strangers[::2]:
        with contextlib.suppress(OSError):
            stranger.send(b"{")
    started = time.monotonic()
    two.start(1)
    assert first.result(30).peers[0].rank == 1
    assert time.monotonic() - started < 5
    for stranger in strangers:
        stranger.close()


def test_a_stranger_has_a_while_to_prove_itself(two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greeting, "GREETING_S", 0.1)
    first = two.start(0)
    with socket.create_connection((ADDRESS, two.port)) as stranger:
        stranger.send(b"{")
        assert is_closed(stranger)
    two.start(1)
    assert first.result(30).peers[0].rank == 1


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"[]\n", b"{}\n", b"x" * 2000])
def test_what_answers_at_the_address_and_is_no_rank_0_is_told(answer: bytes) -> None:
    with listen_at(ADDRESS, 0) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        second = pool.submit(meet, World(rank=1, size=2, address=ADDRESS, port=port), None, SECRET)
        sock, _ = listener.accept()
        with sock:
            sock.recv(1000)
            sock.send(answer)
            with pytest.raises(RendezvousError, match=f"What answers at {ADDRESS}:{port} is no rank 0: give the first"):
                second.result(30)


def test_strangers_who_are_gone_before_they_are_answered_are_ignored(two: Ranks) -> None:
    first = two.start(0)
    for _ in range(5):
        stranger = socket.create_connection((ADDRESS, two.port))
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.close()  # resets the connection
    two.start(1)
    assert first.result(30).peers[0].rank == 1


def proved(port: int, rank: int, channel: str) -> socket.socket:
    """A connection of somebody who knows the secret."""
    sock = socket.create_connection((ADDRESS, port))
    greet(sock, SECRET, rank, channel)
    return sock


@pytest.mark.parametrize(
    ("rank", "channel"), [(0, "control"), (2, "control"), (-1, "control"), (1, "other"), (1, ""), (10**30, "control")]
)
def test_ranks_that_there_are_none_of_are_ignored(rank: int, channel: str, two: Ranks) -> None:
    first = two.start(0)
    with proved(two.port, rank, channel) as stranger:
        assert is_closed(stranger)
    two.start(1)
    assert first.result(30).peers[0].rank == 1


@pytest.mark.parametrize("channel", ["control", "heartbeat"])
def test_a_rank_that_comes_twice_is_refused(channel: str, three: Ranks) -> None:
    first = three.start(0)
    three.start(1).result(30)
    with proved(three.port, 1, channel) as second:
        with pytest.raises(RendezvousError, match="^rank 1 is there twice: give each host another --node-rank$"):
            first.result(30)
        assert is_closed(second)


def test_a_rank_that_does_not_come(three: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "RENDEZVOUS_TIMEOUT_S", 1.0)
    first = three.start(0)
    three.start(1).result(30)
    with pytest.raises(RendezvousError, match="^rank 2 has not come within 1 s: see its host's log$"):
        first.result(30)


def test_without_rank_0_the_others_say_where_they_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "RENDEZVOUS_TIMEOUT_S", 0.2)
    with listen_at(ADDRESS, 0) as listener:
        port = listener.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(
        RendezvousError, match=f"^rank 0 can't be reached at 127.0.0.1:{port} .*start the first host, or"
    ):
        meet(World(rank=1, size=2, address=ADDRESS, port=port), None)
    assert 0.2 < time.monotonic() - started < 5


def test_a_port_that_is_taken(two: Ranks) -> None:
    with pytest.raises(RendezvousError) as error:
        meet(World(rank=0, size=2, address=ADDRESS, port=two.port), None)
    fix = "give another --master-port"
    assert str(error.value) == f"Cannot listen on 127.0.0.1:{two.port} (Address already in use): {fix}"


def test_rank_0_can_come_last_and_open_the_port_itself() -> None:
    with listen_at(ADDRESS, 0) as listener:
        port = listener.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(meet, World(rank=1, size=2, address=ADDRESS, port=port), None)
        time.sleep(0.1)
        first = meet(World(rank=0, size=2, address=ADDRESS, port=port), None)
        assert (first.peers[0].rank, second.result(30).peers[0].rank) == (1, 0)
    close(first)
    close(second.result())


def test_the_store_may_be_torchruns() -> None:
    store = TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False)
    worlds = [World(rank=rank, size=2, address=ADDRESS, port=store.port, has_agent_store=True) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for rendezvous in pool.map(meet, worlds, (None, None)):
            close(rendezvous)
    assert store.get("pytgi/control")


@pytest.mark.parametrize("value", ["", "a port", "9" * 5000, "1 token"])
def test_what_torchruns_store_says_of_the_port_may_be_nonsense(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "RENDEZVOUS_TIMEOUT_S", 0.5)
    store = TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False)
    store.set("pytgi/control", value)
    with pytest.raises(RendezvousError, match="pytgi/control|can't be reached"):
        meet(World(rank=1, size=2, address=ADDRESS, port=store.port, has_agent_store=True), None)


def test_interfaces() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None  # an address that is for documentation only


def test_ranks_of_one_host_share_memory(three: Ranks) -> None:
    all_rendezvous = three.meet()

    def run(rendezvous: Rendezvous) -> tuple[SharedMemoryCollectives, list[float]]:
        collectives = make_collectives(rendezvous, torch.device("cpu"), "gloo", 1, is_memory_shared=True)
        assert isinstance(collectives, SharedMemoryCollectives)
        return collectives, collectives.all_reduce(torch.tensor([1.0, 10.0**rendezvous.world.rank])).tolist()

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(run, all_rendezvous))
    assert [numbers for _, numbers in results] == [[3.0, 111.0]] * 3
