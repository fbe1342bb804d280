"""Attention in Triton: work items that are planned on the host, and up to four launches a layer.

A sequence with few query tokens, as in decode or with a draft, is cut along its cached tokens: each chunk of a tile is
a work item, and a kernel of its own combines them. Prompts have larger tiles, whose items have all of their chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import AttentionMetadata, AttentionShape, LayerCache
from engine.attention.triton_kernels import attend_kernel, combine_kernel, write_kernel
from quant.kernels.launch import IS_INTERPRETED, launch

CHUNK = 256
"""Cached tokens that are attended to in one go."""
FEW_TOKENS = 8
"""Query tokens up to which a sequence has small tiles: decode and drafts."""
SMALL_TILE, LARGE_TILE = 16, 64
"""Rows of a tile: query tokens times the heads that share a key and value head."""
TILE_KEYS = 64
"""Cached tokens that a tile is multiplied with at a time; small tiles of long heads would spill with so many."""
WRITE_BLOCK = 512
NO_WINDOW = 2**31 - 1
NUM_FIELDS = 6
"""A work item: its sequence, the first of its query tokens, its first chunk, the end of its chunks, partial, chunks.

The result goes to row `partial` of the partial results, where those of a tile's chunks lie one after the other, as many
as `chunks` says; -1: it is complete.
"""

Integers = npt.NDArray[np.int64]
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The attended heads, the partial results, and their maxima and sums."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """One step as `forward` needs it: its items are split tiles, other small tiles and large tiles, in this order."""

    metadata: AttentionMetadata
    num_split_tiles: int
    num_small_items: int
    """Items with small tiles, of which a split tile has one for each chunk."""
    num_partials: int


class TritonAttention:
    """`base.AttentionBackend` on GPUs."""

    block_sizes = (16, 32, 64, 128)
    is_capturable = False
    max_captured_tokens = FEW_TOKENS

    @staticmethod
    def why_not(shape: AttentionShape) -> list[str]:
        group = shape.num_heads // shape.num_kv_heads
        return [f"{group} heads share a key, more than {SMALL_TILE}"] if group > SMALL_TILE else []

    def __init__(self, shape: AttentionShape, block_size: int) -> None:
        self._shape = shape
        self.block_size = block_size
        group = shape.num_heads // shape.num_kv_heads
        self._tile_tokens = {rows: rows // group for rows in (SMALL_TILE, LARGE_TILE)}

    def block_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.block_size * self._shape.num_kv_heads * self._shape.head_dim * dtype.itemsize

    def allocate(self, num_blocks: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        size = (num_blocks * self.block_size, self._shape.num_kv_heads, self._shape.head_dim)
        return LayerCache(torch.zeros(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device))

    def work_items(self, query_start_loc: Sequence[int], seq_lens: Sequence[int]) -> Integers:
        """Items [num_items, fields]: the first chunks of split tiles, their others, small tiles, large tiles."""
        split, small = self._small_tiles(query_start_loc, seq_lens)
        return np.concatenate(
            [self._chunks(split), small.items(), self._large_tiles(query_start_loc, seq_lens).items()]
        )

    def _small_tiles(self, query_start_loc: Sequence[int], seq_lens: Sequence[int]) -> tuple[_Tiles, _Tiles]:
        """The tiles of sequences with few query tokens: those with several chunks, and the others."""
        tiles = _tiles(query_start_loc, seq_lens, self._tile_tokens[SMALL_TILE], is_few=True)
        return tiles.where(tiles.num_chunks > 1), tiles.where(tiles.num_chunks <= 1)

    def _large_tiles(self, query_start_loc: Sequence[int], seq_lens: Sequence[int]) -> _Tiles:
        return _tiles(query_start_loc, seq_lens, self._tile_tokens[LARGE_TILE], is_few=False)

    def _chunks(self, tiles: _Tiles) -> Integers:
        """An item for each chunk of the tiles, the first chunks before all others."""
        chunk = _count_up(tiles.num_chunks)
        items = np.repeat(tiles.items(), tiles.num_chunks, axis=0)
        num_tokens = np.repeat(tiles.num_tokens, tiles.num_chunks)
        items[:, 2], items[:, 3], items[:, 4] = chunk, chunk + 1, np.cumsum(num_tokens) - num_tokens
        return np.concatenate([items[chunk == 0], items[chunk > 0]])

    def prepare(self, metadata: AttentionMetadata) -> _Step:
        split, small = self._small_tiles(metadata.host_query_start_loc, metadata.host_seq_lens)
        return _Step(
            metadata,
            num_split_tiles=len(split.sequence),
            num_small_items=int(split.num_chunks.sum()) + len(small.sequence),
            num_partials=int((split.num_chunks * split.num_tokens).sum()),
        )

    def forward(self, qkv: torch.Tensor, cache: LayerCache, prepared: _Step, window: int | None = None) -> torch.Tensor:
        self._write(qkv, cache, prepared.metadata.slot_mapping)
        shape, num_partials = self._shape, max(prepared.num_partials, 1)
        out = qkv.new_empty(qkv.shape[0], shape.num_heads * shape.head_dim)
        partial = qkv.new_empty(num_partials, shape.num_heads, shape.head_dim, dtype=torch.float32)
        stats = qkv.new_empty(num_partials, shape.num_heads, 2, dtype=torch.float32)
        num_small, num_items = prepared.num_small_items, prepared.metadata.work_items.shape[0]
        for rows, first, last in ((SMALL_TILE, 0, num_small), (LARGE_TILE, num_small, num_items)):
            self._attend(qkv, cache, (out, partial, stats), prepared.metadata, rows, range(first, last), window)
        self._combine((out, partial, stats), prepared)
        return out

    def _write(self, qkv: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        shape = self._shape
        launch(
            write_kernel,
            (qkv.shape[0], -(-shape.num_kv_heads * shape.head_dim // WRITE_BLOCK)),
            qkv,
            slots,
            cache.keys,
            cache.values,
            NUM_HEADS=shape.num_heads,
            NUM_KV_HEADS=shape.num_kv_heads,
            HEAD_DIM=shape.head_dim,
            BLOCK=WRITE_BLOCK,
        )

    def _attend(
        self,
        qkv: torch.Tensor,
        cache: LayerCache,
        results: Results,
        metadata: AttentionMetadata,
        tile_rows: int,
        items: range,
        window: int | None,
    ) -> None:
        shape = self._shape
        launch(
            attend_kernel,
            (len(items), shape.num_kv_heads),
            qkv,
            cache.keys,
            cache.values,
            *results,
            metadata.work_items,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_table,
            items.start,
            metadata.block_table.shape[1],
            NO_WINDOW if window is None else window,
            shape.head_dim**-0.5,
            NUM_FIELDS=NUM_FIELDS,
            NUM_HEADS=shape.num_heads,
            NUM_KV_HEADS=shape.num_kv_heads,
            HEAD_DIM=shape.head_dim,
            BLOCK_DIM=_power_of_two(shape.head_dim),
            BLOCK_SIZE=self.block_size,
            TILE_ROWS=tile_rows,
            TILE_KEYS=TILE_KEYS // 2 if tile_rows == SMALL_TILE and shape.head_dim > 64 else TILE_KEYS,
            CHUNK=CHUNK,
            WIDEN=IS_INTERPRETED,
        )

    def _combine(self, results: Results, prepared: _Step) -> None:
        shape, metadata = self._shape, prepared.metadata
        out, partial, stats = results
        tokens = self._tile_tokens[SMALL_TILE]
        launch(
            combine_kernel,
            (prepared.num_split_tiles * tokens, shape.num_heads),
            partial,
            stats,
            out,
            metadata.work_items,
            metadata.query_start_loc,
            NUM_FIELDS=NUM_FIELDS,
            TOKENS=tokens,
            NUM_HEADS=shape.num_heads,
            HEAD_DIM=shape.head_dim,
            BLOCK_DIM=_power_of_two(shape.head_dim),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of query tokens; each number is an array [num_tiles]."""

    sequence: Integers
    first_token: Integers
    num_tokens: Integers
    num_chunks: Integers

    def where(self, condition: npt.NDArray[np.bool_]) -> _Tiles:
        """The tiles for which the condition holds."""
        return _Tiles(*(getattr(self, field.name)[condition] for field in dataclasses.fields(self)))

    def items(self) -> Integers:
        """An item for each tile, with all of its chunks."""
        zeros = np.zeros_like(self.sequence)
        fields = self.sequence, self.first_token, zeros, self.num_chunks, zeros - 1, self.num_chunks
        return np.stack(fields, axis=1)


def _tiles(query_start_loc: Sequence[int], seq_lens: Sequence[int], tile_tokens: int, *, is_few: bool) -> _Tiles:
    """The tiles of the sequences that have few query tokens, or of those that have more."""
    starts, lens = np.asarray(query_start_loc, np.int64), np.asarray(seq_lens, np.int64)
    num_queries: Integers = starts[1:] - starts[:-1]
    sequences = np.flatnonzero((num_queries <= FEW_TOKENS) == is_few)
    counts = -(-num_queries[sequences] // tile_tokens)
    sequence, first = np.repeat(sequences, counts), _count_up(counts) * tile_tokens
    num_tokens = np.minimum(num_queries[sequence] - first, tile_tokens)
    last_position = lens[sequence] - num_queries[sequence] + first + num_tokens - 1
    return _Tiles(sequence, first, num_tokens, last_position // CHUNK + 1)


def _count_up(counts: Integers) -> Integers:
    """0 to count - 1 for each of the counts, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
