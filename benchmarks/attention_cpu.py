"""Attention on one core of a CPU: keys and values per second over what a plain read reaches; prompts in FLOP/s.

`python benchmarks/attention_cpu.py` prints a row for each shape, context and number of query tokens. Blocks are
neighbours, as those of a long prompt in an empty cache are, or scattered, as after a day of serving. The read sums the
same memory in the same minute. With --rounded queries and weights are rounded to bfloat16 where the processor has
AVX512-BF16, as they are for quantised models.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import njit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.attention.base import AttentionMetadata, AttentionShape, LayerCache  # noqa: E402
from engine.attention.cpu import CpuAttention  # noqa: E402

SHAPES = {"0.5B": AttentionShape(14, 2, 64), "1.5B": AttentionShape(12, 2, 128), "7B": AttentionShape(28, 4, 128)}
NUM_LAYERS = 4
"""Caches that take turns, so that none stays in the processor's cache only because it was just used."""


@njit(nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
def _sum_words(words: Any) -> Any:
    total = np.uint64(0)
    for index in range(words.shape[0]):
        total += words[index]
    return total


def seconds(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least time of each, taking turns: on a machine with neighbours the least is the nearest to the truth."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for round_index in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if round_index:
                taken[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in taken.items()}


def make_step(backend: CpuAttention, context: int, num_queries: int, blocks: np.ndarray[Any, Any]) -> Any:
    """A prepared step of one sequence: the last `num_queries` of `context` tokens."""
    starts, lengths = [0, num_queries], [context]
    positions = np.arange(context - num_queries, context)
    slots = blocks[positions // backend.block_size] * backend.block_size + positions % backend.block_size
    return backend.prepare(
        AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=torch.from_numpy(blocks[None].astype(np.int32)),
            slot_mapping=torch.from_numpy(slots.astype(np.int64)),
            work_items=torch.from_numpy(backend.work_items(starts, lengths, len(blocks))),
            host_query_start_loc=starts,
            host_seq_lens=lengths,
        )
    )


def words_of(cache: LayerCache) -> np.ndarray[Any, Any]:
    both = torch.cat([cache.keys.view(torch.int16), cache.values.view(torch.int16)])
    return both.numpy().view(np.uint64)


def measure(shape: AttentionShape, context: int, num_queries: int, *, is_shuffled: bool, repeats: int) -> str:
    """The columns of a row: milliseconds of a layer, GB/s, part of the read's, GFLOP/s."""
    backend = CpuAttention(shape, CpuAttention.block_sizes[0])
    num_blocks = -(-context // backend.block_size)
    caches = [backend.allocate(num_blocks, torch.bfloat16, torch.device("cpu")) for _ in range(NUM_LAYERS)]
    for cache in caches:
        cache.keys.copy_(torch.randn(cache.keys.shape))
        cache.values.copy_(torch.randn(cache.values.shape))
    blocks = np.random.default_rng(0).permutation(num_blocks) if is_shuffled else np.arange(num_blocks)
    step = make_step(backend, context, num_queries, blocks)
    qkv = torch.randn(num_queries, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim)
    words = [words_of(cache) for cache in caches]
    taken = seconds(
        {
            "attend": lambda: [backend.forward(qkv, cache, step) for cache in caches],
            "read": lambda: [_sum_words(part) for part in words],
        },
        repeats,
    )
    layer, num_bytes = taken["attend"] / NUM_LAYERS, words[0].nbytes
    rate, flops = num_bytes / layer, 4 * shape.num_heads * shape.head_dim * num_queries * context
    part = taken["read"] / taken["attend"]
    return f"{layer * 1e3:.3f} | {rate / 1e9:.1f} | {part:.2f} | {flops / layer / 1e9:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 4096, 32768], help="tokens of the sequence")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 256], help="tokens that attend, the last ones")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounded", action="store_true")
    arguments = parser.parse_args()
    numba.set_num_threads(1)
    print("| model | context | tokens | blocks | ms a layer | GB/s | of a read | GFLOP/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, exact in SHAPES.items():
        shape = dataclasses.replace(exact, is_rounded=arguments.rounded)
        for context in arguments.contexts:
            for queries in arguments.queries:
                for is_shuffled in (False, True) if queries == 1 else (False,):
                    row = measure(shape, context, queries, is_shuffled=is_shuffled, repeats=arguments.repeats)
                    place = "scattered" if is_shuffled else "neighbours"
                    print(f"| {name} | {context} | {queries} | {place} | {row} |", flush=True)


if __name__ == "__main__":
    main()
