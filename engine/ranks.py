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
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import torch

from engine.checkpoint.weight_files import find_weight_files
from engine.device import Device
from engine.graphs import GraphLimits
from engine.limits import MemoryNeeds
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.exit_codes import RANK_LOST_EXIT_CODE
from engine.link.ipc import RECEIVE_BYTES, encode_frame, take_frames
from engine.link.model_files import ADAPTER_WEIGHTS
from engine.link.progress import StartProgress
from engine.runner import ModelRunner, StepResult
from engine.scheduling.batch import ScheduledBatch
from engine.step_inputs import StepInputs
from parallel.connect import make_collectives
from parallel.greeting import send_line
from parallel.heartbeat import Heartbeat
from parallel.state import ParallelState, RankLostError
from parallel.world import Peer, Rendezvous, read_line

logger = logging.getLogger(__name__)

LAST_EVENTS_S = 1.0
"""Time that rank 0's main thread gets to end the open requests, once a rank is lost, before the process ends."""
SAME_REASON_S = 1.0
"""Time that a starting rank gets to find by itself the reason for which another rank has ended."""
ANSWER_BEAT_S = 0.5
"""Time between two signs of life of a rank 0 that waits until the others have read an adapter."""
CAUSE_S = 2.0
"""Longest wait of a rank whose collective failed for the heartbeat to say why."""

SETTINGS_OF_EACH_RANK = (
    "model_path adapter_path lora_adapters num_threads "  # paths and threads of a host
    "socket_fd listen_fd shard_secret log_level is_json_output"
).split()
"""Fields of `EngineConfig` in which ranks may differ."""


class OpenAdapter(msgspec.Struct, frozen=True, tag="open"):
    """An adapter comes: open its files, and send a line with the reason why that can't be done, or null."""

    number: int
    folder: str
    """The path of its folder on this host."""


class CloseAdapter(msgspec.Struct, frozen=True, tag="close"):
    """No step will name that adapter any more."""

    number: int


class FillSlots(msgspec.Struct, frozen=True, tag="fill"):
    """Load the adapters, slot and number of each, that are not in their slots yet. The answer is null, or why not."""

    adapters: list[tuple[int, int]]


class StopFollowing(msgspec.Struct, frozen=True, tag="stop"):
    """The last message: the engine ends in good order."""


Decision = StepInputs | OpenAdapter | CloseAdapter | FillSlots | StopFollowing

_decode: Callable[[bytes], Decision] = msgspec.msgpack.Decoder(Decision).decode


class Ranks:
    """This process among the ranks: the state for the layers, the control sockets, the heartbeat of the others."""

    def __init__(self, rendezvous: Rendezvous, timeout_s: float) -> None:
        self.world = rendezvous.world
        self.state = ParallelState(rendezvous.world.rank, rendezvous.world.size)
        self._timeout_s = timeout_s
        self._rendezvous = rendezvous
        self._is_serving = False
        self._cause: str | None = None
        self._is_lost = threading.Event()
        self._is_explained = False
        self._device = torch.device("cpu")
        self._report_lock = threading.Lock()
        self._is_reported = False
        self._heartbeat = Heartbeat(rendezvous.peers, timeout_s, self._on_lost)

    @property
    def peers(self) -> list[Peer]:
        return self._rendezvous.peers

    def connect(self, device: Device, config: EngineConfig) -> None:
        """Make the collectives. Raises StartError where another host was started with other flags or another model."""
        fingerprints = self._rendezvous.exchange(_fingerprint(config))
        for rank, other in enumerate(fingerprints):
            differing = [name for name, value in fingerprints[0].items() if other.get(name) != value]
            if differing:
                name = differing[0]
                raise StartError(
                    f"rank {rank} was started with {name} {other.get(name)!r}, rank 0 with {fingerprints[0][name]!r}: "
                    "start every host with the same flags, model and version"
                )
        self._device = device.torch_device
        collectives = make_collectives(
            self._rendezvous,
            device.torch_device,
            device.collectives,
            config.num_threads,
            is_memory_shared=device.is_memory_shared,
            may_share_memory=config.may_share_memory,
        )
        self.state = dataclasses.replace(self.state, collectives=collectives)

    def wait_for_all(self) -> None:
        """Return once every rank has called this."""
        self._rendezvous.exchange(None)

    def tightest(self, needs: MemoryNeeds, free_bytes: int) -> tuple[MemoryNeeds, int]:
        """The largest needs of any rank, and the smallest number of free bytes."""
        all_ranks = self._rendezvous.exchange([dataclasses.asdict(needs), free_bytes])
        max_needs = {name: max(other[name] for other, _ in all_ranks) for name in all_ranks[0][0]}
        return MemoryNeeds(**max_needs), min(free for _, free in all_ranks)

    def capture(self, runner: ModelRunner, limits: GraphLimits, progress: StartProgress) -> None:
        """Let all ranks have the same graphs, or none, so that they run each step alike. Raises StartError."""
        reasons = self._rendezvous.exchange(runner.why_no_graphs())
        runner.refuse_graphs(list(dict.fromkeys(reason for of_rank in reasons for reason in of_rank)))
        runner.capture(limits, progress)

    @torch.inference_mode()
    def share_token_ids(self, inputs: StepInputs, last_token_ids: torch.Tensor | None) -> torch.Tensor | None:
        """What the step before chose, on the device of every rank; None: the host knows all tokens of this step.

        Rank 0 alone passes `last_token_ids` [rows]. The others add zeros to it, in one sum that nobody waits for on the
        host. Ids are exact in float32, which all collectives take.
        """
        if not inputs.unknown_rows:
            return None
        count = 1 + max(inputs.unknown_rows)
        if last_token_ids is None:
            token_ids = torch.zeros(count, device=self._device)
        else:
            token_ids = last_token_ids[:count].to(torch.float32)
        return self.state.all_reduce(token_ids)

    def start_serving(self) -> None:
        """Hold this rank's collectives to the timeout from now on: no rank loads or compiles any more."""
        assert self.state.collectives is not None
        self.state.collectives.timeout_s = self._timeout_s
        self._is_serving = True

    def describe(self) -> str:
        """A line for the summary of the start."""
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
        """The error with the cause that the heartbeat has noticed, if it does so within `CAUSE_S` of the first call."""
        if not self._is_explained:
            self._is_lost.wait(CAUSE_S)
            self._is_explained = True
        return error if self._cause is None else RankLostError(self._cause)

    def tell(self, sentence: str) -> None:
        """Tell the other ranks why this one ends."""
        self._heartbeat.tell(sentence)

    def end_lost(self, error: RankLostError) -> None:
        """Tell the other ranks and the log why this one ends."""
        cause = str(self.explain(error))
        self.tell(cause)
        self.report(cause)

    def report(self, cause: str) -> None:
        """Log why this rank ends: once, and on one rank of each host. Where rank 0 is lost, rank 1 logs it, too."""
        is_speaker = self.world.local_rank == 0 or (self.world.rank == 1 and cause.startswith("rank 0 "))
        with self._report_lock:
            if is_speaker and not self._is_reported:
                logger.error("Lost another rank: %s", cause)
            self._is_reported = True

    def end(self) -> None:
        """Let the followers end in good order."""
        self._heartbeat.end()
        _send(self.peers, StopFollowing())

    def _on_lost(self, cause: str) -> None:
        """End this process. Runs on the heartbeat's thread: the main one may be in a collective that never ends."""
        if not self._is_serving:  # the other rank has mostly ended for a reason that this one is about to find, too
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


def _send(peers: Sequence[Peer], message: Decision) -> None:
    frame = encode_frame(message)
    try:
        for peer in peers:
            peer.control.sendall(frame)
    except OSError as error:
        raise RankLostError(f"another rank takes no more steps ({error})") from error


def _send_line(sock: socket.socket, value: str | None) -> None:
    try:
        send_line(sock, value)
    except OSError as error:
        raise RankLostError(f"rank 0 takes no answer any more ({error})") from error


class Leader:
    """Rank 0's runner: every step goes to the followers first."""

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        self._runner = runner
        self._ranks = ranks

    def execute(self, batch: ScheduledBatch, last_token_ids: torch.Tensor | None = None) -> StepResult:
        """As `ModelRunner.execute`. Raises RankLostError."""
        self._ranks.check()
        inputs = self._runner.inputs(batch)
        try:
            self._fill_slots(inputs)
            _send(self._ranks.peers, inputs)
            return self._runner.run(inputs, self._ranks.share_token_ids(inputs, last_token_ids))
        except RankLostError as error:
            raise self._ranks.explain(error) from error
        except torch.OutOfMemoryError as error:  # the others wait in this step: it can't be taken back
            raise RankLostError(out_of_memory_cause(0)) from error

    def _fill_slots(self, inputs: StepInputs) -> None:
        """Let every rank read the adapters that a step brings, before any rank waits for another in that step."""
        adapters = self._runner.adapters
        if adapters is not None and adapters.lacks(inputs.adapters):
            _send(self._ranks.peers, FillSlots(inputs.adapters))
            adapters.fill(inputs.adapters)
            for refusal in filter(None, _read_answers(self._ranks, adapters.beat)):
                raise RankLostError(f"another rank could not read an adapter that is open: {refusal}")


def _read_answers(ranks: Ranks, beat: Callable[[], None]) -> list[str | None]:
    """Each follower's line. The heartbeat notices a rank that hangs. Raises RankLostError."""
    answers = []
    try:
        for peer in ranks.peers:
            while not select.select([peer.control], [], [], ANSWER_BEAT_S)[0]:
                beat()
                ranks.check()
            answers.append(read_line(peer.control))
    except RankLostError as error:
        raise ranks.explain(RankLostError("another rank is gone: its own log may say why")) from error
    return answers


class SharedAdapters:
    """Rank 0's `engine.core.AdapterFiles`: an adapter is open on every rank, or on none."""

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        """`runner` has memory for adapters."""
        assert runner.adapters is not None
        self._adapters = runner.adapters
        self._ranks = ranks

    @property
    def beat(self) -> Callable[[], None]:
        return self._adapters.beat

    @beat.setter
    def beat(self, beat: Callable[[], None]) -> None:
        self._adapters.beat = beat

    def open(self, number: int, folder: str) -> None:
        """Open them on all ranks, for which steps wait. Raises StartError and RankLostError."""
        self._ranks.check()
        self._adapters.open(number, folder)
        _send(self._ranks.peers, OpenAdapter(number, folder))
        errors = _read_answers(self._ranks, self.beat)
        for peer, text in zip(self._ranks.peers, errors, strict=True):
            if text is not None:
                self.close(number)
                raise StartError(f"rank {peer.rank} on {peer.host}: {text}")

    def close(self, number: int) -> None:
        self._adapters.close(number)
        _send(self._ranks.peers, CloseAdapter(number))


class Follower:
    """The runner of any other rank."""

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        self._runner = runner
        self._ranks = ranks

    def serve(self) -> None:
        """Run the steps that rank 0 decides until it ends in good order. Raises RankLostError."""
        try:
            for decision in _decisions(self._ranks.peers[0].control):
                if isinstance(decision, StopFollowing):
                    break
                self._follow(decision)
        except RankLostError as error:
            raise self._ranks.explain(error) from error
        except torch.OutOfMemoryError as error:
            raise RankLostError(out_of_memory_cause(self._ranks.world.rank)) from error
        self._ranks.end()

    def _follow(self, decision: StepInputs | OpenAdapter | CloseAdapter | FillSlots) -> None:
        if isinstance(decision, StepInputs):
            self._runner.run(decision, self._ranks.share_token_ids(decision, None))
            return
        adapters = self._runner.adapters
        assert adapters is not None, "every rank has memory for adapters, or none has"
        if isinstance(decision, CloseAdapter):
            adapters.close(decision.number)
            return
        text = None
        try:
            if isinstance(decision, FillSlots):
                adapters.fill(decision.adapters)
            else:
                adapters.open(decision.number, decision.folder)
        except StartError as error:
            text = str(error)
        _send_line(self._ranks.peers[0].control, text)


def out_of_memory_cause(rank: int) -> str:
    """The reason for which all ranks end."""
    return (
        f"rank {rank} ran out of memory in a step: lower --max-batch-prefill-tokens, --max-batch-total-tokens or "
        "--cuda-memory-fraction"
    )


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
    """Everything that must be equal on every rank, by the name that a user knows it by."""
    settings = {name.replace("_", "-"): str(value) for name, value in dataclasses.asdict(config).items()}
    for name in SETTINGS_OF_EACH_RANK:
        del settings[name.replace("_", "-")]
    folder = Path(config.model_path)
    digest = hashlib.blake2b(digest_size=8)
    merged = [] if config.adapter_path is None else [config.adapter_path]
    adapters = [Path(path) / ADAPTER_WEIGHTS for path in (*merged, *(path for _, path in config.lora_adapters))]
    for path in (folder / "config.json", *find_weight_files(folder).paths, *adapters):
        try:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        except OSError as error:
            raise StartError.of_file(path, error) from error
    names = {"lora-adapters": ",".join(name for name, _ in config.lora_adapters)}
    return {"version": importlib.metadata.version("pytgi"), "model files": digest.hexdigest(), **settings, **names}
