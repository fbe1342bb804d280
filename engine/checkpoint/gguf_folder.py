"""A GGUF file, or the parts of a split one -> a model's folder: its JSON files, and an index of the tensors.

The weights stay where they are. The folder is written below the Hub's cache, and anew when a file has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.gguf_config import (
    ARCHITECTURES,
    SHARED_GATE,
    TABLE,
    end_ids,
    model_config,
    quantization_config,
    refuse_silent_models,
)
from engine.checkpoint.gguf_tokenizer import (
    added_tokens,
    build_tokenizer,
    name_scheme,
    refuse_other_tokenizers,
    tokenizer_config,
)
from engine.checkpoint.renamed_weights import EMBEDDING
from engine.link.errors import StartError
from engine.link.model_files import ADAPTER_CONFIG, GGUF_INDEX

if TYPE_CHECKING:
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

FORMAT = 3
"""Part of a folder's name: one that an older version wrote is not used."""
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
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)")
ADAPTER_ENDS = (".lora_a", ".lora_b")
"""Ends of the names of an adapter's tensors."""


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
    _refuse_adapter(readers)
    metadata = name_scheme(_metadata(readers[0]))
    refuse_silent_models(metadata)
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


def _refuse_adapter(readers: Sequence[GGUFReader]) -> None:
    """Raise StartError for an adapter as llama.cpp's convert_lora_to_gguf.py writes it."""
    kind = readers[0].get_field("general.type")
    has_changes = any(tensor.name.endswith(ADAPTER_ENDS) for reader in readers for tensor in reader.tensors)
    if has_changes or (kind is not None and kind.contents() == "adapter"):
        raise StartError(
            f"the GGUF file is an adapter (LoRA), no model, and adapters are read as `peft` writes them, a folder with "
            f"{ADAPTER_CONFIG}: give that as --model-id, or in --lora-adapters beside its model"
        )


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
