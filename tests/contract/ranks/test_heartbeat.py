"""Signs of life over real connections: who is gone, who hangs, who says why, and who has ended in good order."""

from __future__ import annotations

import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from parallel import heartbeat
from parallel.heartbeat import Heartbeat
from parallel.world import Peer

BEAT_S = 0.05
TIMEOUT_S = 0.3
SOON_S = 5.0
"""What is reported is reported long before."""

Reports = queue.SimpleQueue[str]
Start = Callable[..., tuple[Heartbeat, Reports]]


@pytest.fixture(autouse=True)
def beat_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", BEAT_S)


@pytest.fixture
def connect() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    """Makes both ends of a connection."""
    sockets: list[socket.socket] = []

    def make() -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        sockets.extend((ours, theirs))
        return ours, theirs

    yield make
    for sock in sockets:
        sock.close()


@pytest.fixture
def start(connect: object) -> Iterator[Start]:
    """Starts a heartbeat of a rank over connections to others; they are closed after its thread has ended."""
    heartbeats: list[Heartbeat] = []

    def make(*connections: tuple[int, socket.socket]) -> tuple[Heartbeat, Reports]:
        reports: Reports = queue.SimpleQueue()
        peers = [Peer(rank, f"10.0.0.{rank}", sock, sock) for rank, sock in connections]
        heartbeats.append(Heartbeat(peers, TIMEOUT_S, reports.put))
        return heartbeats[-1], reports

    yield make
    for each in heartbeats:
        each.end()
    for thread in threading.enumerate():
        if thread.name == "heartbeat":
            thread.join(SOON_S)
            assert not thread.is_alive()


def assert_silent(reports: Reports) -> None:
    """For longer than any silence would be borne."""
    with pytest.raises(queue.Empty):
        reports.get(timeout=3 * TIMEOUT_S)


Connect = Callable[[], tuple[socket.socket, socket.socket]]


def test_ranks_that_beat_are_alive(connect: Connect, start: Start) -> None:
    ours, theirs = connect()
    _, of_first = start((1, ours))
    _, of_second = start((0, theirs))
    assert_silent(of_first)
    assert of_second.empty()


def test_a_beat_is_an_empty_line(connect: Connect, start: Start) -> None:
    ours, theirs = connect()
    start((1, ours))
    received = b""
    while len(received) < 3:
        received += theirs.recv(100)
    assert set(received) == {ord("\n")}


def test_a_rank_that_is_silent_hangs(connect: Connect, start: Start) -> None:
    ours, _ = connect()
    started = time.monotonic()
    _, reports = start((1, ours))
    assert reports.get(timeout=SOON_S) == "rank 1 on 10.0.0.1 hangs: nothing was heard of it for 0.3 s"
    assert time.monotonic() - started > TIMEOUT_S - BEAT_S
    assert_silent(reports)


def test_a_rank_that_falls_silent_hangs(connect: Connect, start: Start) -> None:
    ours, theirs = connect()
    _, reports = start((1, ours))
    for _ in range(10):
        theirs.send(b"\n")
        time.sleep(TIMEOUT_S / 5)
    assert reports.empty()
    assert "rank 1 on 10.0.0.1 hangs" in reports.get(timeout=SOON_S)


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_rank_that_is_gone(is_reset: bool, connect: Connect, start: Start) -> None:
    """A process that has not read all it was sent resets its connections when it ends."""
    ours, theirs = connect()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", is_reset, 0))
    _, reports = start((1, ours))
    if not is_reset:
        theirs.shutdown(socket.SHUT_WR)
    theirs.close()
    assert reports.get(timeout=SOON_S) == "rank 1 on 10.0.0.1 is gone: its own log may say why"
    assert_silent(reports)


def test_the_sentence_that_a_rank_ends_with_arrives(connect: Connect, start: Start) -> None:
    ours, theirs = connect()
    _, of_first = start((1, ours))
    second, of_second = start((0, theirs))
    sentence = "rank 1 lacks 2.5 GB: give “--memory-fraction” — or fewer tokens"
    second.tell(sentence)
    assert of_first.get(timeout=SOON_S) == sentence
    assert_silent(of_first)
    assert of_second.empty(), "who has told why it ends doesn't care for the others any more"


def test_a_sentence_of_several_lines_is_told_in_one(connect: Connect, start: Start) -> None:
    ours, theirs = connect()
    _, of_first = start((1, ours))
    second, _ = start((0, theirs))
    second.tell("one:\n  two\n")
    assert of_first.get(timeout=SOON_S) == "one: two"


def test_a_sentence_that_arrives_in_pieces(connect: Connect, start: Start) -> None:
    ours, theirs = connect()
    _, reports = start((1, ours))
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for piece in (b"\n\nNo sp", "ace: ü".encode()[:-1], "ü".encode()[-1:], b" left\n"):
        theirs.send(piece)
        time.sleep(0.02)
    assert reports.get(timeout=SOON_S) == "No space: ü left"


def test_an_orderly_end_is_no_loss(connect: Connect, start: Start) -> None:
    ours, theirs = connect()
    _, of_first = start((1, ours))
    second, of_second = start((0, theirs))
    second.end()
    time.sleep(2 * BEAT_S)
    theirs.shutdown(socket.SHUT_RDWR)
    assert_silent(of_first)
    assert of_second.empty()


def test_the_others_are_watched_after_one_has_ended(connect: Connect, start: Start) -> None:
    (first, second), (third, fourth) = connect(), connect()
    _, reports = start((1, first), (2, third))
    for _ in range(6):
        fourth.send(b"\n")
        time.sleep(BEAT_S)
    second.send(b"bye\n")
    second.close()
    for _ in range(12):
        fourth.send(b"\n")
        time.sleep(BEAT_S)
    assert reports.get(timeout=SOON_S) == "rank 2 on 10.0.0.2 hangs: nothing was heard of it for 0.3 s"


def test_everybody_is_told_and_only_the_first_sentence(connect: Connect, start: Start) -> None:
    (first, second), (third, fourth) = connect(), connect()
    teller, _ = start((1, first), (2, third))
    teller.tell("first")
    teller.tell("second")
    teller.end()
    for sock in (second, fourth):
        received = b""
        while b"first\n" not in received:
            received += sock.recv(100)
        sock.settimeout(3 * BEAT_S)
        with pytest.raises(TimeoutError):
            assert set(sock.recv(100)) == {ord("\n")}
            assert not sock.recv(100)
        assert received.strip() == b"first"
