"""A Hugging Face folder with a byte-level tokenizer as a GGUF file, its matrices in float16 or in a type of blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.torch import load_file

CONTROL, NORMAL, UNUSED = 3, 1, 5


def write_gguf(
    folder: Path,
    path: Path,
    kind: str = "F16",
    architecture: str = "qwen2",
    chosen: Collection[str] | None = None,
    kinds: Mapping[str, str] | None = None,
    **changes: Any,
) -> None:
    """Matrices as `kind` or what `kinds` says of some, vectors and routers in float32, one tensor for all experts.

    `changes` are keys and values of the metadata, `__` for each dot; None takes a key out. `chosen` has the names of
    the tensors that are written; None: all.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    _add_tokenizer(writer, folder, config["vocab_size"])
    for key, value in changes.items():
        writer.kv_data[0].pop(key.replace("__", "."), None)
        if value is not None:
            writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    maps = [
        gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), config["num_hidden_layers"])
        for name in (architecture, architecture.removesuffix("moe"))  # llama.cpp has no layers without among others
    ]
    for name, values in _tensors(folder).items():
        if chosen is None or name in chosen:
            is_router = name.endswith(("mlp.gate.weight", "mlp.shared_expert_gate.weight"))
            stored, raw_type = _stored(values, "F32" if is_router else (kinds or {}).get(name, kind))
            gguf_names = [names.get_name(name, try_suffixes=(".weight", ".bias")) for names in maps]
            writer.add_tensor(next(filter(None, gguf_names)), stored, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """As llama.cpp's converter has them: a matrix of all experts of a layer together, dimensions of 1 left out."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    experts: dict[str, list[np.ndarray[Any, Any]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[name] = tensor.float().numpy().squeeze()
    for name in sorted(tensors, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")]):
        together = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        if together != name:
            experts.setdefault(together, []).append(tensors.pop(name))
    return {**tensors, **{name: np.stack(matrices) for name, matrices in experts.items()}}


def _stored(values: np.ndarray[Any, Any], kind: str) -> tuple[np.ndarray[Any, Any], Any]:
    if values.ndim == 1 or kind == "F32":
        return values, None
    raw_type = gguf.GGMLQuantizationType[kind]
    return quantize(values, raw_type), raw_type


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """The folder's tokens, and the padding rows as llama.cpp's converter names them."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    names = {token_id: token for token, token_id in {**tokenizer["model"]["vocab"], **ids}.items()}
    tokens = [names.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)]
    kinds = [
        CONTROL if token in ids else NORMAL if token_id in names else UNUSED for token_id, token in enumerate(tokens)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if merges := tokenizer["model"]["merges"]:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(ids[settings["eos_token"]])
    writer.add_pad_token_id(ids["<|endoftext|>"])
    writer.add_bos_token_id(ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(settings["chat_template"])
