"""Sequences in the middle of a step: their cached keys and values in scattered blocks, and what a backend needs."""

from __future__ import annotations

import dataclasses
from array import array
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_proof.inputs import Inputs
from engine.attention.base import AttentionMetadata, AttentionShape, LayerCache
from engine.step_buffers import StepBuffers
from engine.step_inputs import StepInputs

Part = tuple[int, int]
"""A sequence: how many query tokens it has, and how many tokens with them."""


def attention_inputs(parts: list[Part], tables: list[list[int]]) -> StepInputs:
    """A step of the sequences whose blocks are `tables`, as far as attention goes."""
    starts = [0]
    for num_queries, _ in parts:
        starts.append(starts[-1] + num_queries)
    width = max(len(table) for table in tables)
    padded = array("i", [block for table in tables for block in [*table, *[0] * (width - len(table))]])
    return StepInputs(
        input_ids=[0] * starts[-1],
        query_start_loc=starts,
        seq_lens=[seq_len for _, seq_len in parts],
        block_table=padded.tobytes(),
        prompt_lens=[seq_len for _, seq_len in parts],
        logits_indices=[],
        scored_indices=[],
        scored_token_ids=[],
    )


@dataclasses.dataclass(frozen=True)
class Scene:
    """Queries, keys and values of a step, and a cache that is NaN wherever nothing was written."""

    shape: AttentionShape
    block_size: int
    parts: list[Part]
    tables: list[list[int]]
    qkv: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def random(
        cls, inputs: Inputs, shape: AttentionShape, block_size: int, parts: list[Part], dtype: torch.dtype
    ) -> Scene:
        counts = [-(-seq_len // block_size) for _, seq_len in parts]
        blocks = torch.randperm(sum(counts) + 1, device=inputs.generator.device, generator=inputs.generator).tolist()
        ends = np.cumsum([0, *counts])
        tables = [blocks[start:end] for start, end in zip(ends, ends[1:], strict=False)]
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        qkv = inputs.normal(sum(num_queries for num_queries, _ in parts), width, dtype=dtype)
        size = len(blocks) * block_size, shape.num_kv_heads, shape.head_dim
        keys, values = inputs.normal(*size, dtype=dtype), inputs.normal(*size, dtype=dtype)
        scene = cls(shape, block_size, parts, tables, qkv, keys, values)
        is_unknown = torch.ones(size[0], dtype=torch.bool)
        for part, table in zip(parts, tables, strict=True):
            is_unknown[scene._cached_slots(part, table)] = False
        for cached in (keys, values):
            cached[is_unknown.to(cached.device)] = torch.nan
        return scene

    def _cached_slots(self, part: Part, table: list[int]) -> torch.Tensor:
        """Slots of the tokens that earlier steps have computed."""
        positions = torch.arange(part[1] - part[0])
        return torch.tensor(table)[positions // self.block_size] * self.block_size + positions % self.block_size

    def cache(self, dtype: torch.dtype | None = None) -> LayerCache:
        """A copy of the cache as the step finds it."""
        return LayerCache(*(cached.to(dtype or cached.dtype, copy=True) for cached in (self.keys, self.values)))

    def metadata(self, backend: Any) -> AttentionMetadata:
        """What the backend gets of the step, in buffers of its own."""
        inputs = attention_inputs(self.parts, self.tables)
        buffers = StepBuffers(self.qkv.device, self.block_size)
        work_items = backend.work_items(inputs.query_start_loc, inputs.seq_lens, inputs.table_width)
        return buffers.fill(inputs, work_items).attention
