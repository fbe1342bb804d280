"""A GGUF file, or the parts of a split one -> a model's folder: its JSON files, and an index of the tensors.

The weights stay where they are. The folder is written below the Hub's cache, and anew when a file has changed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.gguf_tokenizer import added_tokens, build_tokenizer, refuse_other_tokenizers, tokenizer_config
from engine.checkpoint.renamed_weights import EMBEDDING
from engine.checkpoint.weight_files import EXPERTS, GGUF_FLOATS
from engine.link.errors import StartError
from engine.link.model_files import GGUF_INDEX
from engine.models.config import MAX_HEAD_DIM, MAX_SIZES, is_whole

if TYPE_CHECKING:
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

FORMAT = 2
"""Part of a folder's name: one that an older version wrote is not used."""
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
MODULES = {
    TABLE: "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
ROUTER, SHARED_GATE = ".mlp.gate.weight", ".mlp.shared_expert_gate.weight"
"""Matrices that are stored in float32 whatever the others are in; a file may have the second one as a vector."""
_DENSE = re.compile(r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight")
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)")
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
}
"""Sizes of config.json -> the keys that a file must have for them."""
EPSILON, THETA = "attention.layer_norm_rms_epsilon", "rope.freq_base"
ENDS = ("<|endoftext|>",)
"""Tokens that end a text beside those that the file names."""


def gguf_folder(files: Sequence[Path], cache: Path) -> Path:
    """The folder below `cache` of the model in some files, the first of which has the metadata. Raises StartError."""
    try:
        folder = cache / f"gguf--{files[0].stem}--{_fingerprint(files)}"
        if not (folder / GGUF_INDEX).is_file():
            _write(files, folder)
    except OSError as error:
        raise StartError(
            f"{error.filename or cache} can't be read or written ({error.strerror}): fix that, or set "
            "HUGGINGFACE_HUB_CACHE to another folder"
        ) from error
    logger.info("Reading %s by way of %s", files[0], folder)
    return folder


def _fingerprint(files: Sequence[Path]) -> str:
    digest = hashlib.blake2b(f"{FORMAT}".encode(), digest_size=8)
    for path in files:
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _write(files: Sequence[Path], folder: Path) -> None:
    """Write the whole folder under another name first: it is there completely, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    contents = _read_model(files)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}", dir=folder.parent))
    try:
        for name, content in contents.items():
            (unfinished / name).write_text(content, encoding="utf-8")
        unfinished.chmod(0o755)
        _put(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _put(unfinished: Path, folder: Path) -> None:
    """Give a folder its name, unless another server that starts at the same time has written the same one."""
    try:
        os.rename(unfinished, folder)
    except OSError:
        if (folder / GGUF_INDEX).is_file():
            return
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(unfinished, folder)


def _read_model(files: Sequence[Path]) -> dict[str, str]:
    """The names and contents of the folder's files. Raises StartError."""
    readers = [_open(path) for path in files]
    try:
        return _contents(files, readers)
    except (OSError, StartError):
        raise
    except Exception as error:  # no check foresaw it, and the library of tokenizers has no class for its refusals
        raise StartError(
            f"the metadata of {files[0]} can't be used ({type(error).__name__}: {error}): fetch it again"
        ) from error


def _contents(files: Sequence[Path], readers: Sequence[GGUFReader]) -> dict[str, str]:
    """As `_read_model`. Raises StartError for what is foreseen, and anything for other metadata that is odd."""
    metadata = _metadata(readers[0])
    tensors = index_tensors(readers)
    refuse_other_tokenizers(metadata)
    added = added_tokens(metadata)
    objects = {
        "config.json": {**model_config(metadata, tensors), **quantization_config(tensors, readers)},
        "generation_config.json": {"eos_token_id": end_ids(metadata)},
        "tokenizer_config.json": tokenizer_config(metadata, added),
        GGUF_INDEX: {"files": [str(path.resolve()) for path in files], "tensors": tensors},
    }
    texts = {name: json.dumps(content, ensure_ascii=False, indent=1) for name, content in objects.items()}
    return {**texts, "tokenizer.json": build_tokenizer(metadata, added).to_str()}


def _open(path: Path) -> GGUFReader:
    from engine.checkpoint.gguf_reader import BoundedReader  # arrays of every token take a second: only who reads waits

    try:
        reader = BoundedReader(path)
    except OSError:
        raise
    except Exception as error:  # the library has no class for files that are cut off or damaged
        raise StartError(f"{path} is not a whole GGUF file ({error}): fetch it again, or another one") from error
    if reader.is_swapped:  # the tensors' bytes would be, too
        raise StartError(f"{path} was written for machines of the other byte order: fetch the usual file")
    return reader


def _metadata(reader: GGUFReader) -> dict[str, Any]:
    """The file's keys and values, the architecture's own keys without their prefix. Raises StartError."""
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise StartError(
            f"the GGUF file has a model of the architecture {architecture!r}, only {', '.join(ARCHITECTURES)} can be "
            "served: choose another model"
        )
    return {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}


def index_tensors(readers: Sequence[GGUFReader]) -> dict[str, dict[str, Any]]:
    """Hugging Face's name of every tensor -> where it lies, its type and its shape. Raises StartError."""
    tensors: dict[str, dict[str, Any]] = {}
    for number, reader in enumerate(readers):
        for tensor in reader.tensors:
            if tensor.name != "rope_freqs.weight":
                name, shape = name_of_model(tensor.name), [int(size) for size in reversed(tensor.shape)]
                if name in tensors or 0 in shape:
                    fault = "twice" if name in tensors else f"as {shape}, without a number"
                    raise StartError(f"the GGUF file has {tensor.name} {fault}: fetch it again, or another one")
                tensors[name] = {
                    "file": number,
                    "offset": int(tensor.data_offset),
                    "type": tensor.tensor_type.name,
                    "shape": [1, *shape] if name.endswith(SHARED_GATE) and len(shape) == 1 else shape,
                }
    if f"model.{EMBEDDING}" not in tensors:
        raise StartError(
            "the GGUF file has no table of embeddings: give the first file of a split model's complete set"
        )
    return tensors


def name_of_model(name: str) -> str:
    """A tensor's name in Hugging Face's checkpoints. Raises StartError."""
    module, _, leaf = name.rpartition(".")
    if match := _LAYER.fullmatch(module):
        known = LAYER_MODULES.get(match[2])
        renamed = None if known is None else f"model.layers.{match[1]}.{known}"
    else:
        renamed = MODULES.get(module)
    if renamed is None:
        raise StartError(f"the GGUF file has a tensor {name} that the model does not know: fetch the file again")
    return f"{renamed}.{leaf}"


def model_config(metadata: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """config.json. Raises StartError for a file without the numbers that make a model."""
    matrices = [
        entry["type"]
        for name, entry in tensors.items()
        if len(entry["shape"]) > 1 and not name.endswith((ROUTER, SHARED_GATE))
    ]
    widest = next((kind for kind in GGUF_FLOATS if kind in matrices), "F16")
    try:
        return {
            **ARCHITECTURES[metadata["general.architecture"]],
            "hidden_act": "silu",
            **{name: _size(metadata, key, MAX_SIZES[name]) for name, key in SIZES.items()},
            "num_key_value_heads": _key_value_heads(metadata),
            # stored as float32: 9.99999997e-07 stands for 1e-06
            "rms_norm_eps": float(f"{_number(metadata, EPSILON, lambda value: 0 < value < 1):.6g}"),
            "rope_theta": _number({THETA: 10000.0, **metadata}, THETA, lambda value: 0 < value < math.inf),
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "torch_dtype": GGUF_FLOATS[widest][0],
            "vocab_size": tensors[f"model.{EMBEDDING}"]["shape"][0],
            "eos_token_id": _token_id(metadata, "eos"),
            **_head_dim(metadata),
            **_rope_scaling(metadata),
            **_experts(metadata, tensors),
        }
    except KeyError as error:
        raise StartError(f"the GGUF file does not say {error.args[0]}: fetch it again, or another one") from error


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
    key = "attention.head_count_kv"
    return _size(metadata, key if key in metadata else SIZES["num_attention_heads"], MAX_SIZES["num_key_value_heads"])


def _head_dim(metadata: Mapping[str, Any]) -> dict[str, Any]:
    key = "attention.key_length"
    return {"head_dim": _size(metadata, key, MAX_HEAD_DIM)} if key in metadata else {}


def _rope_scaling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """How rotary positions are stretched. Kinds that are not known are refused where config.json is read."""
    kind = metadata.get("rope.scaling.type", "none")
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": metadata["rope.scaling.factor"]}
    original = metadata.get("rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
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
