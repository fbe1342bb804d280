"""Two ranks on the device `interpreted`, processes of their own that start as those of a server with GPUs do."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import torch.distributed as dist

from engine.core import EngineCore
from engine.device import DEVICES, Device, find_interpreted
from engine.link.config import EngineConfig
from engine.link.messages import GenerationRequest
from engine.ranks import Ranks
from engine.start import start_engine, start_follower
from parallel.world import World, listen_at, meet

ADDRESS = "127.0.0.1"
NUM_RANKS = 2
TIMEOUT_S = 120.0
MAX_STEP_TOKENS = 16
"""Few, so that prompts come in chunks and the warm-up is short."""

Ids = list[list[int]]


def find_sharded(local_rank: int) -> Device | None:
    """The stand-in for a GPU, with a memory of its own: its tensors go through the group's second backend."""
    device = find_interpreted(local_rank)
    assert device is not None
    return dataclasses.replace(device, is_memory_shared=False, collectives="cpu:gloo,cuda:gloo")


class InterpretedRanks:
    """Processes that serve one model after the other; a context manager that ends them."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(NUM_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, folder: Path, requests: list[GenerationRequest], quantize: str | None = None) -> tuple[Ids, str]:
        """The tokens of each request, and what the start says of the shards. Raises the error of a rank."""
        config = EngineConfig(
            model_path=str(folder),
            device="sharded",
            dtype="float32",
            quantize=quantize,
            max_total_tokens=64,
            max_batch_total_tokens=256,
            max_batch_prefill_tokens=MAX_STEP_TOKENS,
        )
        with listen_at(ADDRESS, 0) as listener:
            port = listener.getsockname()[1]
        for pipe in self._pipes:
            pipe.send((port, config, requests))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(TIMEOUT_S), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers[0]  # type: ignore[no-any-return]

    def __enter__(self) -> InterpretedRanks:
        return self

    def __exit__(self, *exc: object) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()  # ends the process
            process.join(TIMEOUT_S)
            process.kill()
            process.close()


def _serve(rank: int, pipe: Connection) -> None:
    DEVICES["sharded"] = f"{__name__}:find_sharded"
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


def _run_rank(rank: int, port: int, config: EngineConfig, requests: list[GenerationRequest]) -> tuple[Ids, str]:
    """Serve the requests as rank 0, or follow. Both ends are those of a server that is told to end."""
    world = World(rank=rank, size=NUM_RANKS, local_rank=rank, local_size=NUM_RANKS, address=ADDRESS, port=port)
    ranks = Ranks(meet(world, None), config.shard_timeout_s)
    if rank:
        start_follower(config, ranks).serve()
        return [], ""
    core, _ = start_engine(config, ranks)
    ids = _generate(core, requests)
    ranks.end()
    return ids, ranks.describe()


def _generate(core: EngineCore, requests: list[GenerationRequest]) -> Ids:
    ids: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        core.take(request)
    while core.scheduler.has_work:
        for event in core.step():
            assert event.error is None, event.error
            ids[event.request_id] += event.token_ids
    return list(ids.values())
