"""Turns a GGUF file of a Qwen2 or Llama model into a Hugging Face Qwen2 folder in bfloat16.

Owns the tensor names and the number formats. It doesn't know where the file came from, nor the cache the folder goes
to: that is `demo_model.py`, which imports this only when it has to build.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from tokenizers import Tokenizer, pre_tokenizers

from engine.checkpoint.gguf_tokenizer import SCHEMES, added_tokens, build_tokenizer, tokenizer_config

CHUNK_ROWS = 8192
"""Rows dequantised at a time: the float32 copy of a 151,936-row embedding would take 545 MB."""

# ---- weights --------------------------------------------------------------------------------------------------------

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor to write: its name and shape in the new file, and where its rows come from (None: zeros)."""

    name: str
    shape: tuple[int, ...]
    source: ReaderTensor | None
    interleaved_heads: int = 0
    """Above 0: this many heads whose rows llama.cpp interleaved."""


def huggingface_name(name: str) -> str:
    if name == "output_norm.weight":
        return "model.norm.weight"
    if name in ("token_embd.weight", "output.weight"):
        return "model.embed_tokens.weight"
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[module]}.{kind}"


def undo_interleaving(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Put a head's rows back into the order of Hugging Face's rotary halves.

    llama.cpp pairs neighbours (0, 1), (2, 3); Hugging Face pairs row i with row i + head_dim / 2. The rows may still be
    quantised bytes: no block spans two rows.
    """
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def plan_tensors(tensors: Sequence[ReaderTensor], config: Mapping[str, Any], is_llama: bool) -> list[PlannedTensor]:
    """What to write, from which tensor. A Llama becomes a Qwen2 by undoing its row order and adding zero biases."""
    names = {tensor.name for tensor in tensors}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    plan = []
    for tensor in tensors:
        if tensor.name == "token_embd.weight" and "output.weight" in names:
            continue  # the tied matrix is stored twice; the head's copy has more bits
        module = tensor.name.split(".")[-2]
        name = huggingface_name(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        plan.append(PlannedTensor(name, shape, tensor, heads.get(module, 0) if is_llama else 0))
        if is_llama and module in ("attn_q", "attn_k", "attn_v"):
            plan.append(PlannedTensor(name.removesuffix("weight") + "bias", shape[:1], None))
    return plan


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper half of each float32, rounded to nearest even as torch does (finite values only)."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def bfloat16_chunks(tensor: PlannedTensor) -> Iterator[npt.NDArray[np.uint16]]:
    if tensor.source is None:
        yield np.zeros(tensor.shape, dtype="<u2")
        return
    rows: npt.NDArray[Any] = tensor.source.data
    if tensor.interleaved_heads:
        rows = undo_interleaving(rows, tensor.interleaved_heads)
    for start in range(0, len(rows), CHUNK_ROWS):
        yield to_bfloat16(dequantize(rows[start : start + CHUNK_ROWS], tensor.source.tensor_type))


def write_safetensors(path: Path, plan: Sequence[PlannedTensor], report: Callable[[str], None]) -> None:
    """Stream the tensors out: a length, a JSON header, the raw bytes. The safetensors library wants all in memory."""
    sizes = [2 * int(np.prod(tensor.shape)) for tensor in plan]
    ends = list(itertools.accumulate(sizes))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor, size, end in zip(plan, sizes, ends, strict=True):
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [end - size, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    next_report = time.monotonic() + 1
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for number, tensor in enumerate(plan, start=1):
            for chunk in bfloat16_chunks(tensor):
                file.write(chunk.tobytes())
            if time.monotonic() >= next_report or number == len(plan):
                report(f"Converted {number} of {len(plan)} tensors ({file.tell() // 10**6} MB written).")
                next_report = time.monotonic() + 1


# ---- configuration and tokenizer ------------------------------------------------------------------------------------


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    """The file's key-value part, with the architecture's own keys stripped of their prefix."""
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    return {key.removeprefix(f"{metadata['general.architecture']}."): value for key, value in metadata.items()}


def model_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": metadata["embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": metadata["feed_forward_length"],
        "max_position_embeddings": metadata["context_length"],
        "max_window_layers": metadata["block_count"],
        "model_type": "qwen2",
        "num_attention_heads": metadata["attention.head_count"],
        "num_hidden_layers": metadata["block_count"],
        "num_key_value_heads": metadata["attention.head_count_kv"],
        # stored as float32: 9.99999997e-07 stands for 1e-06
        "rms_norm_eps": float(f"{metadata['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["rope.freq_base"],
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }


def split_as_smollm(tokenizer: Tokenizer) -> None:
    first = pre_tokenizers.Digits(individual_digits=True)
    second = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, second])


# ---- the folder -----------------------------------------------------------------------------------------------------


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(
    gguf_path: Path,
    folder: Path,
    *,
    eos_token_ids: Sequence[int],
    plain_tokens: frozenset[str],
    report: Callable[[str], None],
) -> None:
    """Write the weights, configuration and tokenizer of a GGUF file into an existing folder.

    `eos_token_ids`: all that end a text; where empty, the file's only one. `plain_tokens`: tokens that the file calls
    special and the published tokenizer does not.
    """
    reader = GGUFReader(gguf_path)
    # The published tokenizers put nothing before a text, whatever the file says.
    metadata = {**read_metadata(reader), "tokenizer.ggml.add_bos_token": False}
    config = model_config(metadata)
    write_json(folder / "config.json", config)
    eos_ids = list(eos_token_ids) or [metadata["tokenizer.ggml.eos_token_id"]]
    pad_id = metadata["tokenizer.ggml.padding_token_id"]
    # No sampling defaults: a comparison of greedy output would have to undo them.
    write_json(folder / "generation_config.json", {"eos_token_id": eos_ids, "pad_token_id": pad_id})
    added = added_tokens(metadata, plain_tokens)
    build_tokenizer(metadata, added, {**SCHEMES, "smollm": split_as_smollm}).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(metadata, added))
    is_llama = metadata["general.architecture"] == "llama"
    write_safetensors(folder / "model.safetensors", plan_tensors(reader.tensors, config, is_llama), report)
