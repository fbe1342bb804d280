"""The ranks that take part, by torchrun's variables, and the sockets over which they find each other.

Rank 0 listens at the address that all ranks know, and nowhere else; torch's store answers there. Every other rank opens
two connections to rank 0: `control` for the decisions of each step, `heartbeat` for signs of life.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from parallel.state import RankLostError

logger = logging.getLogger(__name__)

RENDEZVOUS_TIMEOUT_S = 1800.0
"""Longest wait for all ranks: another host may still be fetching the model."""
RENDEZVOUS_LOG_S = 10.0
RETRY_S = 0.5
UNACKNOWLEDGED_MS = 5000
"""Time without an acknowledgement after which the kernel takes a connection for cut. Data for a process that hangs is
still acknowledged."""
CHANNELS = ("control", "heartbeat")


class RendezvousError(RuntimeError):
    """The ranks don't come together; the text says why, and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What torchrun's variables say."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Ranks on this host."""
    address: str = "127.0.0.1"
    port: int = 0
    has_agent_store: bool = False
    """Whether torchrun itself holds the store."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> World:
        size = int(environ.get("WORLD_SIZE", 1))
        return cls(
            rank=int(environ.get("RANK", 0)),
            size=size,
            local_rank=int(environ.get("LOCAL_RANK", 0)),
            local_size=int(environ.get("LOCAL_WORLD_SIZE", size)),
            address=environ.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environ.get("MASTER_PORT", 0)),
            has_agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """The connections to one other rank."""

    rank: int
    host: str
    control: socket.socket
    heartbeat: socket.socket


@dataclasses.dataclass(frozen=True, slots=True)
class Rendezvous:
    """The connections of a rank once all are there: rank 0 has a peer for each other rank, the others have rank 0."""

    world: World
    store: TCPStore
    peers: list[Peer]

    def exchange(self, value: Any) -> list[Any]:
        """The values that all ranks pass, in their order: small ones, as JSON, before the first step."""
        if self.world.rank:
            send_line(self.peers[0].control, value)
            values: list[Any] = read_line(self.peers[0].control)
            return values
        values = [value, *(read_line(peer.control) for peer in self.peers)]
        for peer in self.peers:
            send_line(peer.control, values)
        return values


def send_line(sock: socket.socket, value: Any) -> None:
    sock.sendall(json.dumps(value).encode() + b"\n")


def read_line(sock: socket.socket) -> Any:
    """Read byte by byte, as what follows the line is for another reader. Raises RankLostError."""
    line = b""
    try:
        while not line.endswith(b"\n"):
            byte = sock.recv(1)
            if not byte:
                raise RankLostError("another rank ended while they were starting")
            line += byte
    except OSError as error:
        raise RankLostError(f"another rank can't be reached while they are starting ({error})") from error
    return json.loads(line)


def meet(world: World, listen_fd: int | None) -> Rendezvous:
    """Bring all ranks together. `listen_fd` is a socket of rank 0 that listens at the address; None: make one here.

    Raises RendezvousError, also if two processes come with the same rank.
    """
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    if world.rank == 0:
        return _meet_as_first(world, listen_fd, deadline)
    _wait_for_first(world, deadline)
    store = _store(world, is_master=False, listen_fd=None)
    port, token = store.get("pytgi/control").decode().split()
    connections = {channel: _connect(world, int(port), token, channel) for channel in CHANNELS}
    return Rendezvous(world, store, [Peer(0, world.address, **connections)])


def _store(world: World, *, is_master: bool, listen_fd: int | None) -> TCPStore:
    return TCPStore(
        world.address,
        world.port,
        world_size=None,
        is_master=is_master,
        timeout=datetime.timedelta(seconds=RENDEZVOUS_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )


def _meet_as_first(world: World, listen_fd: int | None, deadline: float) -> Rendezvous:
    if listen_fd is None and not world.has_agent_store:
        try:
            listen_fd = listen_at(world.address, world.port).detach()
        except OSError as error:
            raise RendezvousError(
                f"Cannot listen on {world.address}:{world.port} ({error.strerror}): give another --master-port"
            ) from error
    store = _store(world, is_master=not world.has_agent_store, listen_fd=listen_fd)
    token = secrets.token_hex(16)
    with listen_at(world.address, 0) as listener:
        store.set("pytgi/control", f"{listener.getsockname()[1]} {token}")
        peers = _accept_all(listener, token, world.size, deadline)
    return Rendezvous(world, store, peers)


def listen_at(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _accept_all(listener: socket.socket, token: str, size: int, deadline: float) -> list[Peer]:
    """Wait for the connections of all other ranks. Raises RendezvousError."""
    connections: dict[int, dict[str, socket.socket]] = {rank: {} for rank in range(1, size)}
    hosts: dict[int, str] = {}
    next_log = time.monotonic() + RENDEZVOUS_LOG_S
    listener.settimeout(RETRY_S)
    try:
        while missing := [rank for rank, channels in connections.items() if len(channels) < len(CHANNELS)]:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"rank {missing[0]} has not come within {RENDEZVOUS_TIMEOUT_S:g} s: see its host's log"
                )
            if time.monotonic() > next_log:
                logger.info("Waiting for rank %s", ", ".join(map(str, missing)))
                next_log = time.monotonic() + RENDEZVOUS_LOG_S
            with contextlib.suppress(TimeoutError):
                sock, (host, *_) = listener.accept()
                rank = _greet(sock, token, connections)
                if rank is None:
                    logger.warning("Somebody who is no rank of ours connected: %s", host)
                    sock.close()
                else:
                    hosts[rank] = host
    except BaseException:
        for channels in connections.values():
            for sock in channels.values():
                sock.close()
        raise
    return [Peer(rank, hosts[rank], **channels) for rank, channels in connections.items()]


def _greet(sock: socket.socket, token: str, connections: dict[int, dict[str, socket.socket]]) -> int | None:
    """Add a connection of another rank; returns the rank, None: it is no rank of ours. Raises RendezvousError."""
    sock.settimeout(RENDEZVOUS_LOG_S)
    try:
        hello = read_line(sock)
        rank, channel = int(hello["rank"]), str(hello["channel"])
        if hello["token"] != token or channel not in CHANNELS or rank not in connections:
            return None
    except (RankLostError, ValueError, KeyError, TypeError):
        return None
    if channel in connections[rank]:
        sock.close()
        raise RendezvousError(f"rank {rank} is there twice: give each host another --node-rank")
    connections[rank][channel] = _configured(sock)
    return rank


def _configured(sock: socket.socket) -> socket.socket:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
    return sock


def _wait_for_first(world: World, deadline: float) -> None:
    next_log = time.monotonic() + RENDEZVOUS_LOG_S
    while True:
        try:
            socket.create_connection((world.address, world.port), timeout=RENDEZVOUS_LOG_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"rank 0 can't be reached at {world.address}:{world.port} ({error}): start the first host, or give "
                    "its --master-addr and --master-port"
                ) from error
            if time.monotonic() > next_log:
                logger.info("Waiting for rank 0 at %s:%d (%s)", world.address, world.port, error)
                next_log = time.monotonic() + RENDEZVOUS_LOG_S
        time.sleep(RETRY_S)


def _connect(world: World, port: int, token: str, channel: str) -> socket.socket:
    try:
        sock = socket.create_connection((world.address, port), timeout=RENDEZVOUS_LOG_S)
    except OSError as error:
        raise RendezvousError(
            f"rank 0 can't be reached at {world.address}:{port} ({error}): is a port closed?"
        ) from error
    send_line(sock, {"token": token, "rank": world.rank, "channel": channel})
    return _configured(sock)


def interface_of(address: str) -> str | None:
    """The network interface with the address; None: there is none."""
    if ":" in address:
        digits = socket.inet_pton(socket.AF_INET6, address).hex()
        lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        return next((fields[5] for fields in lines if fields[0] == digits), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def host_key() -> str:
    """A text that is equal for processes that can open each other's files in /proc."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
