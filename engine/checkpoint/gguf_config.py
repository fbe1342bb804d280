"""The metadata and the tensors of a GGUF file -> config.json, and the tokens that end a text.

Refusals name the keys of the file, without the architecture before them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.checkpoint.kinds import EMBEDDING_MODEL, SEQUENCE_CLASSIFIER
from engine.checkpoint.renamed_weights import EMBEDDING
from engine.checkpoint.weight_files import EXPERTS, GGUF_FLOATS
from engine.link.errors import StartError
from engine.models.config import MAX_HEAD_DIM, MAX_SIZES, MAX_TOKENS, is_whole

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "qwen2moe": {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "use_sliding_window": False,
        "norm_topk_prob": False,
    },
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False},
    "qwen3moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "norm_topk_prob": True,
    },
}
"""GGUF's architecture -> what its config.json has of its own. No key of a file says `norm_topk_prob`: llama.cpp goes by
the architecture."""
TABLE = "token_embd"
"""GGUF's name of the table of embeddings."""
ROUTER, SHARED_GATE = ".mlp.gate.weight", ".mlp.shared_expert_gate.weight"
"""Matrices that are stored in float32 whatever the others are in; a file may have the second one as a vector."""
_OF_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_DENSE = re.compile(r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight")
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
}
"""Sizes of config.json -> the keys that a file must have for them."""
KV_HEADS, KEY_LENGTH = "attention.head_count_kv", "attention.key_length"
EPSILON, THETA = "attention.layer_norm_rms_epsilon", "rope.freq_base"
POOLING, CAUSAL = "pooling_type", "attention.causal"
NO_POOLING, RANK_POOLING = 0, 4
"""Values of `POOLING`: of a model that writes, and of one that ranks texts. All others are models of embeddings."""
SCALING = "rope.scaling."
"""Beginning of the keys that say how rotary positions are stretched."""
SCALING_KINDS = ("none", "linear", "yarn")
YARN = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
"""Keys of config.json -> the keys below `SCALING` into which llama.cpp's converter writes them."""
ENDS = ("<|endoftext|>",)
"""Tokens that end a text beside those that the file names."""


def model_config(metadata: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """config.json. Raises StartError for a file without the numbers that make a model, or with other tensors."""
    matrices = [
        entry["type"]
        for name, entry in tensors.items()
        if len(entry["shape"]) > 1 and not name.endswith((ROUTER, SHARED_GATE))
    ]
    widest = next((kind for kind in GGUF_FLOATS if kind in matrices), "F16")
    try:
        config = {
            **ARCHITECTURES[metadata["general.architecture"]],
            "hidden_act": "silu",
            **{name: _size(metadata, key, MAX_SIZES[name]) for name, key in SIZES.items()},
            "num_key_value_heads": _key_value_heads(metadata),
            # stored as float32: 9.99999997e-07 stands for 1e-06
            "rms_norm_eps": float(f"{_number(metadata, EPSILON, lambda value: 0 < value < 1):.6g}"),
            "rope_theta": _number({THETA: 10000.0, **metadata}, THETA, lambda value: 1 < value < math.inf),
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "torch_dtype": GGUF_FLOATS[widest][0],
            "vocab_size": tensors[f"model.{EMBEDDING}"]["shape"][0],
            "eos_token_id": _token_id(metadata, "eos"),
            "head_dim": _head_dim(metadata),
            **_rope_scaling(metadata),
            **_experts(metadata, tensors),
        }
    except KeyError as error:
        raise StartError(f"the GGUF file does not say {error.args[0]}: fetch it again, or another one") from error
    _refuse_other_shapes(config, tensors)
    return config


def refuse_silent_models(metadata: Mapping[str, Any]) -> None:
    """Raise StartError for a model that writes no text, as `engine.checkpoint.kinds` does for other folders."""
    pooling = metadata.get(POOLING, NO_POOLING)
    if pooling != NO_POOLING or metadata.get(CAUSAL) is False:
        kind = SEQUENCE_CLASSIFIER if pooling == RANK_POOLING else EMBEDDING_MODEL
        raise kind.refusal("the GGUF file")


def _refuse_other_shapes(config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise StartError for tensors that are not those of the metadata."""
    head_dim, heads = config["head_dim"], SIZES["num_attention_heads"]
    checks = (
        (f"model.{EMBEDDING}", -1, config["hidden_size"], SIZES["hidden_size"]),
        (".self_attn.q_norm.weight", 0, head_dim, KEY_LENGTH),
        (".self_attn.q_proj.weight", 0, config["num_attention_heads"] * head_dim, f"{heads} and {KEY_LENGTH}"),
        (".self_attn.k_proj.weight", 0, config["num_key_value_heads"] * head_dim, f"{KV_HEADS} and {KEY_LENGTH}"),
        (".mlp.up_proj.weight", 0, config["intermediate_size"], SIZES["intermediate_size"]),
    )
    for end, dim, size, keys in checks:
        for name, entry in tensors.items():
            if name.endswith(end) and entry["shape"][dim] != size:
                raise StartError(
                    f"the GGUF file has {name} as {entry['shape']}, where {size} stands in place of "
                    f"{entry['shape'][dim]} by its {keys}: fetch it again, or another one"
                )
    num_layers = 1 + max((int(match[1]) for match in map(_OF_LAYER.match, tensors) if match), default=-1)
    if num_layers != config["num_hidden_layers"]:
        raise _unusable(
            SIZES["num_hidden_layers"], config["num_hidden_layers"], f"the number of its {num_layers} layers"
        )


def quantization_config(tensors: Mapping[str, Mapping[str, Any]], readers: Sequence[GGUFReader]) -> dict[str, Any]:
    """What config.json says about quantized matrices, as `quant.gguf` reads it; nothing where there are none."""
    types = {
        name.removesuffix(".weight"): entry["type"]
        for name, entry in tensors.items()
        if len(entry["shape"]) > 1 and entry["type"] not in GGUF_FLOATS and not name.endswith(EMBEDDING)
    }
    if not types:
        return {}
    num_bytes: dict[str, Counter[str]] = {"bytes": Counter(), "table_bytes": Counter()}
    for tensor in itertools.chain.from_iterable(reader.tensors for reader in readers):
        kind = "table_bytes" if tensor.name.startswith(f"{TABLE}.") else "bytes"
        num_bytes[kind][tensor.tensor_type.name] += int(tensor.n_bytes)
    return {"quantization_config": {"quant_method": "gguf", "types": types, **num_bytes}}


def _size(metadata: Mapping[str, Any], key: str, max_size: int) -> int:
    """The value of a key. Raises KeyError where it is missing, StartError where it is no size."""
    value: int = metadata[key]
    if not is_whole(value, 1, max_size):
        raise _unusable(key, value, f"a whole number of 1 to {max_size}")
    return value


def _number(metadata: Mapping[str, Any], key: str, is_allowed: Callable[[float], bool]) -> float:
    """As `_size`, for numbers that need not be whole."""
    value: float = metadata[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not is_allowed(value):
        raise _unusable(key, value, "a number that makes sense")
    return value


def _token_id(metadata: Mapping[str, Any], name: str) -> int:
    """As `_size`, for the id of a token with a name."""
    key = f"tokenizer.ggml.{name}_token_id"
    value: int = metadata[key]
    last_id = len(metadata["tokenizer.ggml.tokens"]) - 1
    if not is_whole(value, 0, last_id):
        raise _unusable(key, value, f"a token of its 0 to {last_id}")
    return value


def _unusable(key: str, value: Any, expected: str) -> StartError:
    return StartError(
        f"the GGUF file says {value!r:.40} for {key}, which is not {expected}: fetch it again, or another one"
    )


def _key_value_heads(metadata: Mapping[str, Any]) -> int:
    heads = SIZES["num_attention_heads"]
    num_heads = _size(metadata, heads, MAX_SIZES["num_attention_heads"])
    num_kv_heads = _size({KV_HEADS: num_heads, **metadata}, KV_HEADS, MAX_SIZES["num_key_value_heads"])
    if num_heads % num_kv_heads:
        raise _unusable(KV_HEADS, num_kv_heads, f"a divisor of its {heads}, {num_heads}")
    return num_kv_heads


def _head_dim(metadata: Mapping[str, Any]) -> int:
    """The features of a head. Where no key says, llama.cpp shares the embedding's among the heads."""
    if KEY_LENGTH in metadata:
        source, head_dim = KEY_LENGTH, _size(metadata, KEY_LENGTH, MAX_HEAD_DIM)
    else:
        source = f"{SIZES['hidden_size']} over {SIZES['num_attention_heads']}"
        head_dim = metadata[SIZES["hidden_size"]] // metadata[SIZES["num_attention_heads"]]
    if not head_dim or head_dim % 2:
        raise _unusable(source, head_dim, "an even number of features")
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(key, head_dim) != head_dim:
            raise _unusable(key, metadata[key], f"its {source}, {head_dim}")
    return head_dim


def _rope_scaling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How rotary positions are stretched: linearly, where there is a factor and no kind, as in llama.cpp."""
    factor = f"{SCALING}factor"
    kind = metadata.get(f"{SCALING}type", "linear" if factor in metadata else "none")
    if kind not in SCALING_KINDS:
        raise _unusable(f"{SCALING}type", kind, f"one of {', '.join(SCALING_KINDS)}")
    if kind == "none":
        return {}
    window, original = SIZES["max_position_embeddings"], f"{SCALING}original_context_length"
    num_positions = _size({original: metadata[window], **metadata}, original, MAX_TOKENS)
    scaling = {
        "rope_type": kind,
        "factor": _number(metadata, factor, lambda value: 1 <= value <= MAX_TOKENS / num_positions),
    }
    if original in metadata:
        scaling["original_max_position_embeddings"] = num_positions
    if kind == "yarn":
        keys = {name: f"{SCALING}{key}" for name, key in YARN.items() if f"{SCALING}{key}" in metadata}
        scaling |= {name: _number(metadata, key, lambda value: 0 < value < math.inf) for name, key in keys.items()}
    return {"rope_scaling": scaling}


def _experts(metadata: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What config.json says about experts; nothing where there are none. Raises StartError for another number of them.

    Sizes are those of the tensors, for a file need not state them. llama.cpp writes experts for all layers or for none;
    here a layer may be without.
    """
    if not any(EXPERTS in name for name in tensors):
        if metadata.get("expert_count"):
            raise StartError("the GGUF file has an expert_count and no experts: fetch it again, or another one")
        return {}
    num_experts = metadata["expert_count"]
    for name, entry in tensors.items():
        if EXPERTS in name and (len(entry["shape"]) != 3 or entry["shape"][0] != num_experts):
            raise StartError(
                f"the GGUF file has {name} as {entry['shape']}, and {num_experts!r} experts by its metadata: fetch it "
                "again, or another one"
            )
    sizes = {
        "moe_intermediate_size": _num_outputs(tensors, f"{EXPERTS}up_proj.weight"),
        "shared_expert_intermediate_size": _num_outputs(tensors, ".mlp.shared_expert.up_proj.weight"),
    }
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": _size(metadata, "expert_used_count", num_experts),
        **{key: size for key, size in sizes.items() if size is not None},
        "mlp_only_layers": [int(match[1]) for match in map(_DENSE.fullmatch, tensors) if match],
    }


def _num_outputs(tensors: Mapping[str, Mapping[str, Any]], end: str) -> int | None:
    """The outputs of the first matrix whose name ends so; None: there is none."""
    return next((entry["shape"][-2] for name, entry in tensors.items() if name.endswith(end)), None)


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that end a text: those that the file names, and `ENDS`."""
    named = [_token_id(metadata, name) for name in ("eos", "eot") if f"tokenizer.ggml.{name}_token_id" in metadata]
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    known = [index for index, token in enumerate(tokens) if token in ENDS and types[index] == 3]
    return list(dict.fromkeys([*named, *known]))
