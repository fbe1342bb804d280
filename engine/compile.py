"""`python -m engine.compile`: compile the CPU kernels into the user's cache, so that the first start need not.

Starts the engine on a tiny random model in every pair of dtypes that the kernels are compiled for.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.link.config import EngineConfig
from engine.link.environment import engine_environment
from engine.link.logs import configure_logging

if TYPE_CHECKING:
    import torch

# Wide enough that the warm-up's prompt runs the parallel kernels and its last token the serial ones.
TINY_MODEL: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "vocab_size": 1024,
}


def main() -> None:
    if "NUMBA_CACHE_DIR" not in os.environ:  # Numba reads its variables on import: start over with them
        environ = {**os.environ, **engine_environment(1, dict(os.environ))}
        sys.exit(subprocess.run([sys.executable, "-P", "-m", "engine.compile"], env=environ, check=False).returncode)
    configure_logging("warn,engine.link.progress=info", "compile")  # what a start says of itself is about a toy
    import torch

    for stored, dtype, quantize in (
        ("bfloat16", "bfloat16", None),
        ("bfloat16", "float32", None),
        ("float32", "float32", None),
        ("float16", "float16", None),
        ("bfloat16", "bfloat16", "int4"),  # its head is int8
    ):
        compile_for(getattr(torch, stored), dtype, quantize)
    compile_collectives()
    compile_masks()


def compile_masks() -> None:
    import numpy as np
    import torch

    from engine.sampling.grammar_cpu import apply_masks

    apply_masks(torch.empty(0, 1), np.empty(0, np.int32), np.empty((0, 1), np.int32))


def compile_collectives() -> None:
    """Sum and gather on two ranks of shared memory, which are threads here."""
    import torch

    from parallel.shared_memory import SharedMemoryCollectives, memory_bytes

    size = 2
    fd = os.memfd_create("pytgi-compile")
    os.ftruncate(fd, memory_bytes(size))
    ranks = [SharedMemoryCollectives(fd, rank, size, timeout_s=600.0) for rank in range(size)]
    os.close(fd)
    with ThreadPoolExecutor(size) as threads:
        list(threads.map(lambda rank: rank.all_reduce(torch.ones(1, 1)), ranks))
        list(threads.map(lambda rank: rank.gather(torch.ones(1, 1), [1] * size), ranks))


def compile_for(stored: torch.dtype, dtype: str, quantize: str | None) -> None:
    """Start an engine on a checkpoint stored as `stored`, run as `dtype` and quantized as `quantize` says."""
    from engine.start import start_engine

    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder), stored)
        config = EngineConfig(model_path=folder, dtype=dtype, quantize=quantize, max_batch_total_tokens=128)
        # The model has no tokenizer. The kernels of adapters are compiled where adapters may come.
        start_engine(dataclasses.replace(config, is_grammar_disabled=True, is_lora_updating=True, max_loras=1))


def write_tiny_model(folder: Path, stored: torch.dtype) -> None:
    """A one-layer Qwen2 of zeros, as a Hugging Face folder."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, vocab = TINY_MODEL["hidden_size"], TINY_MODEL["intermediate_size"], TINY_MODEL["vocab_size"]
    kv = hidden // TINY_MODEL["num_attention_heads"] * TINY_MODEL["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "model.layers.0.input_layernorm.weight": (hidden,),
        "model.layers.0.post_attention_layernorm.weight": (hidden,),
        "model.layers.0.self_attn.o_proj.weight": (hidden, hidden),
        "model.layers.0.mlp.gate_proj.weight": (inner, hidden),
        "model.layers.0.mlp.up_proj.weight": (inner, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, inner),
    }
    for name, size in (("q", hidden), ("k", kv), ("v", kv)):
        shapes[f"model.layers.0.self_attn.{name}_proj.weight"] = (size, hidden)
        shapes[f"model.layers.0.self_attn.{name}_proj.bias"] = (size,)
    save_file({name: torch.zeros(shape, dtype=stored) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY_MODEL))


if __name__ == "__main__":
    main()
