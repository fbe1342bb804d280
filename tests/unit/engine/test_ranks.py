"""What ranks agree on: all of them have the same graphs, or none; and the tokens that only rank 0's device knows."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from engine.graphs import GraphLimits
from engine.link.errors import StartError
from engine.ranks import Ranks
from engine.step_inputs import StepInputs
from parallel.state import ParallelState, RankLostError
from parallel.world import World
from tests.unit.parallel.threads import run_ranks

LIMITS = GraphLimits(sizes=(1, 2), max_seq_len=64, num_kv_tokens=64)


def make_ranks(reasons_of_the_other: list[str]) -> Ranks:
    """Rank 1 of two, without connections."""
    rendezvous: Any = types.SimpleNamespace(
        world=World(rank=1, size=2), peers=[], exchange=lambda reasons: [reasons_of_the_other, reasons]
    )
    return Ranks(rendezvous, 1.0)


class Runner:
    """Captures nothing, or raises."""

    def __init__(self, reasons: list[str], error: RuntimeError | None = None) -> None:
        self.refusals: list[str] = []
        self._reasons, self._error = reasons, error

    def why_no_graphs(self) -> list[str]:
        return self._reasons

    def refuse_graphs(self, reasons: list[str]) -> None:
        self.refusals = reasons

    def capture(self, limits: GraphLimits) -> None:
        assert limits is LIMITS
        if self._error is not None:
            raise self._error


def test_reasons_of_one_rank_are_reasons_for_all() -> None:
    runner: Any = Runner(["why", "and why"])
    make_ranks(["elsewhere", "why"]).capture(runner, LIMITS)
    assert runner.refusals == ["elsewhere", "why", "and why"]


def test_a_rank_that_cannot_capture_ends_the_start() -> None:
    """The others have the graph already, or wait in it."""
    runner: Any = Runner([], torch.OutOfMemoryError("no memory\nmore of it"))
    expected = r"^rank 1 can't capture a graph \(no memory\): give smaller --cuda-graphs, or 0$"
    with pytest.raises(StartError, match=expected):
        make_ranks([]).capture(runner, LIMITS)


def test_a_rank_that_is_lost_meanwhile_is_no_failed_capture() -> None:
    runner: Any = Runner([], RankLostError("rank 0 is gone"))
    with pytest.raises(RankLostError, match="^rank 0 is gone$"):
        make_ranks([]).capture(runner, LIMITS)


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
