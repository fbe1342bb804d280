"""Two ranks on the device `interpreted`, processes of their own that start as those of a server with GPUs do."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from benchmarks.gpu_proof.models import run_requests
from engine import ranks
from engine.device import DEVICES, Device, find_interpreted
from engine.graph_capture import Tape, Work
from engine.link.config import EngineConfig
from engine.link.messages import GenerationRequest
from engine.overlap import OverlappedCore
from engine.ranks import Ranks
from engine.start import start_engine, start_follower
from parallel.state import Collectives, ParallelState
from parallel.world import World, listen_at, meet
from tests.rank_processes import RankProcesses

ADDRESS = "127.0.0.1"
NUM_RANKS = 2
TIMEOUT_S = 120.0
MAX_STEP_TOKENS = 16
"""Few, so that prompts come in chunks and the warm-up is short."""

GRAPH_ROWS = 4
"""Rows of the one graph, more than there are sequences, so that some are padding."""


@dataclasses.dataclass
class Outcome:
    """What a rank has done; tokens are rank 0's alone."""

    token_ids: list[list[int]]
    description: str
    """What the start says of the shards."""
    num_replays: int
    has_overlap: bool
    """Whether rank 0 launches a step before it reads the last one's tokens."""


def find_sharded(local_rank: int) -> Device | None:
    """The stand-in for a GPU, with a memory of its own: small sums are tried, and the group has two backends."""
    device = find_interpreted(local_rank)
    assert device is not None
    return dataclasses.replace(
        device,
        is_memory_shared=False,
        collectives="cpu:gloo,cuda:gloo",
        make_recorder=CountingTape,
        has_graph_collectives=True,
        row_variants=(),  # nothing is compiled
    )


class CountingTape(Tape):
    """Counts the replays of all graphs of this process."""

    num_replays: ClassVar[int] = 0

    def capture(self, work: Work) -> Work:
        replay = super().capture(work)

        def count_and_replay() -> torch.Tensor:
            CountingTape.num_replays += 1
            return replay()

        return count_and_replay


class RecordedCollectives:
    """Makes each collective one operation of torch, which a tape can write down and do again, as a graph does NCCL's.

    A process has one library of operations, which go through the collectives of the model that it serves.
    """

    _library = torch.library.Library("recorded", "DEF")
    _library.define("all_reduce(Tensor(a!) x) -> ()")
    _library.define("all_gather(Tensor x, int[] widths) -> Tensor")
    _library.define("gather(Tensor x, int[] widths) -> Tensor")
    _collectives: ClassVar[Collectives]

    def __init__(self, collectives: Collectives) -> None:
        RecordedCollectives._collectives = collectives

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collectives, name)

    @staticmethod
    def define() -> None:
        made, library = RecordedCollectives, RecordedCollectives._library

        def all_reduce(x: torch.Tensor) -> None:
            made._collectives.all_reduce(x)

        implementations: dict[str, Callable[..., Any]] = {
            "all_reduce": all_reduce,
            "all_gather": lambda x, widths: made._collectives.all_gather(x, widths),
            "gather": lambda x, widths: ParallelState(0, NUM_RANKS, made._collectives).gather(x, widths),
        }
        for name, implementation in implementations.items():
            library.impl(name, implementation, "CompositeExplicitAutograd")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        torch.ops.recorded.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        gathered: torch.Tensor = torch.ops.recorded.all_gather(x, list(widths))
        return gathered

    def gather(self, x: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        gathered: torch.Tensor = torch.ops.recorded.gather(x, list(widths))
        return gathered


class InterpretedRanks(RankProcesses):
    """Processes that serve one model after the other."""

    def __init__(self) -> None:
        super().__init__(NUM_RANKS, _serve, timeout_s=TIMEOUT_S)

    def run(
        self, folder: Path, requests: list[GenerationRequest], *, quantize: str | None = None, has_graphs: bool = False
    ) -> list[Outcome]:
        """Serve the requests to their end; what each rank has done. Raises the error of a rank."""
        config = EngineConfig(
            model_path=str(folder),
            device="sharded",
            dtype="float32",
            quantize=quantize,
            max_total_tokens=64,
            max_batch_total_tokens=256,
            max_batch_prefill_tokens=MAX_STEP_TOKENS,
            graph_sizes=(GRAPH_ROWS,) if has_graphs else (),
        )
        with listen_at(ADDRESS, 0) as listener:
            port = listener.getsockname()[1]
        return self.ask((port, config, requests))


def _serve(rank: int, pipe: Connection) -> None:
    DEVICES["sharded"] = f"{__name__}:find_sharded"
    RecordedCollectives.define()
    make = ranks.make_collectives
    ranks.make_collectives = lambda *args, **kwargs: RecordedCollectives(make(*args, **kwargs))
    while True:
        try:
            port, config, requests = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send(_run_rank(rank, port, config, requests))
        except BaseException as error:
            pipe.send(error)
        dist.destroy_process_group()


def _run_rank(rank: int, port: int, config: EngineConfig, requests: list[GenerationRequest]) -> Outcome:
    """Serve the requests as rank 0, or follow. Both ends are those of a server that is told to end."""
    world = World(rank=rank, size=NUM_RANKS, local_rank=rank, local_size=NUM_RANKS, address=ADDRESS, port=port)
    group, token_ids, has_overlap = Ranks(meet(world, None), config.shard_timeout_s), [], False
    CountingTape.num_replays = 0
    if rank:
        start_follower(config, group).serve()
    else:
        core, _ = start_engine(config, group)
        token_ids, has_overlap = run_requests(core, requests), isinstance(core, OverlappedCore)
        group.end()
    return Outcome(token_ids, group.describe(), CountingTape.num_replays, has_overlap)
