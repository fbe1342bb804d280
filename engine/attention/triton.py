"""Attention in Triton: a plan of work items that is made on the host, and three launches a layer, four with prompts.

A sequence with few query tokens, as in decode or with a draft, is cut along its cached tokens: each chunk of a tile is
a work item, and a kernel of its own combines them. Prompts have larger tiles, whose items have all of their chunks.

The plan is data on the device. Without large tiles, launches and their arguments depend on the number of rows alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.attention.base import AttentionMetadata, AttentionShape, LayerCache
from engine.attention.triton_kernels import attend_kernel, combine_kernel, write_kernel
from engine.layers.base import Rotation
from quant.kernels.launch import IS_INTERPRETED, launch

CHUNK = 256
"""Cached tokens that are attended to in one go."""
FEW_TOKENS = 8
"""Query tokens up to which a sequence has small tiles: decode and drafts."""
SMALL_TILE, LARGE_TILE = 16, 64
"""Rows of a tile: query tokens times the heads that share a key and value head."""
TILE_KEYS = {SMALL_TILE: 32, LARGE_TILE: 64}
"""Cached tokens that a tile is multiplied with at a time; small tiles would spill with more."""
STAGES = {SMALL_TILE: 3, LARGE_TILE: 2}
"""Times that keys and values are loaded ahead; small tiles spill with fewer, large ones have no room for more."""
WIDE_BYTES, WIDE_TILE_KEYS, WIDE_STAGES = 4, 32, 1
"""Bytes of a number from which on a tile has room for this many keys, which are not loaded ahead."""
NUM_PROGRAMS = 6 if IS_INTERPRETED else 1024
"""Programs that share the small tiles: some for each multiprocessor of a large card, but interpreted ones take long."""
CHUNKS_AT_A_TIME = 16
"""Chunks of a token that are combined in one go."""
WRITTEN_HEADS = 4
"""Heads of a token that one program rotates and writes."""
NO_WINDOW = 2**31 - 1
NUM_FIELDS = 8
"""Numbers in a line of the plan, int32.

- The first line: how many items have small tiles and the line of the first, the same of large tiles, how many rows.
- A line for each query token: its first partial result, the step from one to the next, their number; 0 where its tile
  is not split.
- A line for each item: the row of its first query token, their number, the position of the first, where its sequence's
  blocks begin in the block table, its first chunk, the end of its chunks, and its first partial result, which those of
  its other tokens follow; -1: its result is complete.
- Lines without meaning, so that there are at least as many after the rows' as there are partial results. Without large
  tiles their number depends on the sequences alone, not on how many heads share a key: ranks with other heads have
  plans of the same size, so that all or none find place for them in a graph.
"""
SMALL_HEADER, LARGE_HEADER, ROWS_HEADER = 0, 2, 4

Integers = npt.NDArray[np.int32]
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The attended heads, the partial results, and their maxima and sums."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """One step as `forward` needs it."""

    metadata: AttentionMetadata
    num_large_items: int
    num_partials: int
    """Partial results that there is place for, at least as many as the plan has."""


class TritonAttention:
    """`base.AttentionBackend` on GPUs."""

    block_sizes = (16, 32, 64, 128)
    max_captured_tokens = FEW_TOKENS
    has_rotation = True

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

    def work_items(self, query_start_loc: Sequence[int], seq_lens: Sequence[int], table_width: int) -> Integers:
        """The plan [lines, NUM_FIELDS]."""
        step = np.asarray(query_start_loc, np.int32), np.asarray(seq_lens, np.int32), table_width
        small = _tiles(*step, self._tile_tokens[SMALL_TILE], is_few=True)
        large = _tiles(*step, self._tile_tokens[LARGE_TILE], is_few=False)
        num_rows = query_start_loc[-1]
        num_small, num_large = int(small.num_chunks.sum()), len(large.num_chunks)
        is_split = small.num_chunks > 1
        num_partials = np.where(is_split, small.num_chunks * small.num_tokens, 0)
        num_lines = 1 + num_rows + max(num_small + num_large, _max_partials(*step[:2]))
        plan = np.zeros((num_lines, NUM_FIELDS), np.int32)
        first_small = 1 + num_rows
        first_large = first_small + num_small
        plan[0, :5] = num_small, first_small, num_large, first_large, num_rows
        first_partial = num_partials.cumsum() - num_partials
        _write_rows(plan[1:first_small], small, first_partial, is_split)
        _write_chunks(plan[first_small:first_large], small, first_partial, is_split)
        _write_tiles(plan[first_large : first_large + num_large], large)
        return plan

    def work_bytes(self, num_items: int) -> int:
        """The partial results, and their maxima and sums: one for each line of the plan."""
        return num_items * self._shape.num_heads * (self._shape.head_dim + 2) * torch.float32.itemsize

    def prepare(self, metadata: AttentionMetadata) -> _Step:
        starts = metadata.host_query_start_loc
        num_queries = np.diff(np.asarray(starts))
        num_large = int((-(-num_queries[num_queries > FEW_TOKENS] // self._tile_tokens[LARGE_TILE])).sum())
        # Without large tiles, as in a graph, the size of the plan is all that counts.
        num_lines = metadata.work_items.shape[0] - 1
        return _Step(metadata, num_large, num_partials=num_lines - starts[-1] if num_large else num_lines)

    def forward(
        self,
        qkv: torch.Tensor,
        cache: LayerCache,
        prepared: _Step,
        window: int | None = None,
        rotation: Rotation | None = None,
    ) -> torch.Tensor:
        metadata = prepared.metadata
        self._write(qkv, cache, metadata.slot_mapping, rotation)
        shape = self._shape
        out = qkv.new_empty(qkv.shape[0], shape.num_heads * shape.head_dim)
        partial = qkv.new_empty(prepared.num_partials, shape.num_heads, shape.head_dim, dtype=torch.float32)
        stats = qkv.new_empty(prepared.num_partials, shape.num_heads, 2, dtype=torch.float32)
        results = out, partial, stats
        num_programs = max(1, NUM_PROGRAMS // shape.num_kv_heads)
        self._attend(qkv, cache, results, metadata, SMALL_TILE, num_programs, window)
        self._attend(qkv, cache, results, metadata, LARGE_TILE, prepared.num_large_items, window)
        self._combine(results, metadata)
        return out

    def _write(self, qkv: torch.Tensor, cache: LayerCache, slots: torch.Tensor, rotation: Rotation | None) -> None:
        shape = self._shape
        num_heads, half = shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim // 2
        angles = (qkv, qkv, slots) if rotation is None else (rotation.table.cos, rotation.table.sin, rotation.rows)
        launch(
            write_kernel,
            (qkv.shape[0], -(-num_heads // WRITTEN_HEADS)),
            qkv,
            slots,
            cache.keys,
            cache.values,
            *angles,
            NUM_HEADS=shape.num_heads,
            NUM_KV_HEADS=shape.num_kv_heads,
            HALF=half,
            BLOCK=_power_of_two(half),
            HEADS=WRITTEN_HEADS,
            HAS_ROTATION=rotation is not None,
            num_warps=1,
        )

    def _attend(
        self,
        qkv: torch.Tensor,
        cache: LayerCache,
        results: Results,
        metadata: AttentionMetadata,
        tile_rows: int,
        num_programs: int,
        window: int | None,
    ) -> None:
        shape, is_wide = self._shape, qkv.itemsize >= WIDE_BYTES
        launch(
            attend_kernel,
            (num_programs, shape.num_kv_heads),
            qkv,
            cache.keys,
            cache.values,
            *results,
            metadata.work_items,
            metadata.block_table,
            NO_WINDOW if window is None else window,
            shape.head_dim**-0.5,
            HEADER=SMALL_HEADER if tile_rows == SMALL_TILE else LARGE_HEADER,
            NUM_FIELDS=NUM_FIELDS,
            NUM_HEADS=shape.num_heads,
            NUM_KV_HEADS=shape.num_kv_heads,
            HEAD_DIM=shape.head_dim,
            BLOCK_DIM=_power_of_two(shape.head_dim),
            BLOCK_SIZE=self.block_size,
            TILE_ROWS=tile_rows,
            TILE_KEYS=WIDE_TILE_KEYS if is_wide else TILE_KEYS[tile_rows],
            CHUNK=CHUNK,
            WIDEN=IS_INTERPRETED,
            num_stages=WIDE_STAGES if is_wide else STAGES[tile_rows],
        )

    def _combine(self, results: Results, metadata: AttentionMetadata) -> None:
        shape = self._shape
        out, partial, stats = results
        launch(
            combine_kernel,
            (out.shape[0], shape.num_heads),
            partial,
            stats,
            out,
            metadata.work_items,
            HEADER=ROWS_HEADER,
            NUM_FIELDS=NUM_FIELDS,
            NUM_HEADS=shape.num_heads,
            HEAD_DIM=shape.head_dim,
            BLOCK_DIM=_power_of_two(shape.head_dim),
            CHUNKS=CHUNKS_AT_A_TIME,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Tiles:
    """Tiles of query tokens; each number is an array [num_tiles]."""

    first_row: Integers
    num_tokens: Integers
    first_position: Integers
    first_block: Integers
    """Where the sequence's blocks begin in the block table."""
    num_chunks: Integers


def _max_partials(starts: Integers, lens: Integers) -> int:
    """Partial results and items of the small tiles together at most, whatever the tiles: all chunks for each token."""
    num_queries = starts[1:] - starts[:-1]
    chunks = (lens - 1) // CHUNK + 1
    return int((num_queries * chunks)[num_queries <= FEW_TOKENS].sum())


def _tiles(starts: Integers, lens: Integers, table_width: int, tile_tokens: int, *, is_few: bool) -> _Tiles:
    """The tiles of the sequences that have few query tokens, or of those that have more."""
    num_queries = starts[1:] - starts[:-1]
    sequences = np.flatnonzero((num_queries <= FEW_TOKENS) == is_few).astype(np.int32)
    counts = -(-num_queries[sequences] // tile_tokens)
    sequence, first = sequences.repeat(counts), _count_up(counts) * tile_tokens
    num_tokens = np.minimum(num_queries[sequence] - first, tile_tokens)
    position = lens[sequence] - num_queries[sequence] + first
    return _Tiles(
        starts[sequence] + first, num_tokens, position, sequence * table_width, (position + num_tokens - 1) // CHUNK + 1
    )


def _write_rows(lines: Integers, tiles: _Tiles, first_partial: Integers, is_split: npt.NDArray[np.bool_]) -> None:
    """The lines of query tokens, of which those in split tiles have partial results."""
    counts = tiles.num_tokens[is_split]
    place = _count_up(counts)
    rows = tiles.first_row[is_split].repeat(counts) + place
    lines[rows, 0] = first_partial[is_split].repeat(counts) + place
    lines[rows, 1] = counts.repeat(counts)
    lines[rows, 2] = tiles.num_chunks[is_split].repeat(counts)


def _write_chunks(lines: Integers, tiles: _Tiles, first_partial: Integers, is_split: npt.NDArray[np.bool_]) -> None:
    """An item for each chunk of each tile."""
    whole = np.zeros((len(tiles.num_chunks), NUM_FIELDS), np.int32)
    _write_tiles(whole, tiles)
    whole[:, 6] = np.where(is_split, first_partial, -1)
    chunk = _count_up(tiles.num_chunks)
    lines[...] = whole.repeat(tiles.num_chunks, axis=0)
    lines[:, 4] = chunk
    lines[:, 5] = chunk + 1
    lines[:, 6] += chunk * np.where(is_split, tiles.num_tokens, 0).repeat(tiles.num_chunks)


def _write_tiles(lines: Integers, tiles: _Tiles) -> None:
    """An item for each tile, with all of its chunks."""
    lines[:, 0] = tiles.first_row
    lines[:, 1] = tiles.num_tokens
    lines[:, 2] = tiles.first_position
    lines[:, 3] = tiles.first_block
    lines[:, 5] = tiles.num_chunks
    lines[:, 6] = -1


def _count_up(counts: Integers) -> Integers:
    """0 to count - 1 for each of the counts, one after the other."""
    return np.arange(counts.sum()) - (counts.cumsum() - counts).repeat(counts)


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
