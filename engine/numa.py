"""Nodes of memory: a host with several sockets reads the memory beside a socket faster from that socket. No torch.

Each shard of such a host computes on the processors of its own node, so what it writes first lies there, too. A process
that somebody has bound already stays where it is: of each node only those processors count that it may use.
"""

from __future__ import annotations

import os
from pathlib import Path


def usable_nodes(allowed: set[int], root: Path = Path("/")) -> list[set[int]]:
    """The processors of each node that are among `allowed`; nodes without any, as those of memory alone, are left out.

    No node where the kernel tells nothing of them.
    """
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    nodes = []
    for folder in sorted(folders, key=lambda folder: int(folder.name.removeprefix("node"))):
        try:
            nodes.append(_parse_list((folder / "cpulist").read_text()) & allowed)
        except (OSError, ValueError):
            return []
    return [node for node in nodes if node]


def _parse_list(text: str) -> set[int]:
    """`0-3,8` -> processors. Raises ValueError."""
    processors: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        processors |= set(range(int(first), int(last or first) + 1))
    return processors


def shard_processors(nodes: list[set[int]], local_rank: int, local_size: int, num_threads: int) -> set[int] | None:
    """The processors for one of a host's `local_size` shards, each of `num_threads` threads; None: any of them.

    Shards that follow each other share a node, or each has several: all alike, with a processor for every thread.
    """
    num_nodes = len(nodes)
    if local_size < 2 or num_nodes < 2 or (local_size % num_nodes and num_nodes % local_size):
        return None
    per_shard, per_node = max(num_nodes // local_size, 1), max(local_size // num_nodes, 1)
    groups = [set[int]().union(*nodes[first : first + per_shard]) for first in range(0, num_nodes, per_shard)]
    if min(len(group) for group in groups) < per_node * num_threads:
        return None
    return groups[local_rank // per_node]


def bind_shard(local_rank: int, local_size: int, num_threads: int, root: Path = Path("/")) -> str | None:
    """Bind this thread, and those that it starts from now on, to the processors of the shard's node.

    Returns a sentence for the log on a host with several nodes, None elsewhere.
    """
    nodes = usable_nodes(os.sched_getaffinity(0), root)
    if len(nodes) < 2:
        return None
    if local_size < 2:
        return (
            f"This host has {len(nodes)} NUMA nodes: --num-shard {len(nodes)} would keep the weights of each shard in "
            "the memory of its own node"
        )
    processors = shard_processors(nodes, local_rank, local_size, num_threads)
    if processors is None:
        return (
            f"The shards are not bound to the {len(nodes)} NUMA nodes of this host: {local_size} shards of "
            f"{num_threads} threads can't be divided evenly among them"
        )
    os.sched_setaffinity(0, processors)
    return f"Each shard is bound to the processors of its own NUMA node, of {len(nodes)}"
