"""Times of paged attention over their floors: decode by batch and context, prompts by length."""

from __future__ import annotations

import functools

import torch

from benchmarks.gpu_proof.card import Ceilings
from benchmarks.gpu_proof.checks import poisoned_memory
from benchmarks.gpu_proof.clock import call_seconds
from benchmarks.gpu_proof.inputs import Inputs
from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.scenes import Part, Scene
from engine.attention.base import AttentionShape, LayerCache
from engine.attention.triton import TritonAttention
from engine.device import DTYPES

SHAPE, TOY_SHAPE = AttentionShape(28, 4, 128), AttentionShape(4, 2, 16)
BATCHES, CONTEXTS, PROMPTS = (1, 8, 32, 128), (1024, 8192, 32_768), (512, 4096)
TOY_BATCHES, TOY_CONTEXTS, TOY_PROMPTS = (2,), (20,), (20,)
MAX_MEMORY = 0.4
"""The part of the free memory that a cache may take; larger ones are left out."""
MAX_COPIES = 16


def time_attention(inputs: Inputs, ceilings: Ceilings, report: Report) -> None:
    """Rows of two tables: attention of one layer."""
    batches, contexts, prompts = (
        (TOY_BATCHES, TOY_CONTEXTS, TOY_PROMPTS) if inputs.is_toy else (BATCHES, CONTEXTS, PROMPTS)
    )
    shape = TOY_SHAPE if inputs.is_toy else SHAPE
    token_bytes = 4 * shape.num_kv_heads * shape.head_dim
    for batch in batches:
        columns: dict[str, float | str] = {}
        for context in contexts:
            num_bytes = batch * context * token_bytes
            if num_bytes > MAX_MEMORY * inputs.device.free_memory_bytes():
                columns |= {f"us at {context}": "no room", f"floor/time at {context}": ""}
                continue
            name = f"attention of {batch} sequences at {context}"
            seconds = _seconds(inputs, shape, [(1, context)] * batch, ceilings, num_bytes, report, name)
            columns[f"us at {context}"] = round(seconds * 1e6, 1)
            columns[f"floor/time at {context}"] = round(ceilings.floor_s(num_bytes) / seconds, 3)
        report.row("Attention in decode, one layer", sequences=batch, **columns)
    for size in prompts:
        name = f"attention of a prompt of {size}"
        seconds = _seconds(inputs, shape, [(size, size)], ceilings, size * token_bytes, report, name)
        flops = 2 * size * (size + 1) * shape.num_heads * shape.head_dim
        floor = ceilings.floor_s(0, flops)
        report.row(
            "Attention of a prompt, one layer",
            tokens=size,
            us=round(seconds * 1e6, 1),
            **{"floor/time": round(floor / seconds, 3)},
        )


def _seconds(
    inputs: Inputs,
    shape: AttentionShape,
    parts: list[Part],
    ceilings: Ceilings,
    num_bytes: int,
    report: Report,
    name: str,
) -> float:
    """Seconds of one call, which is checked for numbers that are none.

    The calls that are timed read different caches, together more than the chip's holds.
    """
    backend = TritonAttention(shape, TritonAttention.block_sizes[0])
    copies = 1 if inputs.is_toy else max(1, min(MAX_COPIES, -(-3 * ceilings.cache_bytes // num_bytes)))
    scenes = [_scene(inputs, shape, backend.block_size, parts) for _ in range(copies)]
    calls = []
    for scene in scenes:
        prepared = backend.prepare(scene.metadata(backend))
        calls.append(functools.partial(backend.forward, scene.qkv, LayerCache(scene.keys, scene.values), prepared))
    with poisoned_memory():
        is_finite = bool(calls[0]().isfinite().all())
    report.check(name, [] if is_finite else ["a number is not finite, or was not written"])
    return call_seconds(inputs.device, calls)


def _scene(inputs: Inputs, shape: AttentionShape, block_size: int, parts: list[Part]) -> Scene:
    """Sequences whose blocks are scattered over a cache without holes."""
    device = inputs.device.torch_device
    dtype = DTYPES[inputs.device.half_dtype]
    counts = [-(-seq_len // block_size) for _, seq_len in parts]
    blocks = torch.split(torch.randperm(sum(counts)), counts)
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    qkv = inputs.normal(sum(num_queries for num_queries, _ in parts), width, dtype=dtype)
    size = sum(counts) * block_size, shape.num_kv_heads, shape.head_dim
    keys, values = (torch.empty(size, dtype=dtype, device=device).normal_() for _ in "kv")
    return Scene(shape, block_size, parts, [table.tolist() for table in blocks], qkv, keys, values)
