"""What ranks agree on: all of them have the same graphs, or none; the same adapters; and the tokens that only rank 0's
device knows.
"""

from __future__ import annotations

import socket
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import torch

import engine.ranks
from engine.graphs import GraphLimits
from engine.link.errors import StartError
from engine.link.ipc import encode_frame
from engine.link.progress import StartProgress, tell_nobody
from engine.ranks import Follower, Leader, Ranks, SharedAdapters, StopFollowing
from engine.scheduling.batch import ScheduledBatch
from engine.step_inputs import StepInputs
from parallel.state import ParallelState, RankLostError
from parallel.world import Peer, World
from tests.unit.parallel.threads import run_ranks

LIMITS = GraphLimits(sizes=(1, 2), max_seq_len=64, num_kv_tokens=64)


def make_ranks(reasons_of_the_other: list[str]) -> Ranks:
    """Rank 1 of two, without connections."""
    rendezvous: Any = types.SimpleNamespace(
        world=World(rank=1, size=2), peers=[], exchange=lambda reasons: [reasons_of_the_other, reasons]
    )
    return Ranks(rendezvous, 1.0)


class Runner:
    """Captures nothing."""

    def __init__(self, reasons: list[str]) -> None:
        self.refusals: list[str] = []
        self._reasons = reasons

    def why_no_graphs(self) -> list[str]:
        return self._reasons

    def refuse_graphs(self, reasons: list[str]) -> None:
        self.refusals = reasons

    def capture(self, limits: GraphLimits, progress: StartProgress) -> None:
        assert limits is LIMITS


def test_reasons_of_one_rank_are_reasons_for_all() -> None:
    runner: Any = Runner(["why", "and why"])
    make_ranks(["elsewhere", "why"]).capture(runner, LIMITS, StartProgress(tell_nobody))
    assert runner.refusals == ["elsewhere", "why", "and why"]


def make_inputs(unknown_rows: list[int]) -> StepInputs:
    return StepInputs(
        input_ids=[0] * len(unknown_rows),
        query_start_loc=[0],
        seq_lens=[],
        block_table=b"",
        prompt_lens=[],
        logits_indices=[],
        scored_indices=[],
        scored_token_ids=[],
        unknown_places=list(range(len(unknown_rows))),
        unknown_rows=unknown_rows,
    )


@pytest.mark.parametrize("size", [2, 3])
def test_tokens_that_the_host_does_not_know_reach_every_rank(size: int) -> None:
    """By their rows of the step before; large ids are exact."""
    chosen = torch.tensor([5, 151_935, 0, 7])

    def work(parallel: ParallelState) -> tuple[list[int], object]:
        ranks = make_ranks([])
        ranks.state = parallel
        last_token_ids = None if parallel.rank else chosen
        shared = ranks.share_token_ids(make_inputs([2, 1]), last_token_ids)
        assert shared is not None
        return shared.to(torch.int64)[[2, 1]].tolist(), ranks.share_token_ids(make_inputs([]), last_token_ids)

    assert run_ranks(size, work) == [([0, 151_935], None)] * size
    assert chosen.tolist() == [5, 151_935, 0, 7]


class Adapters:
    """Adapter files, without any in folders whose names have this rank's number."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.is_open: dict[int, str] = {}
        self.in_slot: dict[int, int] = {}
        self.delay_s = 0.0
        self.num_beats = 0

    def beat(self) -> None:
        self.num_beats += 1

    def lacks(self, adapters: list[tuple[int, int]]) -> bool:
        return any(self.in_slot.get(slot) != number for slot, number in adapters)

    def fill(self, adapters: list[tuple[int, int]]) -> None:
        time.sleep(self.delay_s)
        self.in_slot |= dict(adapters)

    def open(self, number: int, folder: str) -> None:
        if str(self.rank) in folder:
            raise StartError(f"{folder} is not there")
        self.is_open[number] = folder

    def close(self, number: int) -> None:
        self.is_open.pop(number, None)


class Stepper:
    """A runner that counts the steps."""

    def __init__(self, rank: int) -> None:
        self.adapters = Adapters(rank)
        self.num_steps = 0
        self.step_adapters: list[tuple[int, int]] = []

    def inputs(self, batch: ScheduledBatch) -> StepInputs:
        return msgspec.structs.replace(make_inputs([]), adapters=self.step_adapters)

    def run(self, inputs: StepInputs, last_token_ids: object) -> None:
        assert not self.adapters.lacks(inputs.adapters)
        self.num_steps += 1


def fake_ranks(*peers: Peer) -> Any:
    """Connections without a heartbeat."""
    return types.SimpleNamespace(
        peers=peers,
        check=lambda: None,
        end=lambda: None,
        explain=lambda error: error,
        share_token_ids=lambda inputs, last_token_ids: None,
    )


def test_an_adapter_is_open_on_every_rank_or_on_none() -> None:
    """Whichever can't open it says so, and the next step finds all ranks there."""
    pairs = [socket.socketpair() for _ in range(2)]
    runners: list[Any] = [Stepper(rank) for rank in range(3)]
    peers = [Peer(rank, "host", ours, ours) for rank, (ours, _) in enumerate(pairs, 1)]
    others = [fake_ranks(Peer(0, "host", theirs, theirs)) for _, theirs in pairs]
    with ThreadPoolExecutor(2) as threads:
        serving = [threads.submit(Follower(*pair).serve) for pair in zip(runners[1:], others, strict=True)]
        ranks = fake_ranks(*peers)
        adapters, leader = SharedAdapters(runners[0], ranks), Leader(runners[0], ranks)
        adapters.open(0, "/good")
        for rank, place in enumerate(["", "rank 1 on host: ", "rank 2 on host: "]):
            with pytest.raises(StartError, match=f"^{place}/bad{rank} is not there$"):
                adapters.open(1, f"/bad{rank}")
            assert runners[0].adapters.is_open == {0: "/good"}
            leader.execute(ScheduledBatch())
        adapters.open(1, "/better")
        adapters.close(0)
        for peer in peers:
            peer.control.sendall(encode_frame(StopFollowing()))
        for future in serving:
            future.result(10)
    assert [runner.adapters.is_open for runner in runners] == [{1: "/better"}] * 3
    assert [runner.num_steps for runner in runners] == [3] * 3
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_a_rank_that_ends_before_it_has_opened_an_adapter() -> None:
    ours, theirs = socket.socketpair()
    runner: Any = Stepper(0)
    with ours, theirs:
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(RankLostError, match="another rank is gone"):
            SharedAdapters(runner, fake_ranks(Peer(1, "host", ours, ours))).open(0, "/good")


def test_a_step_waits_until_every_rank_has_read_its_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is heard of meanwhile. No rank waits for a slow disk in a collective, which has a timeout."""
    monkeypatch.setattr(engine.ranks, "ANSWER_BEAT_S", 0.01)
    ours, theirs = socket.socketpair()
    first, second = Stepper(0), Stepper(1)
    runners: list[Any] = [first, second]
    second.adapters.delay_s = 0.2
    with ours, theirs, ThreadPoolExecutor(1) as threads:
        serving = threads.submit(Follower(runners[1], fake_ranks(Peer(0, "host", theirs, theirs))).serve)
        leader = Leader(runners[0], fake_ranks(Peer(1, "host", ours, ours)))
        beats = []
        for adapters in [(0, 7)], [(0, 7)], [(0, 7), (1, 9)]:
            first.step_adapters = adapters
            leader.execute(ScheduledBatch())
            beats.append(first.adapters.num_beats)
        ours.sendall(encode_frame(StopFollowing()))
        serving.result(10)
    assert 0 < beats[0] == beats[1] < beats[2]
    assert second.adapters.in_slot == {0: 7, 1: 9}
    assert first.num_steps == second.num_steps == 3


def test_a_wait_for_an_adapter_ends_with_its_cause() -> None:
    """A rank that hangs is noticed by the heartbeat, which leaves the cause; one that can't read says so itself."""
    ours, theirs = socket.socketpair()
    first = Stepper(0)
    first.step_adapters = [(0, 7)]
    runner: Any = first
    ranks = fake_ranks(Peer(1, "host", ours, ours))
    with ours, theirs:
        theirs.sendall(b'"no such file"\n')
        with pytest.raises(RankLostError, match="could not read an adapter that is open: no such file"):
            Leader(runner, ranks).execute(ScheduledBatch())
        first.adapters.in_slot.clear()

        def check() -> None:
            raise RankLostError("nothing was heard of rank 1")

        def beat() -> None:
            ranks.check = check
            first.adapters.num_beats += 1
            assert first.adapters.num_beats < 5, "it waits for ever"

        first.adapters.beat = beat  # type: ignore[method-assign]
        ranks.check, ranks.explain = lambda: None, lambda error: error
        with pytest.raises(RankLostError, match="another rank is gone") as caught:
            Leader(runner, ranks).execute(ScheduledBatch())
        assert str(caught.value.__context__) == "nothing was heard of rank 1"
        assert first.num_steps == 0
