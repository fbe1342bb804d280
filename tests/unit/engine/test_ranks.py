"""What ranks agree on while they start: all of them have the same graphs, or none."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from engine.graphs import GraphLimits
from engine.link.errors import StartError
from engine.ranks import Ranks
from parallel.state import RankLostError
from parallel.world import World

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
