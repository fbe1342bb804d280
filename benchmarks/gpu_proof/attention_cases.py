"""Cases of paged attention: prompts, chunks, decode, drafts, windows, and sequences that are split over programs."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks.gpu_proof.checks import Case, Check
from benchmarks.gpu_proof.inputs import Inputs
from benchmarks.gpu_proof.scenes import Part, Scene
from engine.attention.base import AttentionShape
from engine.attention.torch import TorchAttention
from engine.attention.triton import CHUNK, TritonAttention
from engine.layers.base import RotaryTable, Rotation
from engine.layers.torch import TorchOps

BLOCK_SIZE = TritonAttention.block_sizes[0]
DTYPES = (torch.bfloat16, torch.float16)
SHAPES = {"28 / 4 heads of 128": AttentionShape(28, 4, 128), "14 / 2 heads of 64": AttentionShape(14, 2, 64)}
TOY_SHAPES = {"4 / 2 heads of 16": AttentionShape(4, 2, 16)}

SCENES: dict[str, tuple[list[Part], int | None]] = {
    "decode of one token": ([(1, 1)], None),
    "decode at block edges": ([(1, 15), (1, 16), (1, 17), (1, 64), (1, 65)], None),
    "decode split over programs": ([(1, CHUNK + 1), (1, 5 * CHUNK + 40), (1, CHUNK), (1, 9)], None),
    "drafts": ([(4, 70), (3, CHUNK + 2), (8, 8)], None),
    "a prompt": ([(300, 300)], None),
    "prompts beside decodes": ([(1, 90), (33, 33), (64, 64), (1, 2 * CHUNK + 1), (17, 17)], None),
    "a chunk of a prompt": ([(100, 2 * CHUNK + 100)], None),
    "a window in decode": ([(1, 3 * CHUNK), (1, 30), (2, CHUNK + 3)], 100),
    "a window in a prompt": ([(200, 300)], 33),
}
"""Name -> sequences and window."""
TOY_SCENES: dict[str, tuple[list[Part], int | None]] = {
    "decode split over programs": ([(1, CHUNK + 1), (1, 17)], None),
    "drafts": ([(3, 20)], None),
    "a prompt beside a decode": ([(20, 20), (1, 9)], None),
    "a window in a chunk": ([(12, 40)], 10),
}


ROTATED, TOY_ROTATED = "prompts beside decodes", "a prompt beside a decode"
"""The scene whose queries and keys are rotated by the same launches."""


def attention_checks(*, is_toy: bool) -> Iterator[Check]:
    shapes, scenes, rotated = (TOY_SHAPES, TOY_SCENES, TOY_ROTATED) if is_toy else (SHAPES, SCENES, ROTATED)
    for shape_name, shape in shapes.items():
        for dtype in DTYPES[: 1 if is_toy else None]:
            about = f"{shape_name}, {str(dtype).removeprefix('torch.')}"
            for scene_name, (parts, window) in scenes.items():
                make = functools.partial(_case, shape=shape, parts=parts, window=window, dtype=dtype)
                yield Check.of(f"attention, {scene_name}, {about}", make)
            make = functools.partial(_rotated_case, shape=shape, parts=scenes[rotated][0], dtype=dtype)
            yield Check.of(f"rotation and attention, {rotated}, {about}", make)


def _case(inputs: Inputs, shape: AttentionShape, parts: list[Part], window: int | None, dtype: torch.dtype) -> Case:
    scene = Scene.random(inputs, shape, BLOCK_SIZE, parts, dtype)
    backend = TritonAttention(shape, BLOCK_SIZE)
    return Case(
        lambda: backend.forward(scene.qkv, scene.cache(), backend.prepare(scene.metadata(backend)), window),
        lambda: _exact(scene, scene.qkv.double(), window),
    )


def _rotated_case(inputs: Inputs, shape: AttentionShape, parts: list[Part], dtype: torch.dtype) -> Case:
    """Keys are rounded once they are rotated, as they are stored: the reference's are, too."""
    scene = Scene.random(inputs, shape, BLOCK_SIZE, parts, dtype)
    backend = TritonAttention(shape, BLOCK_SIZE)
    angles = inputs.normal(50, shape.head_dim // 2, spread=3)
    rotation = Rotation(RotaryTable(angles.cos(), angles.sin()), inputs.integers(50, scene.qkv.shape[0]))

    def run() -> torch.Tensor:
        prepared = backend.prepare(scene.metadata(backend))
        return backend.forward(scene.qkv.clone(), scene.cache(), prepared, None, rotation)

    def expected() -> torch.Tensor:
        rotated = scene.qkv.clone()
        TorchOps().rotate(rotated, rotation, shape.num_heads + shape.num_kv_heads)
        return _exact(scene, rotated.double(), None)

    return Case(run, expected)


def _exact(scene: Scene, qkv: torch.Tensor, window: int | None) -> torch.Tensor:
    """Attention in float64."""
    reference = TorchAttention(scene.shape, BLOCK_SIZE)
    prepared = reference.prepare(scene.metadata(reference))
    return reference.forward(qkv, scene.cache(torch.float64), prepared, window)
