"""Cases of paged attention: prompts, chunks, decode, drafts, windows, and sequences that are split over programs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu_proof.checks import Case
from benchmarks.gpu_proof.inputs import Inputs
from benchmarks.gpu_proof.scenes import Part, Scene
from engine.attention.base import AttentionShape
from engine.attention.torch import TorchAttention
from engine.attention.triton import CHUNK, TritonAttention

BLOCK_SIZE = TritonAttention.block_sizes[0]
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


def attention_cases(inputs: Inputs) -> Iterator[Case]:
    shapes, scenes = (TOY_SHAPES, TOY_SCENES) if inputs.is_toy else (SHAPES, SCENES)
    for shape_name, shape in shapes.items():
        for scene_name, (parts, window) in scenes.items():
            for dtype in (torch.bfloat16, torch.float16):
                scene = Scene.random(inputs, shape, BLOCK_SIZE, parts, dtype)
                name = f"attention, {scene_name}, {shape_name}, {str(dtype).removeprefix('torch.')}"
                yield attention_case(name, scene, window)


def attention_case(name: str, scene: Scene, window: int | None) -> Case:
    backend, reference = TritonAttention(scene.shape, BLOCK_SIZE), TorchAttention(scene.shape, BLOCK_SIZE)

    def run() -> torch.Tensor:
        return backend.forward(scene.qkv, scene.cache(), backend.prepare(scene.metadata(backend)), window)

    def expected() -> torch.Tensor:
        prepared = reference.prepare(scene.metadata(reference))
        return reference.forward(scene.qkv.double(), scene.cache(torch.float64), prepared, window)

    return Case(name, run, expected)
