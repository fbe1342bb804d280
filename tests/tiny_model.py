"""A tiny random Qwen2 as a Hugging Face folder: weights, configuration and a byte-level tokenizer that can chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from quant.packing import pack_words

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = {ENDOFTEXT: 256, IM_START: 257, IM_END: 258}
EOS_TOKEN_IDS = [SPECIAL_TOKENS[IM_END], SPECIAL_TOKENS[ENDOFTEXT]]
VOCAB_SIZE = 264
"""256 bytes, the special tokens, and (as in Qwen2) some rows that no text leads to."""
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": SPECIAL_TOKENS[ENDOFTEXT],
    "eos_token_id": SPECIAL_TOKENS[IM_END],
    "use_sliding_window": False,
}

QWEN3: dict[str, Any] = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
"""The differences of a tiny Qwen3."""

QWEN2_MOE: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "decoder_sparse_step": 2,
}
"""The differences of a tiny Qwen2 with experts."""
QWEN3_MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
"""The differences of a tiny Qwen3 with experts."""


def write_tiny_qwen2(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    is_tied: bool = True,
    num_shards: int = 1,
    seed: int = 0,
    **changes: Any,
) -> None:
    """Write the whole folder; `changes` go into config.json and shape the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, "tie_word_embeddings": is_tied, "torch_dtype": str(dtype).removeprefix("torch."), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_TOKEN_IDS}))
    write_weights(folder, random_weights(config, dtype, seed), num_shards)
    write_tokenizer(folder)


def write_tiny_qwen3(folder: Path, *, seed: int = 3, **changes: Any) -> None:
    """A Qwen3 whose heads together are wider than its hidden states; `changes` as in `write_tiny_qwen2`."""
    write_tiny_qwen2(folder, seed=seed, **{**QWEN3, **changes})


def write_tiny_qwen2_moe(folder: Path, *, seed: int = 0, **changes: Any) -> None:
    """A Qwen2 with experts in its second layer; `changes` as in `write_tiny_qwen2`."""
    write_tiny_qwen2(folder, seed=seed, **{**QWEN2_MOE, **changes})


def write_tiny_qwen3_moe(folder: Path, *, seed: int = 4, **changes: Any) -> None:
    """A Qwen3 with experts in both layers; `changes` as in `write_tiny_qwen2`."""
    write_tiny_qwen2(folder, seed=seed, **{**QWEN3_MOE, **changes})


def has_experts(config: dict[str, Any], index: int) -> bool:
    """Whether layer `index` has experts."""
    is_sparse = (index + 1) % config.get("decoder_sparse_step", 1) == 0 and index not in config.get(
        "mlp_only_layers", ()
    )
    return "num_experts" in config and is_sparse


def expert_sizes(config: dict[str, Any]) -> dict[str, int]:
    """The prefixes of the experts of a layer, and their inner features."""
    sizes = {f"experts.{number}.": config["moe_intermediate_size"] for number in range(config["num_experts"])}
    shared = config.get("shared_expert_intermediate_size")
    return sizes if shared is None else {**sizes, "shared_expert.": shared}


def random_weights(config: dict[str, Any], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor by name; spread so that activations stay near 1 and every bias and norm weight matters."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).div(columns**0.5).to(dtype)

    def vector(size: int, mean: float) -> torch.Tensor:
        return torch.randn(size, generator=generator).mul(0.3).add(mean).to(dtype)

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // num_heads
    size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    is_qwen2 = config["model_type"].startswith("qwen2")
    has_bias = config.get("attention_bias", is_qwen2)
    weights = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden),
        "model.norm.weight": vector(hidden, 1),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        for name, num_outputs, num_inputs in (
            ("q", size, hidden),
            ("k", kv_size, hidden),
            ("v", kv_size, hidden),
            ("o", hidden, size),
        ):
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = matrix(num_outputs, num_inputs)
            if has_bias and not (is_qwen2 and name == "o"):
                weights[f"{prefix}.self_attn.{name}_proj.bias"] = vector(num_outputs, 0)
        if not is_qwen2:
            weights[f"{prefix}.self_attn.q_norm.weight"] = vector(head_dim, 1)
            weights[f"{prefix}.self_attn.k_norm.weight"] = vector(head_dim, 1)
        for name, num_rows in (expert_sizes(config) if has_experts(config, index) else {"": inner}).items():
            weights[f"{prefix}.mlp.{name}gate_proj.weight"] = matrix(num_rows, hidden)
            weights[f"{prefix}.mlp.{name}up_proj.weight"] = matrix(num_rows, hidden)
            weights[f"{prefix}.mlp.{name}down_proj.weight"] = matrix(hidden, num_rows)
        if has_experts(config, index):
            weights[f"{prefix}.mlp.gate.weight"] = matrix(config["num_experts"], hidden)
            if "shared_expert_intermediate_size" in config:
                weights[f"{prefix}.mlp.shared_expert_gate.weight"] = matrix(1, hidden)
        weights[f"{prefix}.input_layernorm.weight"] = vector(hidden, 1)
        weights[f"{prefix}.post_attention_layernorm.weight"] = vector(hidden, 1)
    return weights


def write_weights(folder: Path, weights: dict[str, torch.Tensor], num_shards: int = 1) -> None:
    """One safetensors file, or several with an index; neighbours in `weights` land in different files."""
    if num_shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(weights)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::num_shards]}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path) -> None:
    """Token i is byte i in the order of the byte-level alphabet; no merges, so that every text is easy to count."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(BPE({symbol: token_id for token_id, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": IM_END,
        "chat_template": CHATML,
        "added_tokens_decoder": {
            str(token_id): {"content": content, "special": True} for content, token_id in SPECIAL_TOKENS.items()
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_tiny_gptq(folder: Path, *, group_size: int = 32, **changes: Any) -> None:
    """The same model, its matrices quantised to 4 bits in GPTQ's first format by plain rounding."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False, "sym": True}
    write_tiny_qwen2(folder, dtype=torch.float16, quantization_config=config, **changes)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        weight = weights.pop(name).float().T
        groups = weight.reshape(-1, group_size, weight.shape[1])  # [groups, group_size, n]
        scales = (groups.abs().amax(dim=1) / 7).to(torch.float16)
        q = (groups / scales.float()[:, None]).round().clamp(-8, 7) + 8
        module = name.removesuffix(".weight")
        weights[f"{module}.qweight"] = pack_words(q.flatten(0, 1), 4, dim=0)
        weights[f"{module}.qzeros"] = pack_words(torch.full(scales.shape, 7), 4, dim=1)
        weights[f"{module}.scales"] = scales
        weights[f"{module}.g_idx"] = (torch.arange(q.shape[0] * group_size) // group_size).to(torch.int32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
