"""The ranks that take part, by torchrun's variables, and the sockets over which they find each other.

Rank 0 listens at the address that all ranks know, and nowhere else. Every other rank opens two connections to it and
proves itself on each (`parallel.greeting`): `control` for the decisions of each step, `heartbeat` for signs of life.
torch's store opens only for collectives that need it, once all ranks are there.
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

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from parallel.greeting import Greeter, StrangerError, WrongSecretError, greet, send_line
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
PORT_KEY = "pytgi/control"
"""Key of torchrun's store at which rank 0 notes its port."""
MAX_PORT_DIGITS = 5


class RendezvousError(RuntimeError):
    """The ranks don't come together; the text says why, and what to do."""


THREAD_PLACES = ("GOMP_CPU_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
"""OpenMP's variables that bind threads to processors."""


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
    has_thread_places: bool = False
    """Whether the user says on which processors threads run."""

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
            has_thread_places=any(environ.get(name) for name in THREAD_PLACES),
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

    def open_store(self) -> Store:
        """torch's store, at an address of the ranks' network. All ranks call this together.

        Its keys begin with a word that the ranks alone know; the store itself asks nobody who they are.
        """
        world, address = self.world, self.peers[0].control.getsockname()[0]
        place: list[Any] = []
        if world.rank == 0:
            if world.has_agent_store:
                port, store = world.port, _store(world.address, world.port)
            else:
                listener = listen_at(address, 0)
                port = listener.getsockname()[1]
                store = _store(address, port, listen_fd=listener.detach())
            place = [port, secrets.token_hex(16)]
        port, prefix = self.exchange(place)[0]
        if world.rank:
            store = _store(world.address, port)
        return PrefixStore(prefix, store)


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


def meet(world: World, listen_fd: int | None, secret: str = "") -> Rendezvous:
    """Bring all ranks together. `listen_fd` is a socket of rank 0 that listens at the address; None: make one here.

    Every rank has the same `secret`; without one anybody who reaches the address can pass for a rank. Raises
    RendezvousError, also if two processes come with the same rank.
    """
    deadline = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    port = world.port
    if world.has_agent_store:  # torchrun holds the port: rank 0 says through its store where it listens
        agent_store = _agent_store(world)
        if world.rank:
            port = _noted_port(agent_store)
    if world.rank:
        connections = {channel: _connect(world, port, secret, channel, deadline) for channel in CHANNELS}
        return Rendezvous(world, [Peer(0, world.address, **connections)])
    with _listener(world, listen_fd) as listener:
        if world.has_agent_store:
            agent_store.set(PORT_KEY, str(listener.getsockname()[1]))
        return Rendezvous(world, _accept_all(listener, secret, world.size, deadline))


def _agent_store(world: World) -> TCPStore:
    try:
        return _store(world.address, world.port)
    except RuntimeError as error:
        raise RendezvousError(f"torchrun's store can't be reached at {world.address}:{world.port} ({error})") from error


def _noted_port(agent_store: TCPStore) -> int:
    value = agent_store.get(PORT_KEY)
    try:
        return int(value[:MAX_PORT_DIGITS])
    except ValueError as error:
        raise RendezvousError(f"torchrun's store has no port at {PORT_KEY}: who else uses that store?") from error


def _store(address: str, port: int, *, listen_fd: int | None = None) -> TCPStore:
    """The store at an address; with `listen_fd` it is this process that answers there."""
    return TCPStore(
        address,
        port,
        world_size=None,
        is_master=listen_fd is not None,
        timeout=datetime.timedelta(seconds=RENDEZVOUS_TIMEOUT_S),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )


def _listener(world: World, listen_fd: int | None) -> socket.socket:
    if listen_fd is not None:
        return socket.socket(fileno=listen_fd)
    port = 0 if world.has_agent_store else world.port
    try:
        return listen_at(world.address, port)
    except OSError as error:
        raise RendezvousError(
            f"Cannot listen on {world.address}:{port} ({error.strerror}): give another --master-port"
        ) from error


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


def _accept_all(listener: socket.socket, secret: str, size: int, deadline: float) -> list[Peer]:
    """Wait for the connections of all other ranks. Raises RendezvousError."""
    connections: dict[int, dict[str, socket.socket]] = {rank: {} for rank in range(1, size)}
    hosts: dict[int, str] = {}

    def add(sock: socket.socket, host: str, rank: int, channel: str) -> None:
        if rank not in connections or channel not in CHANNELS:
            logger.warning("A rank %d with the channel %.20s is none of ours: %s", rank, channel, host)
            sock.close()
        elif channel in connections[rank]:
            sock.close()
            raise RendezvousError(f"rank {rank} is there twice: give each host another --node-rank")
        else:
            connections[rank][channel] = _configured(sock)
            hosts[rank] = host

    greeter = Greeter(listener, secret, add)
    next_log = time.monotonic() + RENDEZVOUS_LOG_S
    try:
        while missing := [rank for rank, channels in connections.items() if len(channels) < len(CHANNELS)]:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"rank {missing[0]} has not come within {RENDEZVOUS_TIMEOUT_S:g} s: see its host's log"
                )
            if time.monotonic() > next_log:
                logger.info("Waiting for rank %s", ", ".join(map(str, missing)))
                next_log = time.monotonic() + RENDEZVOUS_LOG_S
            for host in greeter.wait(RETRY_S):
                logger.warning("Somebody who is no rank of ours connected: %s", host)
    except BaseException:
        for channels in connections.values():
            for sock in channels.values():
                sock.close()
        raise
    finally:
        greeter.close()
    return [Peer(rank, hosts[rank], **channels) for rank, channels in connections.items()]


def _configured(sock: socket.socket) -> socket.socket:
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
    return sock


def _connect(world: World, port: int, secret: str, channel: str, deadline: float) -> socket.socket:
    """A proved connection to rank 0, for which this waits until `deadline`. Raises RendezvousError."""
    next_log = time.monotonic() + RENDEZVOUS_LOG_S
    while True:
        try:
            return _connect_once(world, port, secret, channel, deadline)
        except OSError as error:
            if time.monotonic() > deadline:
                raise RendezvousError(
                    f"rank 0 can't be reached at {world.address}:{port} ({error}): start the first host, or give "
                    "its --master-addr and --master-port"
                ) from error
            if time.monotonic() > next_log:
                logger.info("Waiting for rank 0 at %s:%d (%s)", world.address, port, error)
                next_log = time.monotonic() + RENDEZVOUS_LOG_S
        time.sleep(RETRY_S)


def _connect_once(world: World, port: int, secret: str, channel: str, deadline: float) -> socket.socket:
    sock = socket.create_connection((world.address, port), timeout=RENDEZVOUS_LOG_S)
    try:
        # Rank 0's launcher listens before rank 0 is there to answer.
        sock.settimeout(max(RETRY_S, deadline - time.monotonic()))
        greet(sock, secret, world.rank, channel)
    except BaseException as error:
        sock.close()
        if isinstance(error, WrongSecretError):
            raise RendezvousError(
                f"rank 0 at {world.address}:{port} has another secret: give all hosts the same SHARD_SECRET"
            ) from error
        if isinstance(error, StrangerError):
            raise RendezvousError(
                f"What answers at {world.address}:{port} is no rank 0: give the first host's --master-addr and "
                "--master-port"
            ) from error
        raise
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
