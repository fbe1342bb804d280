"""A dense Qwen2 folder as a GGUF file, so that llama.cpp can run and serve the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open


def write_gguf(folder: Path, path: Path) -> None:
    """Matrices in float16, vectors in float32, and the vocabulary, which llama.cpp's server needs."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    num_heads, num_layers = config["num_attention_heads"], config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(num_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // num_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_vocabulary(writer, folder, config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, num_layers)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name).float().numpy()
                stored = tensor.astype(np.float16) if tensor.ndim > 1 else tensor
                writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """The folder's byte-level BPE and its chat template; rows of the embedding without a token get names as well."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    names = {token_id: token for token, token_id in (tokenizer["model"]["vocab"] | special).items()}
    kinds = dict.fromkeys(names, gguf.TokenType.NORMAL)
    kinds |= dict.fromkeys(special.values(), gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([names.get(token_id, f"<unused {token_id}>") for token_id in range(vocab_size)])
    writer.add_token_types([kinds.get(token_id, gguf.TokenType.UNUSED) for token_id in range(vocab_size)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(special[settings["eos_token"]])
    writer.add_chat_template(settings["chat_template"])
