"""The ranks of one engine: rank 0 decides each step and sends it to the others over their control sockets.

Rank 0 has a `Leader` in place of a plain runner; every other rank ends its start in `Follower.serve`. The message of a
step holds what the forward pass needs and no request: followers keep no state between steps but their KV memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch

from engine.checkpoint.weights import open_weights
from engine.limits import MemoryNeeds
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.exit_codes import RANK_LOST_EXIT_CODE
from engine.link.ipc import RECEIVE_BYTES, encode_frame, take_frames
from engine.runner import ModelRunner, StepInputs, StepResult
from engine.scheduling.batch import ScheduledBatch
from parallel.connect import make_collectives
from parallel.heartbeat import Heartbeat
from parallel.state import ParallelState, RankLostError
from parallel.world import Peer, Rendezvous

logger = logging.getLogger(__name__)

LAST_EVENTS_S = 1.0
"""What rank 0's main thread has to end the open requests, once a rank is lost, before the process ends anyway."""
SAME_REASON_S = 1.0
"""How long a rank that is starting may take to find by itself what another one has ended for."""
CAUSE_S = 2.0
"""How long a rank whose collective failed waits for the pulse to say why."""


OWN_SETTINGS = ("model_path", "num_threads", "socket_fd", "listen_fd", "log_level", "is_json_output")
"""What each rank may have for itself."""


class StopFollowing(msgspec.Struct, frozen=True, tag="stop"):
    """The last message: the engine ends in good order."""


Decision = StepInputs | StopFollowing

_decode: Callable[[bytes], Decision] = msgspec.msgpack.Decoder(Decision).decode


class Ranks:
    """This process among the ranks: the state for the layers, the control sockets, the watch over the others."""

    def __init__(self, meeting: Rendezvous, timeout_s: float) -> None:
        self.world = meeting.world
        self._timeout_s = timeout_s
        self.meeting = meeting
        self.state = ParallelState(meeting.world.rank, meeting.world.size)
        self._is_serving = False
        self._cause: str | None = None
        self._is_lost = threading.Event()
        self._report_lock = threading.Lock()
        self._is_reported = False
        self._pulse = Heartbeat(meeting.peers, timeout_s, self._on_lost)

    @property
    def peers(self) -> list[Peer]:
        return self.meeting.peers

    def connect(self, device: torch.device, config: EngineConfig) -> None:
        """Make the collectives. Raises StartError where another host was started with other flags or another model."""
        fingerprints = self.meeting.exchange(_fingerprint(config))
        for rank, other in enumerate(fingerprints):
            differing = [name for name, value in fingerprints[0].items() if other.get(name) != value]
            if differing:
                name = differing[0]
                raise StartError(
                    f"rank {rank} was started with {name} {other.get(name)!r}, rank 0 with {fingerprints[0][name]!r}: "
                    "start every host with the same flags, model and version"
                )
        collectives = make_collectives(
            self.meeting, device, config.num_threads, may_share_memory=config.may_share_memory
        )
        self.state = dataclasses.replace(self.state, collectives=collectives)

    def wait_for_all(self) -> None:
        self.meeting.exchange(None)

    def tightest(self, needs: MemoryNeeds, free_bytes: int) -> tuple[MemoryNeeds, int]:
        """The most that any rank needs, the least that any has."""
        sent = self.meeting.exchange([dataclasses.asdict(needs), free_bytes])
        most = {name: max(other[name] for other, _ in sent) for name in sent[0][0]}
        return MemoryNeeds(**most), min(free for _, free in sent)

    def start_serving(self) -> None:
        """From now on nobody may be late by more than the timeout: no rank loads or compiles any more."""
        assert self.state.collectives is not None
        self.state.collectives.timeout_s = self._timeout_s
        self._is_serving = True

    def describe(self) -> str:
        assert self.state.collectives is not None
        hosts = len({peer.host for peer in self.peers} | {self.world.address})
        return (
            f"{self.world.size} shards on {hosts} host{'s' if hosts > 1 else ''}, "
            f"collectives through {self.state.collectives.name}"
        )

    def check(self) -> None:
        """Raises RankLostError when another rank is lost."""
        if self._cause is not None:
            raise RankLostError(self._cause)

    def explain(self, error: RankLostError) -> RankLostError:
        """The error with the cause that the pulse has noticed meanwhile, if it does so within `CAUSE_S`."""
        self._is_lost.wait(CAUSE_S)
        return error if self._cause is None else RankLostError(self._cause)

    def tell(self, sentence: str) -> None:
        """Why this rank ends."""
        self._pulse.tell(sentence)

    def report(self, cause: str) -> None:
        """Log why this rank ends: once, and on one rank of each host. Where rank 0 is lost, the next one speaks."""
        is_speaker = self.world.local_rank == 0 or (self.world.rank == 1 and cause.startswith("rank 0 "))
        with self._report_lock:
            if is_speaker and not self._is_reported:
                logger.error("Lost another rank: %s", cause)
            self._is_reported = True

    def end(self) -> None:
        """Let the followers end in good order."""
        self._pulse.end()
        for peer in self.peers:
            _send(peer.control, StopFollowing())

    def _on_lost(self, cause: str) -> None:
        """On the pulse's thread: the main one may be anywhere, deep in a kernel or in a collective that never ends."""
        if not self._is_serving:  # mostly for a reason that this rank is about to find, too
            time.sleep(SAME_REASON_S)
        self._cause = cause
        self._is_lost.set()
        self.tell(cause)
        if self.state.collectives is not None:
            self.state.collectives.give_up(cause)
        self.report(cause)
        if self.world.rank == 0:
            time.sleep(LAST_EVENTS_S)
        logging.shutdown()
        os._exit(RANK_LOST_EXIT_CODE)


def _send(sock: socket.socket, message: Decision) -> None:
    try:
        sock.sendall(encode_frame(message))
    except OSError as error:
        raise RankLostError(f"another rank takes no more steps ({error})") from error


class Leader:
    """Rank 0's runner: every step goes to the followers first."""

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        self._runner = runner
        self._ranks = ranks

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """As `ModelRunner.execute`. Raises RankLostError."""
        self._ranks.check()
        inputs = self._runner.inputs(batch)
        for peer in self._ranks.peers:
            _send(peer.control, inputs)
        try:
            return self._runner.run(inputs)
        except RankLostError as error:
            raise self._ranks.explain(error) from error


class Follower:
    """Any other rank."""

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        self._runner = runner
        self._ranks = ranks

    def serve(self) -> None:
        """Compute what rank 0 decides until it ends in good order. Raises RankLostError."""
        try:
            for decision in _decisions(self._ranks.peers[0].control):
                if isinstance(decision, StopFollowing):
                    break
                self._runner.run(decision)
        except RankLostError as error:
            raise self._ranks.explain(error) from error
        self._ranks.end()


def _decisions(control: socket.socket) -> Iterator[Decision]:
    buffer = bytearray()
    while True:
        yield from take_frames(buffer, _decode)
        try:
            data = control.recv(RECEIVE_BYTES)
        except OSError as error:
            raise RankLostError(f"rank 0 can't be reached any more ({error.strerror})") from error
        if not data:
            raise RankLostError("rank 0 is gone: its own log may say why")
        buffer += data


def _fingerprint(config: EngineConfig) -> dict[str, str]:
    """What must be equal on every rank, by what a person calls it."""
    settings = {name.replace("_", "-"): str(value) for name, value in dataclasses.asdict(config).items()}
    for name in OWN_SETTINGS:
        del settings[name.replace("_", "-")]
    folder = Path(config.model_path)
    digest = hashlib.blake2b(digest_size=8)
    for path in (folder / "config.json", *open_weights(folder).files):
        try:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        except OSError as error:
            raise StartError.of_file(path, error) from error
    return {"version": importlib.metadata.version("pytgi"), "model files": digest.hexdigest(), **settings}
