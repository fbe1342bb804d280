"""Turns a GGUF file of a Qwen2 or Llama model into a Hugging Face Qwen2 folder in bfloat16.

Owns the tensor names, the number formats and the tokenizer. It doesn't know where the file came from, nor the cache the
folder goes to: that is `demo_model.py`, which imports this only when it has to build.
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
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CHUNK_ROWS = 8192
"""Rows dequantised at a time: the float32 copy of a 151,936-row embedding would take 545 MB."""
NORMAL_TOKEN, CONTROL_TOKEN, USER_TOKEN = 1, 3, 4
"""GGUF token types: in the merges' vocabulary; added and special; added and merely matched whole."""

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


def added_tokens(metadata: Mapping[str, Any], plain_tokens: frozenset[str]) -> dict[int, dict[str, Any]]:
    """Each added token by id, as both tokenizer files spell it."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    types = metadata["tokenizer.ggml.token_type"]
    return {
        token_id: {"content": token, **flags, "special": kind == CONTROL_TOKEN and token not in plain_tokens}
        for token_id, (token, kind) in enumerate(zip(metadata["tokenizer.ggml.tokens"], types, strict=True))
        if kind in (CONTROL_TOKEN, USER_TOKEN)
    }


QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_text(tokenizer: Tokenizer, scheme: str) -> None:
    """Set what happens to text before the merges. GGUF only names the scheme: llama.cpp knows it by that name."""
    first: pre_tokenizers.PreTokenizer
    if scheme == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        first = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
        second = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
        tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    elif scheme == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
        second = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        raise ValueError(f"unknown GGUF pre-tokenizer {scheme!r}; known: qwen2, smollm")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, second])


def build_tokenizer(metadata: Mapping[str, Any], added: Mapping[int, dict[str, Any]]) -> Tokenizer:
    """The tokenizer from the GGUF file's own lists.

    Not by transformers' GGUF reader: it leaves out Qwen2's NFC, splits SmolLM2's digits wrongly, takes the padding rows
    of the embedding for tokens, and changes between versions.
    """
    kinds = metadata["tokenizer.ggml.token_type"]
    tokens = metadata["tokenizer.ggml.tokens"]
    # Added tokens past the end of the vocabulary get their ids from add_tokens; those at its start belong to it.
    size = 1 + max(token_id for token_id, kind in enumerate(kinds) if kind == NORMAL_TOKEN)
    vocab = {token: token_id for token_id, token in enumerate(tokens[:size])}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    split_text(tokenizer, metadata["tokenizer.ggml.pre"])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(**fields) for fields in added.values()])
    for token_id, fields in added.items():
        assert tokenizer.token_to_id(fields["content"]) == token_id, fields
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any], added: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    pad = tokens[metadata["tokenizer.ggml.padding_token_id"]]
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token_id): fields for token_id, fields in added.items()},
        "additional_special_tokens": [f["content"] for f in added.values() if f["special"] and f["content"] != pad],
        "bos_token": None,
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "errors": "replace",
        "model_max_length": metadata["context_length"],
        "pad_token": pad,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer" if metadata["tokenizer.ggml.pre"] == "qwen2" else "PreTrainedTokenizerFast",
        "unk_token": None,
    }


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
    metadata = read_metadata(reader)
    config = model_config(metadata)
    write_json(folder / "config.json", config)
    eos_ids = list(eos_token_ids) or [metadata["tokenizer.ggml.eos_token_id"]]
    pad_id = metadata["tokenizer.ggml.padding_token_id"]
    # No sampling defaults: a comparison of greedy output would have to undo them.
    write_json(folder / "generation_config.json", {"eos_token_id": eos_ids, "pad_token_id": pad_id})
    added = added_tokens(metadata, plain_tokens)
    build_tokenizer(metadata, added).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(metadata, added))
    is_llama = metadata["general.architecture"] == "llama"
    write_safetensors(folder / "model.safetensors", plan_tensors(reader.tensors, config, is_llama), report)
