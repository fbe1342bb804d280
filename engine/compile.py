"""`python -m engine.compile`: compile the CPU kernels into the user's cache, so that the first start need not.

Starts the engine on a tiny random model in every pair of dtypes that the kernels are compiled for. Two processes share
the work, as Numba compiles in one thread.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.kernel_cache import share_kernels
from engine.link.config import EngineConfig
from engine.link.environment import engine_environment
from engine.link.logs import configure_logging

if TYPE_CHECKING:
    import torch

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
    """Compile in a process for each of SHARES, with the variables that Numba reads on import; end with their status."""
    environ = {**os.environ, **engine_environment(1, dict(os.environ))}
    commands = [[sys.executable, "-P", "-m", "engine.compile", share] for share in SHARES]
    processes = [subprocess.Popen(command, env=environ) for command in commands]
    sys.exit(max([process.wait() for process in processes], key=abs))


def compile_share(share: str) -> None:
    """Compile one row of SHARES. The first tells how far it is; what else a start says of itself is about a toy."""
    configure_logging(f"warn,engine.link.progress={'info' if share == next(iter(SHARES)) else 'warn'}", "compile")
    share_kernels()
    SHARES[share]()


def compile_half_precision() -> None:
    compile_for("bfloat16", "bfloat16", None)
    compile_for("float16", "float16", None)
    compile_for("bfloat16", "bfloat16", "int4")  # its head is int8


def compile_sampler_and_float32() -> None:
    """The sampler first: it takes longest, and the other process needs it by the time it is done."""
    compile_sampler()
    compile_collectives()
    compile_masks()
    compile_for("float32", "float32", None)
    compile_for("bfloat16", "float32", None)


SHARES: dict[str, Callable[[], None]] = {"half": compile_half_precision, "float32": compile_sampler_and_float32}
"""What each process compiles, in about the same time. A kernel that both need is compiled by one (`share_kernels`)."""


def compile_sampler() -> None:
    import torch

    from engine.link.messages import SamplingParams
    from engine.sampling.sampler_cpu import sample

    sample(torch.zeros(1, 8), [SamplingParams(seed=0, top_p=0.9, num_top_tokens=1)], [0])


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


def compile_for(stored: str, dtype: str, quantize: str | None) -> None:
    """Start an engine on a checkpoint stored as `stored`, run as `dtype` and quantized as `quantize` says."""
    import torch

    from engine.start import start_engine

    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder), getattr(torch, stored))
        config = EngineConfig(model_path=folder, dtype=dtype, quantize=quantize, max_batch_total_tokens=128)
        # The model has no tokenizer. The kernels of adapters are compiled where adapters may come.
        start_engine(dataclasses.replace(config, is_grammar_disabled=True, is_lora_updating=True, max_loras=1))


def write_tiny_model(folder: Path, stored: torch.dtype) -> None:
    """A one-layer Qwen2 of zeros, as a Hugging Face folder. One matrix has weights of too many sizes to be coded."""
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
    weights = {name: torch.zeros(shape, dtype=stored) for name, shape in shapes.items()}
    weights["model.layers.0.self_attn.o_proj.weight"].copy_(torch.linspace(-100, 0, hidden).exp2())
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY_MODEL))


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else compile_share(sys.argv[1])
