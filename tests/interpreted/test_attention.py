"""Paged attention in Triton against the torch reference in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention import triton as triton_attention
from engine.attention.base import AttentionMetadata, AttentionShape, LayerCache
from engine.attention.torch import TorchAttention
from engine.attention.triton import CHUNK, FEW_TOKENS, NUM_PROGRAMS, TritonAttention
from engine.layers.base import RotaryTable, Rotation
from engine.layers.triton import TritonOps
from tests.diagonal import diagonal, long_but
from tests.interpreted.closeness import assert_close

BLOCK_SIZE = 16
SHAPES = [AttentionShape(7, 1, 64), AttentionShape(14, 2, 64), AttentionShape(4, 4, 80), AttentionShape(14, 2, 128)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

Part = tuple[int, int]
"""A sequence: how many query tokens it has, and how many tokens with them."""


@dataclasses.dataclass
class Scene:
    """Sequences whose cached tokens lie in scattered blocks, the rest of the cache being NaN."""

    shape: AttentionShape
    parts: list[Part]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(len(self.parts))
        counts = [-(-seq_len // BLOCK_SIZE) for _, seq_len in self.parts]
        self.num_blocks = sum(counts) + 1
        blocks = torch.randperm(self.num_blocks, generator=generator, dtype=torch.int32).split([*counts, 1])[:-1]
        self.table = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True)
        self.slots = [
            blocks[index][torch.arange(seq_len) // BLOCK_SIZE].long() * BLOCK_SIZE + torch.arange(seq_len) % BLOCK_SIZE
            for index, (_, seq_len) in enumerate(self.parts)
        ]
        num_tokens = sum(num_queries for num_queries, _ in self.parts)
        width = (self.shape.num_heads + 2 * self.shape.num_kv_heads) * self.shape.head_dim
        self.qkv = torch.randn(num_tokens, width, generator=generator).to(self.dtype)
        size = self.num_blocks * BLOCK_SIZE, self.shape.num_kv_heads, self.shape.head_dim
        self.stored = [torch.randn(size, generator=generator).to(self.dtype) for _ in "kv"]

    def cache(self, dtype: torch.dtype) -> LayerCache:
        """What earlier steps wrote, and NaN everywhere else."""
        cached = torch.cat([slots[:-count] for slots, (count, _) in zip(self.slots, self.parts, strict=True)])
        tensors = [torch.full(stored.shape, torch.nan, dtype=dtype) for stored in self.stored]
        for tensor, stored in zip(tensors, self.stored, strict=True):
            tensor[cached] = stored[cached].to(dtype)
        return LayerCache(*tensors)

    def metadata(self, backend: Any) -> AttentionMetadata:
        starts, seq_lens = [0], [seq_len for _, seq_len in self.parts]
        for num_queries, _ in self.parts:
            starts.append(starts[-1] + num_queries)
        written = [slots[-count:] for slots, (count, _) in zip(self.slots, self.parts, strict=True)]
        return AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            block_table=self.table,
            slot_mapping=torch.cat(written),
            work_items=torch.from_numpy(backend.work_items(starts, seq_lens, self.table.shape[1])),
            host_query_start_loc=starts,
            host_seq_lens=seq_lens,
        )

    def attend(self, backend: Any, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        out: torch.Tensor = backend.forward(
            self.qkv.to(dtype), self.cache(dtype), backend.prepare(self.metadata(backend)), window
        )
        return out


def check(shape: AttentionShape, parts: list[Part], dtype: torch.dtype, window: int | None = None) -> None:
    scene = Scene(shape, parts, dtype)
    expected = scene.attend(TorchAttention(shape, BLOCK_SIZE), torch.float64, window)
    assert_close(scene.attend(TritonAttention(shape, BLOCK_SIZE), dtype, window), expected)


@st.composite
def sequences(draw: st.DrawFn) -> Part:
    seq_len = draw(st.sampled_from([1, 2, 15, 16, 17, 32, 33, 64, 65, 130]))
    num_queries = draw(st.sampled_from([1, 2, 3, FEW_TOKENS, FEW_TOKENS + 1, 17, 40]))
    return min(num_queries, seq_len), seq_len


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    shape=st.sampled_from(SHAPES),
    parts=st.lists(sequences(), min_size=1, max_size=3),
    window=st.sampled_from([None, None, 1, 16, 33]),
)
@settings(max_examples=10)
def test_decodes_drafts_chunks_and_prompts(
    dtype: torch.dtype, shape: AttentionShape, parts: list[Part], window: int | None
) -> None:
    check(shape, parts, dtype, window)


@pytest.mark.parametrize("window", [None, 20, CHUNK + 3])
def test_long_sequences_are_split_and_combined(window: int | None) -> None:
    """Chunks that end where the sequence does, begin with its last token, and lie before the window."""
    parts = [(1, CHUNK), (3, CHUNK + 1), (1, CHUNK + 1), (1, 2 * CHUNK + 40), (1, 5), (10, CHUNK + 4)]
    check(AttentionShape(7, 1, 64), parts, torch.float32, window)


def test_a_row_has_the_same_bits_beside_any_others() -> None:
    shape = AttentionShape(14, 2, 64)
    backend = TritonAttention(shape, BLOCK_SIZE)
    parts = [(1, 70), (1, 2 * CHUNK + 1), (4, 20)]
    scene = Scene(shape, parts, torch.float32)
    together = scene.attend(backend, torch.float32, None)
    first = 0
    for index, (num_queries, seq_len) in enumerate(parts):
        alone = Scene(shape, [(num_queries, seq_len)], torch.float32)
        alone.qkv, alone.stored, alone.num_blocks = (
            scene.qkv[first : first + num_queries],
            scene.stored,
            scene.num_blocks,
        )
        alone.table, alone.slots = scene.table[index : index + 1], [scene.slots[index]]
        rows = slice(first, first + num_queries)
        assert torch.equal(alone.attend(backend, torch.float32, None), together[rows])
        first += num_queries


@pytest.mark.parametrize(("shape", "dtype"), diagonal(SHAPES, DTYPES))
def test_queries_and_keys_are_rotated_on_their_way(shape: AttentionShape, dtype: torch.dtype) -> None:
    """The same bits as if they were rotated before, here and in the cache."""
    scene = Scene(shape, [(1, 20), (9, 12)], dtype)
    angles = torch.rand(21, shape.head_dim // 2, generator=torch.Generator().manual_seed(1))
    rotation = Rotation(RotaryTable(angles.cos(), angles.sin()), torch.tensor([19, *range(3, 12)]))
    backend = TritonAttention(shape, BLOCK_SIZE)
    prepared = backend.prepare(scene.metadata(backend))
    caches = scene.cache(dtype), scene.cache(dtype)
    out = backend.forward(scene.qkv.clone(), caches[0], prepared, None, rotation)
    TritonOps().rotate(scene.qkv, rotation, shape.num_heads + shape.num_kv_heads)
    assert torch.equal(out, backend.forward(scene.qkv, caches[1], prepared))
    for name in ("keys", "values"):
        assert torch.equal(*(getattr(cache, name).nan_to_num(-9.0) for cache in caches))


Noted = tuple[str, tuple[int, ...], list[Any], dict[str, Any]]
"""A launch: kernel, grid, the arguments with shapes and strides in place of tensors, constants."""


def make_padded(scene: Scene, backend: TritonAttention, num_rows: int, num_lines: int) -> AttentionMetadata:
    """The step of `scene` as a graph gets it: in memory for `num_rows` rows, a plan of `num_lines` lines and more."""
    step = scene.metadata(backend)
    slots = torch.full((num_rows,), -1)
    slots[: len(step.slot_mapping)] = step.slot_mapping
    plan = torch.full((num_lines, step.work_items.shape[1]), 10**6, dtype=torch.int32)
    plan[: len(step.work_items)] = step.work_items
    table = torch.full((400,), 10**6, dtype=torch.int32)
    table[: step.block_table.numel()] = step.block_table.flatten()
    return dataclasses.replace(
        step,
        slot_mapping=slots,
        work_items=plan,
        block_table=table,
        host_query_start_loc=range(num_rows + 1),
        host_seq_lens=[1] * num_rows,
    )


def attend_padded(
    scene: Scene, backend: TritonAttention, cache: LayerCache, num_rows: int, window: int | None = None
) -> torch.Tensor:
    """All rows of a padded step; those of padding have NaN in qkv."""
    qkv = torch.full((num_rows, scene.qkv.shape[1]), torch.nan, dtype=scene.dtype)
    qkv[: len(scene.qkv)] = scene.qkv
    prepared = backend.prepare(make_padded(scene, backend, num_rows, num_lines=64))
    return backend.forward(qkv, cache, prepared, window)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written to holds NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*sizes: Any, **options: Any) -> torch.Tensor:
        memory = new_empty(*sizes, **options)
        return memory.fill_(torch.nan) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


DECODES = [
    [(1, 2 * CHUNK + 7), (3, CHUNK + 1), (1, 5)],
    [(1, 16)],
    [(2, 3 * CHUNK), (1, CHUNK), (1, CHUNK + 1), (1, 33)],
]
"""Steps of up to 5 rows, with drafts; some have more items than programs."""


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("window", long_but([None, CHUNK + 3], CHUNK + 3))
def test_rows_of_padding_change_nothing(window: int | None) -> None:
    backend = TritonAttention(AttentionShape(14, 2, 64), BLOCK_SIZE)
    for parts in DECODES:
        scene = Scene(AttentionShape(14, 2, 64), parts, torch.float32)
        has_more_items_than_programs = scene.metadata(backend).work_items[0, 0] > NUM_PROGRAMS // 2
        assert has_more_items_than_programs == (len(parts) > 1)
        alone = scene.attend(backend, torch.float32, window)
        assert not alone.isnan().any()
        assert torch.equal(attend_padded(scene, backend, scene.cache(torch.float32), 8, window)[: len(alone)], alone)


def test_a_row_of_padding_writes_no_keys_and_values() -> None:
    scene = Scene(AttentionShape(14, 2, 64), [(1, 20)], torch.float32)
    backend = TritonAttention(scene.shape, BLOCK_SIZE)
    whole, padded = scene.cache(torch.float32), scene.cache(torch.float32)
    backend.forward(scene.qkv, whole, backend.prepare(scene.metadata(backend)))
    qkv = torch.cat([scene.qkv, scene.qkv + 1])
    backend.forward(qkv, padded, backend.prepare(make_padded(scene, backend, 2, num_lines=64)))
    for name in ("keys", "values"):
        assert torch.equal(getattr(padded, name).nan_to_num(-9.0), getattr(whole, name).nan_to_num(-9.0))


def noted_launches(monkeypatch: pytest.MonkeyPatch, backend: TritonAttention, parts: list[Part]) -> list[Noted]:
    """The launches of a step that is padded to 8 rows."""
    noted: list[Noted] = []

    def note(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        numbers = [(x.shape, x.stride()) if isinstance(x, torch.Tensor) else x for x in arguments]
        if 0 not in grid:
            noted.append((kernel.fn.__name__, grid, numbers, constants))

    scene = Scene(AttentionShape(14, 2, 64), parts, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(triton_attention, "launch", note)
        attend_padded(scene, backend, backend.allocate(100, torch.float32, torch.device("cpu")), 8)
    return noted


def test_steps_of_as_many_rows_make_the_same_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TritonAttention(AttentionShape(14, 2, 64), BLOCK_SIZE)
    first, *others = [noted_launches(monkeypatch, backend, parts) for parts in DECODES]
    assert [name for name, *_ in first] == ["write_kernel", "attend_kernel", "combine_kernel"]
    assert all(launches == first for launches in others)


def test_an_argument_that_depends_on_lengths_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Planted(TritonAttention):
        def _attend(self, qkv: Any, cache: Any, results: Any, step: Any, rows: int, programs: int, window: Any) -> None:
            super()._attend(qkv, cache, results, step, rows, programs, int(step.seq_lens.max()))

    backend = Planted(AttentionShape(14, 2, 64), BLOCK_SIZE)
    first, second, _ = [noted_launches(monkeypatch, backend, parts) for parts in DECODES]
    assert first != second


def test_too_many_heads_for_a_tile_are_refused() -> None:
    assert TritonAttention.why_not(AttentionShape(16, 1, 64)) == []
    assert TritonAttention.why_not(AttentionShape(17, 1, 64)) == ["17 heads share a key, more than 16"]
