"""A Hugging Face folder with a byte-level tokenizer as a GGUF file, its matrices in float16 or in a type of blocks."""

from __future__ import annotations

import json
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
    """Matrices as `kind` or what `kinds` says of some, vectors in float32.

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
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    _add_tokenizer(writer, folder, config["vocab_size"])
    for key, value in changes.items():
        writer.kv_data[0].pop(key.replace("__", "."), None)
        if value is not None:
            writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config["num_hidden_layers"])
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if chosen is not None and name not in chosen:
                continue
            stored, raw_type = _stored(tensor.float().numpy(), (kinds or {}).get(name, kind))
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert gguf_name is not None, name
            writer.add_tensor(gguf_name, stored, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
