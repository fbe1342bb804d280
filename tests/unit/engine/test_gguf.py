"""GGUF files as a model's folder: configuration, tokenizer, tensors by name and in parts."""

from __future__ import annotations

import argparse
import json
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from engine.build import load_model
from engine.checkpoint.gguf_folder import gguf_folder, name_of_model
from engine.checkpoint.gguf_tokenizer import added_tokens, build_tokenizer, refuse_other_tokenizers
from engine.checkpoint.weights import open_weights
from engine.cli import download_weights
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from quant.gguf import GgufFormat
from tests.oracles.dequantize import gguf_weights
from tests.oracles.quant_stored import CHECKPOINTS
from tests.tiny_gguf import write_gguf
from tests.tiny_model import write_tiny_qwen2, write_tiny_qwen3
from tests.unit.test_seams import generate, reference_device

STORED = sorted(CHECKPOINTS.glob("llama-cpp-*"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    write_tiny_qwen2(folder, dtype=torch.float16, is_tied=False)
    return folder


def served(source: Path, target: Path, kind: str = "F16", **changes: Any) -> Path:
    target.mkdir(exist_ok=True)
    write_gguf(source, target / "model.gguf", kind, **changes)
    return gguf_folder([target / "model.gguf"], target / "cache")


def refusal(source: Path, target: Path, **changes: Any) -> str:
    with pytest.raises(StartError) as caught:
        served(source, target, **changes)
    return str(caught.value)


def test_a_file_in_16_bits_has_the_ids_of_the_folder_that_it_is_from(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the launcher's child finds it, with a folder in place of the file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    write_gguf(source, tmp_path / "files" / "model.gguf")
    options = {"extension": ".safetensors", "merge_lora": False, "revision": None, "lifeline": False, "adapter": False}
    folder = download_weights(argparse.Namespace(model_id=str(tmp_path / "files"), **options))
    assert generate(folder, reference_device()) == generate(source, reference_device())
    assert folder.parent == tmp_path / "cache" and not list(folder.parent.glob(".*"))
    with pytest.raises(StartError, match="--revision is for models of the Hub"):
        download_weights(argparse.Namespace(model_id=str(tmp_path / "files"), **{**options, "revision": "main"}))


def test_qwen3_is_served_too(tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path / "model")
    folder = served(tmp_path / "model", tmp_path, "F32", architecture="qwen3")
    assert generate(folder, reference_device()) == generate(tmp_path / "model", reference_device())


def test_configuration_and_tokenizer_are_those_of_the_source(source: Path, tmp_path: Path) -> None:
    folder = served(source, tmp_path)
    config, expected = (json.loads((path / "config.json").read_text()) for path in (folder, source))
    same = (
        "hidden_size intermediate_size num_attention_heads num_key_value_heads num_hidden_layers vocab_size model_type"
    )
    assert {key: config[key] for key in same.split()} == {key: expected[key] for key in same.split()}
    assert (config["rms_norm_eps"], config["tie_word_embeddings"], config["torch_dtype"]) == (1e-6, False, "float16")
    assert "quantization_config" not in config
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [258, 256]}
    ours, theirs = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (folder, source))
    text = "<|im_start|>user\nGrüße, 12 cafe\u0301s!<|im_end|>"
    assert ours.encode(text).ids == theirs.encode(text.replace("e\u0301", "é")).ids, "Qwen2 composes letters"
    settings, expected = (json.loads((path / "tokenizer_config.json").read_text()) for path in (folder, source))
    assert all(settings[key] == expected[key] for key in ("chat_template", "eos_token", "bos_token", "tokenizer_class"))


def test_a_file_of_before_may_2024_is_split_as_qwen2(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a file does not name it. Others may be split otherwise, and are refused."""
    named = served(source, tmp_path / "named")
    assert not caplog.text
    unnamed = served(source, tmp_path / "unnamed", tokenizer__ggml__pre=None)
    assert "does not say how text is split (tokenizer.ggml.pre): it is split as Qwen2 does" in caplog.text
    for name in "tokenizer.json", "tokenizer_config.json":
        assert (unnamed / name).read_bytes() == (named / name).read_bytes()
    assert "the kind 'llama', None; only 'gpt2' with" in refusal(
        source, tmp_path, tokenizer__ggml__pre=None, tokenizer__ggml__model="llama"
    )
    write_tiny_qwen3(tmp_path / "qwen3")
    assert "the kind 'gpt2', None; only 'gpt2' with qwen2" in refusal(
        tmp_path / "qwen3", tmp_path, architecture="qwen3", tokenizer__ggml__pre=None
    )


@pytest.mark.parametrize("keys", [{"general.type": "adapter", "adapter.type": "lora"}, {}])
def test_an_adapter_in_gguf_is_told_as_one(tmp_path: Path, keys: dict[str, str]) -> None:
    """As llama.cpp's convert_lora_to_gguf.py names keys and tensors, for whatever model."""
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    for key, value in keys.items():
        writer.add_string(key, value)
    for end in "lora_a", "lora_b":
        writer.add_tensor(f"blk.0.attn_q.weight.{end}", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        StartError, match=r"is an adapter \(LoRA\), no model, .* a folder with adapter_config.json: give"
    ):
        gguf_folder([tmp_path / "lora.gguf"], tmp_path)


def test_texts_begin_with_a_token_where_the_file_says_so(source: Path) -> None:
    tokens, kinds = ["a", "b", "ab", "<s>"], [1, 1, 1, 3]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-r1-qwen",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 3,
    }
    tokenizer = build_tokenizer(metadata, added_tokens(metadata))
    assert tokenizer.encode("ab<s>b").ids == [3, 2, 3, 1]
    assert tokenizer.encode("ab", add_special_tokens=False).ids == [2]
    with pytest.raises(StartError, match="merges 'b' and 'b', which are no tokens of it"):
        build_tokenizer({**metadata, "tokenizer.ggml.merges": ["b b"]}, {})
    with pytest.raises(StartError, match="a tokenizer of the kind 'llama', None; only 'gpt2' with qwen2, deepseek"):
        refuse_other_tokenizers({**metadata, "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": None})


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
def test_the_stored_folders_are_what_a_server_makes_of_the_files(folder: Path, tmp_path: Path) -> None:
    made = gguf_folder([folder / "model.gguf"], tmp_path)
    assert (made / "config.json").read_text() == (folder / "config.json").read_text()
    index, stored = (json.loads((path / "gguf_index.json").read_text()) for path in (made, folder))
    assert index == {**stored, "files": [str(folder / "model.gguf")]}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1"])
def test_parts_of_tensors_are_those_of_the_whole(source: Path, tmp_path: Path, kind: str) -> None:
    weights = open_weights(served(source, tmp_path, kind))
    cuts = [(slice(8, 40),), (slice(None), slice(1, 2)), (slice(3, 9), slice(None))]
    for name in weights.names:
        whole = weights.read(name)
        assert whole.shape == weights.shape(name)
        assert {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}[
            weights.dtype(name)
        ] == whole.dtype
        is_table = name == "model.embed_tokens.weight"  # which is cut by rows alone
        for cut in cuts if whole.dim() == 2 and not is_table else cuts[:1]:
            assert torch.equal(weights.read(name, cut), whole[cut]), (name, cut)
            assert torch.equal(weights.read(name, cut, is_kept=True), whole[cut])


def test_a_split_set_is_one_model(source: Path, tmp_path: Path) -> None:
    whole = gguf_weights_of(served(source, tmp_path / "whole", "Q8_0"))
    parts = [tmp_path / f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    tensors = load_file(source / "model.safetensors")
    write_gguf(source, parts[0], "Q8_0", chosen=[])
    for path, is_first in zip(parts[1:], (True, False), strict=True):
        write_gguf(source, path, "Q8_0", chosen=[name for name in tensors if ("layers.1" in name) != is_first])
    assert gguf_weights_of(gguf_folder(parts[1:], tmp_path / "cache")) == whole
    assert gguf_weights_of(gguf_folder(parts, tmp_path / "cache")) == whole, "the first part may have metadata alone"


def gguf_weights_of(folder: Path) -> dict[str, bytes]:
    weights = open_weights(folder)
    return {name: weights.read(name).numpy().tobytes() for name in sorted(weights.names)}


def test_a_changed_file_gets_a_new_folder_and_an_unchanged_one_does_not(source: Path, tmp_path: Path) -> None:
    first = served(source, tmp_path)
    assert gguf_folder([tmp_path / "model.gguf"], tmp_path / "cache") == first
    assert served(source, tmp_path, "Q8_0") != first


def test_servers_that_start_at_the_same_time_share_a_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(source, tmp_path / "model.gguf")
    rename, others = os.rename, []

    def rename_after_another_server(*paths: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        others.append(gguf_folder([tmp_path / "model.gguf"], tmp_path / "cache").stat().st_ino)
        rename(*paths)

    monkeypatch.setattr(os, "rename", rename_after_another_server)
    folder = gguf_folder([tmp_path / "model.gguf"], tmp_path / "cache")
    assert [folder.stat().st_ino] == others and [*folder.parent.iterdir()] == [folder]
    (folder / "gguf_index.json").unlink()
    assert open_weights(gguf_folder([tmp_path / "model.gguf"], tmp_path / "cache")).names, "a rest is written anew"
    assert [*folder.parent.iterdir()] == [folder]


def test_rope_scaling(source: Path, tmp_path: Path) -> None:
    changes = {"qwen2__rope__scaling__type": "yarn", "qwen2__rope__scaling__factor": 4.0}
    config = json.loads((served(source, tmp_path, **changes) / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0}
    changes |= {"qwen2__rope__scaling__original_context_length": 128, "qwen2__rope__scaling__yarn_beta_fast": 16.0}
    changes |= {"qwen2__rope__scaling__yarn_attn_factor": 0.5, "qwen2__rope__scaling__yarn_beta_slow": 2.0}
    config = json.loads((served(source, tmp_path, **changes) / "config.json").read_text())
    details = {"attention_factor": 0.5, "beta_fast": 16.0, "beta_slow": 2.0}
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **details}
    assert config["rope_scaling"] == expected
    without_kind = {"qwen2__rope__scaling__factor": 2.0}
    config = json.loads((served(source, tmp_path, **without_kind) / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}, "as llama.cpp has it"


def test_heads_without_a_length_share_the_embedding(tmp_path: Path) -> None:
    """So it is in llama.cpp; `transformers` has 128 features where a Qwen3's config.json says nothing."""
    write_tiny_qwen3(tmp_path / "model", head_dim=16)
    lengths = {f"qwen3__attention__{name}_length": None for name in ("key", "value")}
    folder = served(tmp_path / "model", tmp_path, "F32", architecture="qwen3", **lengths)
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 16
    assert generate(folder, reference_device()) == generate(tmp_path / "model", reference_device())


def test_what_is_no_model_of_ours_is_refused_in_a_sentence(source: Path, tmp_path: Path) -> None:
    assert "has a model of the architecture 'llama', only qwen2, qwen2moe, qwen3, qwen3moe can be" in refusal(
        source, tmp_path, architecture="llama"
    )
    tensors = load_file(source / "model.safetensors")
    some = [name for name in tensors if "embed" not in name]
    assert "has no table of embeddings: give the first file" in refusal(source, tmp_path, chosen=some)
    (tmp_path / "cut.gguf").write_bytes((STORED[0] / "model.gguf").read_bytes()[:5000])
    with pytest.raises(StartError, match=r"cut\.gguf is not a whole GGUF file \(.*\): fetch it again"):
        gguf_folder([tmp_path / "cut.gguf"], tmp_path)
    (tmp_path / "other.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(StartError, match=r"other\.gguf is not a whole GGUF file"):
        gguf_folder([tmp_path / "other.gguf"], tmp_path)


def gguf_bytes(*, order: str = "<", version: int = 3, counts: tuple[int, int] = (0, 0), rest: bytes = b"") -> bytes:
    """A file with so many tensors and pieces of metadata, by its own words."""
    return b"GGUF" + struct.pack(f"{order}IQQ", version, *counts) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(*, num_dims: int = 1, size: int = 8, kind: int = 0, offset: int = 0) -> bytes:
    return text(b"output.weight") + struct.pack("<IQIQ", num_dims, size, kind, offset)


HUGE = 1 << 60
TEXT_TYPE, ARRAY_TYPE, BYTE_TYPE = 8, 9, 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"GGML" + bytes(100), "magic invalid"),
        (gguf_bytes(version=1), "version 1 which we cannot handle"),
        (gguf_bytes(counts=(0, HUGE)), "it ends at byte 24, within what begins at 24"),
        (gguf_bytes(counts=(HUGE, 0)), "it ends at byte 24, within what begins at 24"),
        (
            gguf_bytes(counts=(0, 1), rest=text(b"a") + struct.pack("<IIQ", ARRAY_TYPE, BYTE_TYPE, HUGE) + bytes(40)),
            "it ends at byte 89, within what begins at 89",
        ),
        (gguf_bytes(counts=(0, 1), rest=text(b"a") + struct.pack("<IQ", TEXT_TYPE, HUGE)), "it ends at byte 45"),
        (gguf_bytes(counts=(0, 1), rest=text(b"a") + struct.pack("<I", 99)), "is not a valid GGUFValueType"),
        (
            gguf_bytes(counts=(0, 1), rest=text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
            "recursion",
        ),
        (gguf_bytes(counts=(1, 0), rest=tensor(num_dims=1 << 31) + bytes(96)), "it ends at byte"),
        (gguf_bytes(counts=(1, 0), rest=tensor(kind=99) + bytes(96)), "is not a valid GGMLQuantizationType"),
        (gguf_bytes(counts=(1, 0), rest=tensor(offset=1 << 40) + bytes(96)), "it ends at byte"),
        (gguf_bytes(counts=(1, 0), rest=tensor(size=HUGE) + bytes(96)), "it ends at byte"),
    ],
)
def test_a_file_that_announces_what_it_has_not(content: bytes, reason: str, tmp_path: Path) -> None:
    """The memory of the process would not do for what some of these announce."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(StartError, match=rf"model\.gguf is not a whole GGUF file \(.*{reason}.*\): fetch it again, or"):
        gguf_folder([path], tmp_path / "cache")


def test_metadata_of_more_parts_than_any_model_has(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoint.gguf_reader.MAX_PARTS", 500)
    assert "is not a whole GGUF file (its metadata has more than 500 parts)" in refusal(source, tmp_path)


def test_the_bytes_of_another_machine_are_not_taken_for_ours(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(order=">"))
    with pytest.raises(StartError, match="was written for machines of the other byte order: fetch the usual file"):
        gguf_folder([path], tmp_path / "cache")


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_type_that_cannot_be_run_is_refused_in_a_sentence(source: Path, tmp_path: Path, name: str) -> None:
    folder = served(source, tmp_path, "Q8_0", kinds={name: "MXFP4"})
    sentence = (
        rf"model\.gguf has {name} in the type MXFP4; only F32, .*, IQ4_XS can be run: choose a file in one of them"
    )
    with pytest.raises(StartError, match=sentence):
        load_model(EngineConfig(model_path=str(folder)), reference_device())


def test_a_vector_in_blocks_is_refused_in_a_sentence(source: Path, tmp_path: Path) -> None:
    folder = served(source, tmp_path)
    index = json.loads((folder / "gguf_index.json").read_text())
    index["tensors"]["model.norm.weight"]["type"] = "Q8_0"
    (folder / "gguf_index.json").write_text(json.dumps(index))
    with pytest.raises(
        StartError, match=r"has model\.norm\.weight in the type Q8_0, which is no matrix: fetch the file"
    ):
        open_weights(folder)


NO_TOKENIZER = {f"tokenizer__ggml__{name}": None for name in "model pre tokens token_type merges".split()}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (NO_TOKENIZER, "has a tokenizer of the kind None, None; only"),
        ({"tokenizer__ggml__tokens": None}, "can't be used (KeyError: 'tokenizer.ggml.tokens'): fetch it again"),
        ({"tokenizer__ggml__token_type": None}, "can't be used (KeyError: 'tokenizer.ggml.token_type')"),
        ({"tokenizer__ggml__token_type": [1, 1, 3]}, "can't be used (ValueError: zip() argument 2 is shorter"),
        (
            {f"tokenizer__ggml__{name}": value for name, value in (("tokens", [1, 2]), ("token_type", [3, 3]))}
            | {"tokenizer__ggml__eos_token_id": 1},
            "can't be used (",
        ),
        ({"tokenizer__ggml__token_type": "normal"}, "can't be used ("),
        ({"tokenizer__ggml__merges": 3}, "can't be used (TypeError"),
        ({"tokenizer__chat_template": b"\xff\xfe"}, "can't be used (UnicodeDecodeError: 'utf-8' codec can't decode"),
        ({"general__architecture": ["qwen2"]}, "can't be used (TypeError: unhashable type: 'list'"),
        ({"general__architecture": None}, "has a model of the architecture None"),
        ({"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": None}, "can't be used (KeyError"),
        ({"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": 10**6}, "can't be used ("),
        (
            {"tokenizer__ggml__eos_token_id": 10**6},
            "says 1000000 for tokenizer.ggml.eos_token_id, which is not a token of its 0 to 263: fetch it again",
        ),
        ({"tokenizer__ggml__eos_token_id": -1}, "says -1 for tokenizer.ggml.eos_token_id, which is not a token of"),
        ({"tokenizer__ggml__eot_token_id": "end"}, "says 'end' for tokenizer.ggml.eot_token_id, which is not a token"),
        (
            {"qwen2__attention__layer_norm_rms_epsilon": "small"},
            "says 'small' for attention.layer_norm_rms_epsilon, which is not a number that makes sense: fetch it again",
        ),
        ({"qwen2__attention__layer_norm_rms_epsilon": 0.0}, "says 0.0 for attention.layer_norm_rms_epsilon, which"),
        ({"qwen2__rope__freq_base": [1.0]}, "says [1.0] for rope.freq_base, which is not a number that"),
        ({"qwen2__rope__freq_base": 0.0}, "says 0.0 for rope.freq_base, which is not a number that"),
        (
            {"qwen2__embedding_length": "64"},
            "says '64' for embedding_length, which is not a whole number of 1 to 16777216: fetch it again",
        ),
        ({"qwen2__block_count": 0}, "says 0 for block_count, which is not a whole number of 1 to 65536: fetch"),
        ({"qwen2__attention__head_count": 4.0}, "says 4.0 for attention.head_count, which is not a whole number"),
        ({"qwen2__attention__head_count_kv": [2, 2]}, "says [2, 2] for attention.head_count_kv, which is not a"),
        ({"qwen2__attention__key_length": -16}, "says -16 for attention.key_length, which is not a whole number"),
        (
            {"qwen2__pooling_type": 3},
            "is a model of embeddings, which turns a text into a vector and writes none: only",
        ),
        ({"qwen2__pooling_type": 4}, "is a classifier, which labels a text and writes none (reward models and rerank"),
        ({"qwen2__attention__causal": False}, "is a model of embeddings, which turns a text into a vector"),
        ({"qwen2__context_length": True}, "says True for context_length, which is not a whole number"),
        ({"qwen2__rope__scaling__type": "yarn"}, "does not say rope.scaling.factor: fetch it again"),
        ({"qwen2__rope__scaling__factor": "4"}, "says '4' for rope.scaling.factor, which is not a number that makes"),
        ({"qwen2__rope__scaling__factor": 0.5}, "says 0.5 for rope.scaling.factor, which is not a number that makes"),
        ({"qwen2__rope__scaling__factor": 1e30}, "for rope.scaling.factor, which is not a number that makes"),
        (
            {"qwen2__rope__scaling__type": "longrope", "qwen2__rope__scaling__factor": 4.0},
            "says 'longrope' for rope.scaling.type, which is not one of none, linear, yarn: fetch it again",
        ),
        ({"qwen2__rope__scaling__type": [1]}, "says [1] for rope.scaling.type, which is not one of none, linear, yarn"),
        (
            {"qwen2__rope__scaling__factor": 2.0, "qwen2__rope__scaling__original_context_length": 0},
            "says 0 for rope.scaling.original_context_length, which is not a whole number of 1 to",
        ),
        (
            {
                "qwen2__rope__scaling__type": "yarn",
                "qwen2__rope__scaling__factor": 2.0,
                "qwen2__rope__scaling__yarn_beta_fast": -1.0,
            },
            "says -1.0 for rope.scaling.yarn_beta_fast, which is not a number that makes sense",
        ),
        (
            {"qwen2__attention__head_count_kv": 3},
            "says 3 for attention.head_count_kv, which is not a divisor of its attention.head_count, 4: fetch it again",
        ),
        ({"qwen2__attention__key_length": 15}, "says 15 for attention.key_length, which is not an even number of"),
        (
            {"qwen2__embedding_length": 60},
            "says 15 for embedding_length over attention.head_count, which is not an even number of features",
        ),
        (
            {"qwen2__attention__value_length": 32},
            "says 32 for attention.value_length, which is not its embedding_length over attention.head_count, 16",
        ),
        (
            {"qwen2__attention__key_length": 16, "qwen2__rope__dimension_count": 8},
            "says 8 for rope.dimension_count, which is not its attention.key_length, 16: fetch it again",
        ),
        (
            {"qwen2__embedding_length": 128},
            "has model.embed_tokens.weight as [264, 64], where 128 stands in place of 64 by its embedding_length",
        ),
        ({"qwen2__attention__key_length": 32}, "q_proj.weight as [64, 64], where 128 stands in place of 64 by"),
        ({"qwen2__attention__head_count_kv": 4}, "as [32, 64], where 64 stands in place of 32 by its attention.head_"),
        ({"qwen2__feed_forward_length": 64}, "as [96, 64], where 64 stands in place of 96 by its feed_forward_length"),
        ({"qwen2__block_count": 3}, "says 3 for block_count, which is not the number of its 2 layers: fetch it again"),
        ({"qwen2__block_count": 1}, "says 1 for block_count, which is not the number of its 2 layers: fetch it again"),
    ],
)
def test_metadata_that_is_odd_is_refused_in_a_sentence(
    source: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    assert words in refusal(source, tmp_path, **changes)


@pytest.mark.parametrize("folder", STORED, ids=lambda folder: folder.name)
@pytest.mark.parametrize("is_exact", [False, True])
def test_the_memory_of_a_file_is_known_before_it_is_loaded(folder: Path, is_exact: bool) -> None:
    weights = open_weights(folder)
    made = GgufFormat(json.loads((folder / "config.json").read_text())["quantization_config"])
    memory = 0
    for module in sorted({name.rpartition(".")[0] for name in weights.names}):
        names = [name for name in weights.names if name.rpartition(".")[0] == module]
        params = {name.rpartition(".")[2]: weights.read(name) for name in names}
        if (method := made.method_for(module)) is not None:
            packed = method.pack(params)
            tensors = [packed.weight, packed.scales, packed.zero_points, packed.bias]
        elif module == "model.embed_tokens":
            tensors = [params["weight"].to(torch.float32 if is_exact else torch.float16)]
        else:
            tensors = [*params.values()]
        memory += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    file_bytes = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(folder / "model.gguf").tensors)
    assert memory == pytest.approx(made.size_factor(is_exact=is_exact) * file_bytes)


def test_a_file_that_was_cut_off_later_is_refused(source: Path, tmp_path: Path) -> None:
    folder, path = served(source, tmp_path), tmp_path / "model.gguf"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StartError, match=r"model\.gguf is cut off: it has \d+ bytes, its tensors end at \d+"):
        open_weights(folder)
    path.unlink()
    with pytest.raises(StartError, match="cannot be read"):
        open_weights(folder)


def test_a_table_of_embeddings_in_blocks_is_widened_exactly() -> None:
    for folder in STORED:
        expected = gguf_weights(folder / "model.gguf")["model.embed_tokens.weight"]
        np.testing.assert_array_equal(open_weights(folder).read("model.embed_tokens.weight").numpy(), expected)


def test_the_tensors_of_qwen3_have_their_names() -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 1)
    for module in ("self_attn.q_norm", "self_attn.k_norm", "mlp.up_proj", "input_layernorm"):
        name = names.get_name(f"model.layers.0.{module}")
        assert name_of_model(f"{name}.weight") == f"model.layers.0.{module}.weight"
    with pytest.raises(StartError, match="has a tensor blk.0.ssm_a that the model does not know"):
        name_of_model("blk.0.ssm_a")
