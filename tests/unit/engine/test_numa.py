"""The nodes of hosts that are not there, as files, and who of the shards gets which."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.numa import bind_shard, shard_processors, usable_nodes


def write_nodes(root: Path, *lists: str) -> Path:
    for index, text in enumerate(lists):
        folder = root / "sys/devices/system/node" / f"node{index}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{text}\n")
    (root / "sys/devices/system/node/has_cpu").parent.mkdir(parents=True, exist_ok=True)
    (root / "sys/devices/system/node/has_cpu").write_text("0\n")
    return root


@pytest.mark.parametrize(
    ("lists", "allowed", "nodes"),
    [
        (["0-3"], range(4), [[0, 1, 2, 3]]),
        (["0-3,8-11", "4-7,12-15"], range(16), [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]),
        (["0,2", "1,3"], range(4), [[0, 2], [1, 3]]),
        (["0-3", "4-7"], [2, 3], [[2, 3]]),
        (["0-3", "4-7"], [3, 4, 5], [[3], [4, 5]]),
        (["0-3", "", "4-7", ""], range(8), [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([], range(4), []),
        (["0-3", "what"], range(8), []),
    ],
)
def test_a_node_has_the_processors_that_the_process_may_use(
    lists: list[str], allowed: list[int], nodes: list[list[int]], tmp_path: Path
) -> None:
    assert usable_nodes(set(allowed), write_nodes(tmp_path, *lists)) == [set(node) for node in nodes]


def test_nodes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    nodes = usable_nodes(set(range(12)), write_nodes(tmp_path, *(str(number) for number in range(12))))
    assert nodes == [{number} for number in range(12)]


def four_each(num_nodes: int) -> list[set[int]]:
    return [set(range(4 * node, 4 * node + 4)) for node in range(num_nodes)]


@pytest.mark.parametrize(
    ("num_nodes", "local_size", "num_threads", "groups"),
    [
        (1, 2, 2, None),
        (2, 1, 8, None),
        (2, 2, 4, [[0], [1]]),
        (2, 4, 2, [[0], [0], [1], [1]]),
        (2, 3, 2, None),
        (4, 2, 8, [[0, 1], [2, 3]]),
        (4, 4, 4, [[0], [1], [2], [3]]),
        (4, 8, 2, [[0], [0], [1], [1], [2], [2], [3], [3]]),
        (4, 3, 4, None),
        (4, 6, 2, None),
        (2, 2, 5, None),
        (2, 8, 1, [[0], [0], [0], [0], [1], [1], [1], [1]]),
        (2, 16, 1, None),
    ],
)
def test_shards_have_nodes_alike_and_a_processor_for_every_thread(
    num_nodes: int, local_size: int, num_threads: int, groups: list[list[int]] | None
) -> None:
    nodes = four_each(num_nodes)
    for local_rank in range(local_size):
        processors = shard_processors(nodes, local_rank, local_size, num_threads)
        expected = None if groups is None else set().union(*(nodes[node] for node in groups[local_rank]))
        assert processors == expected


def test_uneven_nodes_bind_nobody() -> None:
    """As where a cpuset leaves one processor of the second socket."""
    assert shard_processors([{0, 1, 2, 3}, {4}], 0, 2, 2) is None
    assert shard_processors([{0, 1, 2, 3}, {4}], 1, 2, 1) == {4}


class Process:
    """The processors that this process may use, without the kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, processors: set[int]) -> None:
        self.processors = processors
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(self.processors))
        monkeypatch.setattr(os, "sched_setaffinity", lambda pid, processors: setattr(self, "processors", processors))


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_shard_is_bound_to_its_node(local_rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(monkeypatch, set(range(8)))
    line = bind_shard(local_rank, 2, 4, write_nodes(tmp_path, "0-3", "4-7"))
    assert process.processors == ({0, 1, 2, 3}, {4, 5, 6, 7})[local_rank]
    assert line == "Each shard is bound to the processors of its own NUMA node, of 2"


@pytest.mark.parametrize(
    ("local_size", "num_threads", "allowed", "line"),
    [
        (1, 8, range(8), "--num-shard 2 would keep"),
        (3, 2, range(8), "are not bound"),
        (2, 2, range(4), None),
        (1, 4, range(4), None),
    ],
)
def test_others_stay_where_they_are(
    local_size: int,
    num_threads: int,
    allowed: range,
    line: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = Process(monkeypatch, set(allowed))
    said = bind_shard(0, local_size, num_threads, write_nodes(tmp_path, "0-3", "4-7"))
    assert process.processors == set(allowed)
    assert said is line is None or (line is not None and said is not None and line in said)
