"""Paged attention on a CPU against the torch implementation and against whole, unpaged attention."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from torch.nn import functional

from engine.attention import ATTENTION_BACKENDS
from engine.attention.attend_ops import BLOCK_SIZE, LANES, SPAN, store_weights, weights_of
from engine.attention.base import AttentionMetadata, AttentionShape, LayerCache
from engine.attention.cpu import CpuAttention
from engine.attention.tiles_cpu import PART, PARTIAL
from engine.attention.torch import TorchAttention
from engine.link.registry import import_entry
from quant.kernels.bfloat16_ops import HAS_PAIRS
from quant.kernels.simd import load16, store
from tests.contract.oracles import backends_here

# Two rows per KV head and token, Qwen2.5-0.5B's seven, one, and more than a tile has rows.
SHAPES = [AttentionShape(4, 2, 16), AttentionShape(14, 2, 64), AttentionShape(3, 3, 32), AttentionShape(40, 1, 16)]
BACKENDS = [import_entry(ATTENTION_BACKENDS, name, "attention backend") for name in backends_here(ATTENTION_BACKENDS)]
CACHE_DTYPES = [torch.float32, torch.bfloat16]
ROUNDED = [False, True] if HAS_PAIRS else [False]
"""Whether queries and weights may be rounded to bfloat16: they are where one instruction adds a pair of products."""
NUM_BLOCKS = 40
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 65]
WINDOWS = [1, 2, 7, 15, 16, 17, 33, 64, 1000]


@dataclasses.dataclass
class Part:
    """Query tokens `first : last` of a sequence that lies in `blocks`."""

    qkv: torch.Tensor
    """[all tokens of the sequence, width]"""
    first: int
    last: int
    blocks: list[int]


def width_of(shape: AttentionShape) -> int:
    return (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim


def random_qkv(shape: AttentionShape, length: int, seed: int) -> torch.Tensor:
    return torch.randn(length, width_of(shape), generator=torch.Generator().manual_seed(seed)) * 1.5


def deal_blocks(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Blocks for sequences of these lengths, in no order and not side by side."""
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = []
    for length in lengths:
        count = -(-length // BLOCK_SIZE)
        tables.append(order[:count])
        order = order[count:]
    return tables


def make_metadata(backend: Any, parts: list[Part]) -> AttentionMetadata:
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.last - part.first)
    slots = [
        part.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for part in parts
        for position in range(part.first, part.last)
    ]
    widest = max(len(part.blocks) for part in parts)
    seq_lens = [part.last for part in parts]
    return AttentionMetadata(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=torch.tensor(
            [part.blocks + [0] * (widest - len(part.blocks)) for part in parts], dtype=torch.int32
        ),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        work_items=torch.from_numpy(backend.work_items(starts, seq_lens, widest)),
        host_query_start_loc=starts,
        host_seq_lens=seq_lens,
    )


def stale_cache(backend: Any, dtype: torch.dtype, num_blocks: int = NUM_BLOCKS) -> LayerCache:
    """KV memory that is full of NaN, as other sequences may have left it."""
    cache: LayerCache = backend.allocate(num_blocks, dtype, torch.device("cpu"))
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


def run(backend: Any, cache: LayerCache, parts: list[Part], window: int | None = None) -> list[torch.Tensor]:
    """Run one step. Returns the output rows of each part."""
    prepared = backend.prepare(make_metadata(backend, parts))
    qkv = torch.cat([part.qkv[part.first : part.last] for part in parts])
    out = backend.forward(qkv, cache, prepared, window)
    return list(out.split([part.last - part.first for part in parts]))


def whole_attention(
    shape: AttentionShape, qkv: torch.Tensor, cache_dtype: torch.dtype, window: int = 10**6
) -> torch.Tensor:
    """Causal attention over one sequence without any cache, keys and values rounded as the cache would."""
    heads = qkv.view(len(qkv), -1, shape.head_dim).transpose(0, 1)
    query, key, value = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads])
    key, value = key.to(cache_dtype).float(), value.to(cache_dtype).float()
    positions = torch.arange(len(qkv))
    distance = positions[:, None] - positions
    is_visible = (distance >= 0) & (distance < window)
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=is_visible, enable_gqa=True)
    return out.transpose(0, 1).reshape(len(qkv), -1)


def assert_near(
    out: torch.Tensor, shape: AttentionShape, qkv: torch.Tensor, dtype: torch.dtype, window: int = 10**6
) -> None:
    """Compare with whole attention: within what sums in float32 lose, and the rounding of queries and weights."""
    if not shape.is_rounded or dtype != torch.bfloat16:
        torch.testing.assert_close(out, whole_attention(shape, qkv, dtype, window), atol=2e-5, rtol=1e-4)
        return
    qkv = qkv.clone()
    queries, values = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    scale = math.log2(math.e) * shape.head_dim**-0.5
    qkv[:, :queries] = (qkv[:, :queries] * scale).bfloat16().float() / scale
    expected = whole_attention(shape, qkv, dtype, window)
    qkv[:, -values:] = qkv[:, -values:].abs()
    assert ((out - expected).abs() <= whole_attention(shape, qkv, dtype, window) * (2**-8 + 2**-13) + 1e-6).all()


@pytest.mark.parametrize("is_rounded", ROUNDED)
@pytest.mark.parametrize("spread", [1, 8])
@pytest.mark.parametrize("window", [None, 1500, 30])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
def test_long_contexts_have_the_same_bits_on_any_number_of_threads(
    shape: AttentionShape, window: int | None, spread: int, is_rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread all parts of the keys are one work item, with many each is one; a chunk ends within a part.

    Scores that are spread widely give rows another base now and then, each row at another key.
    """
    shape = dataclasses.replace(shape, is_rounded=is_rounded)
    length, edges = 2100, [0, 1030, 2096, 2099, 2100]
    num_blocks = -(-length // BLOCK_SIZE)
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3)).tolist()
    qkv = random_qkv(shape, length, 7)
    qkv[:, : shape.num_heads * shape.head_dim] *= spread
    outputs = []
    for num_threads, cuts in ((1, [0, length]), (1, edges), (64, edges)):
        monkeypatch.setattr("engine.attention.cpu.get_num_threads", lambda count=num_threads: count)
        backend = CpuAttention(shape, BLOCK_SIZE)
        cache = stale_cache(backend, torch.bfloat16, num_blocks)
        parts = [Part(qkv, first, last, blocks) for first, last in zip(cuts, cuts[1:], strict=False)]
        outputs.append(torch.cat([run(backend, cache, [part], window)[0] for part in parts]))
        num_items = len(make_metadata(backend, parts[-1:]).work_items)
        assert num_items == (3 if num_threads == 64 else -(-(cuts[-1] - cuts[-2]) // backend.tile_tokens))
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])
    if spread == 1:
        assert_near(outputs[0], shape, qkv, torch.bfloat16, window or 10**6)


@pytest.mark.parametrize("backend_class", BACKENDS, ids=backends_here(ATTENTION_BACKENDS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("is_rounded", ROUNDED)
def test_prompts_side_by_side(backend_class: Any, shape: AttentionShape, dtype: torch.dtype, is_rounded: bool) -> None:
    shape = dataclasses.replace(shape, is_rounded=is_rounded)
    backend = backend_class(shape, BLOCK_SIZE)
    qkvs = [random_qkv(shape, length, seed) for seed, length in enumerate(LENGTHS)]
    parts = [Part(qkv, 0, len(qkv), blocks) for qkv, blocks in zip(qkvs, deal_blocks(LENGTHS), strict=True)]
    for out, part in zip(run(backend, stale_cache(backend, dtype), parts), parts, strict=True):
        exact = dataclasses.replace(shape, is_rounded=False)
        assert_near(out, shape if backend_class is CpuAttention else exact, part.qkv, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
def test_decodes_chunks_and_prompts_in_one_step_equal_the_reference(shape: AttentionShape, dtype: torch.dtype) -> None:
    lengths = [33, 16, 17, 50, 1, 48]
    firsts = [32, 15, 16, 19, 0, 16]  # last tokens at block edges, a chunk across three blocks, a prompt, a chunk
    tables = deal_blocks(lengths, seed=1)
    qkvs = [random_qkv(shape, length, seed) for seed, length in enumerate(lengths)]
    outputs = []
    for backend_class in BACKENDS:
        backend: Any = backend_class(shape, BLOCK_SIZE)
        cache = stale_cache(backend, dtype)
        rows = list(zip(qkvs, firsts, lengths, tables, strict=True))
        earlier = [Part(qkv, 0, first, blocks) for qkv, first, _, blocks in rows if first]
        run(backend, cache, earlier)
        outputs.append(torch.cat(run(backend, cache, [Part(*row) for row in rows])))
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("is_rounded", ROUNDED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_give_the_bits_of_the_whole(shape: AttentionShape, dtype: torch.dtype, is_rounded: bool) -> None:
    """The bits are the same however a prompt is cut, wherever its blocks lie and whatever runs beside it."""
    shape = dataclasses.replace(shape, is_rounded=is_rounded)
    length = 70
    qkv = random_qkv(shape, length, 7)
    backend = CpuAttention(shape, BLOCK_SIZE)
    (blocks,) = deal_blocks([length])
    (whole,) = run(backend, stale_cache(backend, dtype), [Part(qkv, 0, length, blocks)])
    other = random_qkv(shape, length, 8)
    for seed, cuts in enumerate(([16], [1, 2, 3], [15, 17, 33, 69], [40], list(range(1, length)))):
        blocks, other_blocks = deal_blocks([length, length], seed=10 + seed)
        cache = stale_cache(backend, dtype)
        edges = [0, *cuts, length]
        rows = []
        for first, last in zip(edges, edges[1:], strict=False):
            mate = Part(other, first, last, other_blocks)
            rows.append(run(backend, cache, [mate, Part(qkv, first, last, blocks)])[1])
        assert torch.equal(torch.cat(rows), whole)


@pytest.mark.parametrize("backend_class", BACKENDS, ids=backends_here(ATTENTION_BACKENDS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_prompts_within_a_window(backend_class: Any, shape: AttentionShape, window: int) -> None:
    backend = backend_class(shape, BLOCK_SIZE)
    qkvs = [random_qkv(shape, length, seed) for seed, length in enumerate(LENGTHS)]
    parts = [Part(qkv, 0, len(qkv), blocks) for qkv, blocks in zip(qkvs, deal_blocks(LENGTHS), strict=True)]
    for out, part in zip(run(backend, stale_cache(backend, torch.float32), parts, window), parts, strict=True):
        expected = whole_attention(shape, part.qkv, torch.float32, window)
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("is_rounded", ROUNDED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_within_a_window_equal_the_reference_and_give_the_bits_of_the_whole(
    shape: AttentionShape, window: int, is_rounded: bool
) -> None:
    shape = dataclasses.replace(shape, is_rounded=is_rounded)
    length = 70
    qkv = random_qkv(shape, length, 7)
    (blocks,) = deal_blocks([length])
    kernel, reference = CpuAttention(shape, BLOCK_SIZE), TorchAttention(shape, BLOCK_SIZE)
    (whole,) = run(kernel, stale_cache(kernel, torch.bfloat16), [Part(qkv, 0, length, blocks)], window)
    for cuts in ([16], [15, 17, 33, 69], [40], list(range(1, length))):
        edges = [0, *cuts, length]
        outputs = []
        for backend in (kernel, reference):
            cache = stale_cache(backend, torch.bfloat16)
            parts = [Part(qkv, first, last, blocks) for first, last in zip(edges, edges[1:], strict=False)]
            outputs.append(torch.cat([run(backend, cache, [part], window)[0] for part in parts]))
        assert torch.equal(outputs[0], whole)
        assert_near(whole, shape, qkv, torch.bfloat16, window)
        if not is_rounded:
            torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize("is_rounded", ROUNDED)
@pytest.mark.parametrize(("window", "num_read"), [(1, 1), (6, 1), (7, 2), (22, 2), (23, 3), (1000, 5)])
def test_blocks_before_the_window_are_not_read(window: int, num_read: int, is_rounded: bool, head_dim: int) -> None:
    """The newest of 70 tokens is the sixth of the fifth block."""
    shape, length = AttentionShape(4, 2, head_dim, is_rounded=is_rounded), 70
    qkv = random_qkv(shape, length, 7)
    backend = CpuAttention(shape, BLOCK_SIZE)
    (blocks,) = deal_blocks([length])
    cache = stale_cache(backend, torch.bfloat16 if is_rounded else torch.float32)
    (whole,) = run(backend, cache, [Part(qkv, 0, length, blocks)], window)
    for index, block in enumerate(blocks):
        broken = dataclasses.replace(cache, keys=cache.keys.clone(), values=cache.values.clone())
        for blocks_of_cache in broken.by_block(NUM_BLOCKS):
            blocks_of_cache[block] = torch.nan
        (last,) = run(backend, broken, [Part(qkv, length - 1, length, blocks)], window)
        assert torch.equal(last, whole[-1:]) == (index < len(blocks) - num_read)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40, 70])
@pytest.mark.parametrize("is_rounded", ROUNDED)
def test_what_a_step_writes_is_what_the_slots_hold(length: int, is_rounded: bool) -> None:
    """Keys and values in the layouts of `CpuAttention`: keys transposed in a block, values 16 dimensions at a time.

    Where activations are rounded two dimensions of a key lie side by side, and a dimension's values of two keys.
    """
    shape = dataclasses.replace(SHAPES[0], is_rounded=is_rounded)
    backend = CpuAttention(shape, BLOCK_SIZE)
    cache = stale_cache(backend, torch.bfloat16)
    qkv = random_qkv(shape, length, 3)
    (blocks,) = deal_blocks([length])
    run(backend, cache, [Part(qkv, 0, length, blocks)])
    heads, together = (shape.num_kv_heads, NUM_BLOCKS), 2 if is_rounded else 1
    keys = cache.keys.view(*heads, -1, BLOCK_SIZE, together).transpose(3, 4).flatten(2, 3)
    values = cache.values.view(*heads, -1, BLOCK_SIZE // together, LANES, together)
    values = values.transpose(4, 5).flatten(3, 4).transpose(2, 3).flatten(3)
    _, key, value = qkv.view(length, -1, shape.head_dim).split([4, 2, 2], dim=1)
    for position in range(length):
        block, offset = blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
        assert torch.equal(keys[:, block, :, offset], key[position].bfloat16())
        assert torch.equal(values[:, block, offset], value[position].bfloat16())
    assert int(keys.isfinite().sum()) == length * shape.num_kv_heads * shape.head_dim
    assert int(values.isfinite().sum()) == length * shape.num_kv_heads * shape.head_dim


def test_scores_far_apart_do_not_overflow() -> None:
    shape = SHAPES[0]
    qkv = random_qkv(shape, 40, 5) * 30
    backend = CpuAttention(shape, BLOCK_SIZE)
    (blocks,) = deal_blocks([40])
    (out,) = run(backend, stale_cache(backend, torch.float32), [Part(qkv, 0, 40, blocks)])
    torch.testing.assert_close(out, whole_attention(shape, qkv, torch.float32), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("is_rounded", ROUNDED)
def test_one_key_may_take_all_the_weight(sign: int, is_rounded: bool) -> None:
    """Its score is 1,000 above, or below, all others': their weights, or its own, are zeros, and nothing is NaN."""
    shape = dataclasses.replace(SHAPES[0], is_rounded=is_rounded)
    qkv = torch.ones(200, width_of(shape))
    key_start, value_start = 4 * shape.head_dim, 6 * shape.head_dim
    qkv[:, key_start:value_start] = 0.0
    qkv[70, key_start:value_start] = 250.0 * sign
    qkv[:, value_start:] = torch.arange(200.0)[:, None]
    backend = CpuAttention(shape, BLOCK_SIZE)
    blocks = list(range(13))
    (out,) = run(backend, stale_cache(backend, torch.bfloat16), [Part(qkv, 0, 200, blocks)])
    if sign > 0:
        assert (out[70:] == 70).all()
    else:
        torch.testing.assert_close(out[199], torch.full((64,), (199 * 100 - 70) / 199), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rise", [-20.0, -7.0, 1.0, 7.0, 9.0, 40.0])
@pytest.mark.parametrize("is_rounded", ROUNDED)
def test_scores_that_rise_from_span_to_span(rise: float, is_rounded: bool) -> None:
    """By less and by more than a row's base lets them, and so by more after some spans; across parts, too."""
    shape, length = dataclasses.replace(SHAPES[0], is_rounded=is_rounded), PART + 5 * SPAN
    qkv = random_qkv(shape, length, 5)
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    qkv[:, : queries + keys] = 0.0
    qkv[:, :queries:16] = 4.0 / math.log2(math.e)
    heights = rise * (torch.arange(length) // SPAN)
    qkv[:, queries : queries + keys : 16] = (heights + torch.arange(length) % 7 / 8)[:, None]
    backend, blocks = CpuAttention(shape, BLOCK_SIZE), list(range(-(-length // BLOCK_SIZE)))
    dtype = torch.bfloat16 if is_rounded else torch.float32
    (out,) = run(backend, stale_cache(backend, dtype, len(blocks)), [Part(qkv, 0, length, blocks)])
    assert_near(out, shape, qkv, dtype)


@pytest.mark.parametrize("is_rounded", ROUNDED)
@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 20])
def test_a_nan_of_the_sequence_itself_is_not_hidden(length: int, dtype: torch.dtype, is_rounded: bool) -> None:
    """A NaN must reach the logits, where the request is failed."""
    shape = dataclasses.replace(SHAPES[0], is_rounded=is_rounded)
    qkv = random_qkv(shape, length, 5)
    key_start = shape.num_heads * shape.head_dim
    qkv[0, key_start] = torch.nan
    backend = CpuAttention(shape, BLOCK_SIZE)
    (blocks,) = deal_blocks([length])
    (out,) = run(backend, stale_cache(backend, dtype), [Part(qkv, 0, length, blocks)])
    first_group = out.view(length, 4, 16)[:, :2]
    assert first_group.isnan().all()
    assert not out.view(length, 4, 16)[:, 2:].isnan().any()


@pytest.mark.parametrize("is_rounded", ROUNDED)
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("num_threads", [1, 2, 64])
def test_a_nan_does_not_reach_the_next_sequence(
    num_threads: int, window: int | None, is_rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items share the memory of their thread: those of parts, also of parts before the window, and of fewer rows."""
    monkeypatch.setattr("engine.attention.cpu.get_num_threads", lambda: num_threads)
    shape = dataclasses.replace(SHAPES[3], is_rounded=is_rounded)
    backend, num_blocks = CpuAttention(shape, BLOCK_SIZE), -(-2100 // BLOCK_SIZE)
    clean, faulty = random_qkv(shape, 2100, 7), torch.full((2100, width_of(shape)), torch.nan)
    cache = stale_cache(backend, torch.bfloat16, 3 * num_blocks)
    tables = [list(range(first, first + num_blocks)) for first in range(0, 3 * num_blocks, num_blocks)]
    run(backend, cache, [Part(clean, 0, 2099, tables[1])], window)
    contents = zip((faulty, clean, faulty), tables, strict=True)
    last = [Part(qkv, 2099, 2100, blocks) for qkv, blocks in contents]
    assert (make_metadata(backend, last).work_items[:, PARTIAL].max() >= 0) == (num_threads > 1)
    together = run(backend, cache, last, window)
    (alone,) = run(backend, cache, last[1:2], window)
    assert together[0].isnan().all()
    assert together[2].isnan().all()
    assert torch.equal(together[1], alone)
    assert alone.isfinite().all()


@pytest.mark.parametrize("is_rounded", ROUNDED)
def test_the_sign_of_zero_does_not_depend_on_chunks(is_rounded: bool) -> None:
    """A negative sum that is scaled by 0 is a negative zero, and stays one until it is added to 0."""
    shape = AttentionShape(1, 1, 16, is_rounded=is_rounded)
    qkv, (blocks,) = torch.zeros(66, width_of(shape)), deal_blocks([66])
    qkv[:, 0] = 4.0
    qkv[64:, 16] = 1000.0
    qkv[:64, 32:], qkv[64, 32:], qkv[65, 32:] = -1.0, -0.0, 1.0
    backend, outputs = CpuAttention(shape, BLOCK_SIZE), []
    for cuts in ([0, 66], [0, 64, 65, 66]):
        cache = stale_cache(backend, torch.bfloat16)
        parts = [Part(qkv, first, last, blocks) for first, last in itertools.pairwise(cuts)]
        outputs.append(torch.cat([run(backend, cache, [part])[0] for part in parts]))
    assert (outputs[0][64] == 0).all()
    assert torch.equal(outputs[0].view(torch.int32), outputs[1].view(torch.int32))


@pytest.mark.parametrize("backend_class", BACKENDS, ids=backends_here(ATTENTION_BACKENDS))
@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
def test_a_cache_takes_what_the_backend_says(backend_class: Any, dtype: torch.dtype) -> None:
    for block_size in backend_class.block_sizes:
        backend = backend_class(SHAPES[0], block_size)
        cache = backend.allocate(NUM_BLOCKS, dtype, torch.device("cpu"))
        assert cache.keys.nbytes + cache.values.nbytes == NUM_BLOCKS * backend.block_bytes(dtype)
        assert backend.block_size == block_size


@njit
def _weigh(cache: Any, differences: Any, weights: Any) -> None:
    for i in range(0, len(differences), LANES):
        store(weights, i, weights_of(cache, load16(differences, i)))


@njit
def _round_weights(cache: Any, weights: Any, scores: Any) -> None:
    for column in range(0, SPAN, 2 * LANES):
        store_weights(cache, scores, 1, column, load16(weights, column), load16(weights, column + LANES))


@pytest.mark.skipif(not HAS_PAIRS, reason="the processor has no AVX512-BF16")
def test_weights_of_pairs_are_exact_to_a_part_of_their_rounding() -> None:
    words, differences = np.empty(1, np.uint32), np.linspace(-126, 8, 1 << 20, dtype=np.float32)
    weights = np.empty_like(differences)
    _weigh(words, differences, weights)
    exact = np.exp2(differences.astype(np.float64))
    assert (np.abs(weights - exact) <= exact * 2**-18).all()
    edges = np.array([0, -0.0, 8, -151, -1e30, -np.inf, np.nan] + [0] * 9, np.float32)
    _weigh(words, edges, weights)
    assert weights[:6].tolist() == [1, 1, 256, 0, 0, 0]
    assert np.isnan(weights[6])


@pytest.mark.skipif(not HAS_PAIRS, reason="the processor has no AVX512-BF16")
def test_weights_of_pairs_are_rounded_to_the_nearest_and_lie_in_order() -> None:
    weights = torch.rand(SPAN, generator=torch.Generator().manual_seed(0))
    weights[:5] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0, 1.0, 1 + 2**-8 + 2**-20])
    weights[40] = torch.nan
    scores = np.zeros(2 * SPAN, np.float32)
    _round_weights(np.empty(1, np.uint32), weights.numpy(), scores)
    stored = torch.from_numpy(scores[SPAN:]).view(torch.bfloat16)[:SPAN]
    torch.testing.assert_close(stored, weights.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert not scores[:SPAN].any(), "another row's"


def test_what_the_backend_cannot_serve() -> None:
    assert CpuAttention.why_not(AttentionShape(4, 2, 64)) == []
    assert CpuAttention.why_not(AttentionShape(4, 2, 24)) == ["head_dim 24 is not a multiple of 16"]
    with pytest.raises(ValueError, match="blocks of 16 tokens, not 32"):
        CpuAttention(SHAPES[0], 32)


@pytest.mark.parametrize("window", [None, 20])
def test_the_reference_scores_a_few_queries_at_a_time(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of a whole prompt of 4,096 tokens would be 1.9 GB in float32, several times over."""
    shape, length, first = AttentionShape(4, 2, 16), 100, 37
    backend = TorchAttention(shape, BLOCK_SIZE)
    qkv = random_qkv(shape, length, 0)
    (table,) = deal_blocks([length])
    sizes: list[int] = []
    attend = functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        sizes.append(query.shape[0] * query.shape[1] * key.shape[1])
        return attend(query, key, *arguments, **options)

    def outputs() -> list[torch.Tensor]:
        cache = stale_cache(backend, torch.float32)
        parts = [Part(qkv, 0, first, table), Part(qkv, first, length, table)]
        return [run(backend, cache, [part], window)[0] for part in parts]

    whole = outputs()
    max_scores = 4 * length * 10
    monkeypatch.setattr("engine.attention.torch.MAX_SCORES", max_scores)
    monkeypatch.setattr("engine.attention.torch.functional.scaled_dot_product_attention", watched)
    for ours, theirs in zip(outputs(), whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert len(sizes) > 2 and max(sizes) <= max_scores
