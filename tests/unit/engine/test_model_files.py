"""What a model folder says about the tokens that end a text."""

from __future__ import annotations

import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.files import read_eos_token_ids, read_model_config, read_quantization_config
from engine.checkpoint.kinds import kind_of_tensor, refuse_other_kinds
from engine.checkpoint.renamed_weights import names_of_models
from engine.checkpoint.weight_files import choose_weight_names, find_weight_files
from engine.link.errors import StartError
from engine.link.model_files import AdapterBase, adapter_base, read_file, read_json

TOKENIZER = {"eos_token": "<|im_end|>", "added_tokens_decoder": {"5": {"content": "<|im_end|>"}, "6": {"content": "x"}}}


@pytest.mark.parametrize(
    ("generation", "tokenizer", "config", "expected", "of_tgi"),
    [
        ({"eos_token_id": [1, 2]}, TOKENIZER, {"eos_token_id": 9}, [1, 2, 5, 9], [1, 2]),
        ({"eos_token_id": 1}, TOKENIZER, {"eos_token_id": 9}, [1, 5, 9], [5]),
        ({"eos_token_id": 1}, {}, {"eos_token_id": 9}, [1, 9], [1]),
        ({"eos_token_id": 5}, TOKENIZER, {"eos_token_id": [6, 5]}, [5, 6], [5]),
        ({"eos_token_id": None}, TOKENIZER, {"eos_token_id": None}, [5], [5]),
        ({}, TOKENIZER, {"eos_token_id": 9}, [5, 9], [5]),
        ({}, {**TOKENIZER, "eos_token": {"content": "x"}}, {"eos_token_id": 9}, [6, 9], [6]),
        ({}, {"eos_token": "unknown"}, {"eos_token_id": 9}, [9], [9]),
        ({}, {"eos_token": "added"}, {"eos_token_id": 9}, [7, 9], [7]),
        ({}, {"eos_token": "plain"}, {}, [3], [3]),
        ({}, {"eos_token": {"content": None}}, {"eos_token_id": 9}, [9], [9]),
        ({}, {}, {"eos_token_id": [8, 9]}, [8, 9], [8, 9]),
        ({}, {}, {"eos_token_id": 0}, [0], [0]),
        ({}, {}, {}, [], []),
    ],
)
def test_a_text_ends_at_every_id_that_a_file_names(
    tmp_path: Path,
    generation: dict[str, Any],
    tokenizer: dict[str, Any],
    config: dict[str, Any],
    expected: list[int],
    of_tgi: list[int],
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    tokens = {"added_tokens": [{"id": 7, "content": "added"}], "model": {"vocab": {"plain": 3}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    assert read_eos_token_ids(tmp_path, config) == expected
    assert read_eos_token_ids(tmp_path, config, is_strict=True) == of_tgi


def test_the_eos_token_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**TOKENIZER, "eos_token": None}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "x"}}))
    assert read_eos_token_ids(tmp_path, {}) == [6]


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="has no config.json: give --model-id a folder of a Hugging Face model"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", {"eos_token_id": [None]}, r"eos_token_id in .* is \[None\], not token ids: fetch"),
        ("config.json", {"eos_token_id": ["1"]}, r"eos_token_id in .* is \['1'\], not token ids: fetch"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder in .* cannot be used .*: fetch"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": 1}}, "added_tokens_decoder in .* cannot be used"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "e"}}},
            "added_tokens_decoder in .* cannot",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": None}, None),
    ],
)
def test_eos_ids_that_are_none(tmp_path: Path, name: str, content: dict[str, Any], message: str | None) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token": "e", **content}))
    config = content if name == "config.json" else {}
    if message is None:
        assert read_eos_token_ids(tmp_path, config) == []
        return
    with pytest.raises(StartError, match=message):
        read_eos_token_ids(tmp_path, config)


@pytest.mark.parametrize(
    "weight_map", [None, [], {"a": 5}, {"a": ["model.safetensors"]}, {"a": "model.safetensors", "b": None}]
)
def test_an_index_without_file_names(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(StartError, match="index.json has no weight_map of file names: fetch the model again"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_folder_in_place_of_a_json_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(StartError) as caught:
        read_json(tmp_path / name)
    assert str(caught.value) == (
        f"{tmp_path / name} cannot be read (Is a directory): fix that, or fetch the model again"
    )


def test_weights_that_are_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to("nowhere")
    with pytest.raises(StartError, match="model.safetensors is no file, or a link to a missing one: fetch the model"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/model.safetensors", "a/model.safetensors", "a/../model.safetensors", "..", "", "."],
)
def test_an_index_that_names_files_outside_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "model.safetensors").touch()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(StartError, match="index.json names .*, which is no file of this folder: fetch the model from"):
        find_weight_files(folder)


def test_the_hubs_cache_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").touch()
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert find_weight_files(snapshot).paths == [snapshot / "model-1.safetensors"]


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/tty", "socket"])
@pytest.mark.timeout(10)
def test_special_files_are_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to(kind)
    for read in (read_file, read_json):
        with pytest.raises(
            StartError, match="config.json is no regular file, or a link to none: fetch the model again"
        ):
            read(path)


def test_a_file_may_not_be_larger_than_any_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.link.model_files.MAX_FILE_BYTES", 1 << 20)
    path = tmp_path / "config.json"
    path.write_bytes(b" " * (1 << 20))
    assert read_file(path) == b" " * (1 << 20)
    path.write_bytes(b" " * (1 << 20) + b" ")
    with pytest.raises(StartError, match="config.json is larger than 1 MiB: fetch the model again"):
        read_file(path)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("value", [[], [1], "gptq", 4, True])
def test_a_quantisation_that_is_no_object(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(StartError, match=f"{key} in .* is not a JSON object: fetch the model again"):
        read_quantization_config(tmp_path, {key: value})


@pytest.mark.parametrize("method", ["open", "iterdir", "is_file"])
def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    (tmp_path / ("model.safetensors.index.json" if method == "open" else "model.safetensors")).touch()

    def refuse(path: Path, *_: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(StartError, match=f"^{tmp_path}.* cannot be read \\(Permission denied\\): fix that, or fetch"):
        find_weight_files(tmp_path)


def test_beside_a_whole_model_an_index_may_be_anything(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text("version https://git-lfs")
    assert [path.name for path in find_weight_files(tmp_path).paths] == ["model.safetensors"]


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff", "[" * 100_000])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StartError, match="config.json .*: fetch the model again"):
        read_model_config(tmp_path)


PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
STRAY = "adapter_model.safetensors training_state.safetensors optimizer.safetensors ._model.safetensors".split()


@pytest.mark.parametrize(
    ("chosen", "others", "index"),
    [
        (["model.safetensors"], [*STRAY, "consolidated.safetensors"], None),
        (["model.safetensors"], PARTS, PARTS),
        (["model.safetensors"], [], PARTS),
        (["model.safetensors"], [], ["../model.safetensors"]),
        (PARTS, [*STRAY, "consolidated.safetensors", "consolidated-00001-of-00002.safetensors"], PARTS),
        (PARTS, [*STRAY, "consolidated.safetensors", "old.safetensors", "model-00001-of-00007.safetensors"], None),
        (PARTS, STRAY, ["model-00001-of-00007.safetensors", "model-00002-of-00007.safetensors"]),
        (["gptq_model-4bit-128g.safetensors"], STRAY, None),
        (["consolidated.safetensors"], STRAY, None),
        (["a.safetensors", "b.safetensors"], ["trainer_state.safetensors"], None),
    ],
)
def test_the_model_is_found_among_other_files(
    tmp_path: Path, chosen: list[str], others: list[str], index: list[str] | None
) -> None:
    for name in (*chosen, *others):
        (tmp_path / name).touch()
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(index))}))
    found = find_weight_files(tmp_path)
    assert [path.name for path in found.paths] == chosen
    assert found.others == sorted(others)
    assert choose_weight_names(tmp_path, sorted([*chosen, *others], reverse=True)) == chosen


def test_a_folder_of_stray_files_has_no_model(tmp_path: Path) -> None:
    for name in STRAY:
        (tmp_path / name).touch()
    with pytest.raises(StartError, match=r"has no \*.safetensors file"):
        find_weight_files(tmp_path)


DECODER_NAMES = "embed_tokens.weight layers.0.mlp.up_proj.weight norm.weight".split()
MODEL_NAMES = [*(f"model.{name}" for name in DECODER_NAMES), "lm_head.weight"]


@pytest.mark.parametrize(
    "stored",
    [
        MODEL_NAMES,
        [*DECODER_NAMES, "lm_head.weight"],
        [f"base_model.model.{name}" for name in MODEL_NAMES],
        [f"_orig_mod.{name}" for name in MODEL_NAMES],
        [f"module.{name}" for name in MODEL_NAMES],
        [f"base_model.model.model.{name}" for name in MODEL_NAMES],
        [*(f"transformer.{name}" for name in DECODER_NAMES), "lm_head.weight"],
    ],
)
def test_tensors_have_the_models_names_whoever_saved_them(stored: list[str]) -> None:
    assert list(names_of_models(stored).items()) == list(zip(MODEL_NAMES, stored, strict=True))


@pytest.mark.parametrize("stored", [["a", "b"], [*MODEL_NAMES, "draft.embed_tokens.weight"], []])
def test_names_that_fit_no_rule_stay(stored: list[str]) -> None:
    assert names_of_models(stored) == {name: name for name in stored}


@pytest.mark.parametrize(
    ("config", "file", "sentence"),
    [
        ({"architectures": ["Qwen2ForRewardModel"]}, None, "is a reward model, which gives a text a score"),
        ({"architectures": ["Qwen2ForProcessRewardModel"]}, None, "is a reward model"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, None, "is a classifier, .*reward models"),
        ({"architectures": ["Qwen2ForTokenClassification"]}, None, "is a classifier"),
        ({"architectures": ["Qwen2Model"]}, None, "is a model of embeddings"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "modules.json", "is a model of embeddings"),
        ({}, "config_sentence_transformers.json", "is a model of embeddings"),
        ({"model_type": "qwen2_vl"}, None, "is a vision-language model"),
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, None, "is a vision-language model"),
        ({"model_type": "qwen2", "vision_config": {}}, None, "is a vision-language model"),
        ({"model_type": "qwen2_audio"}, None, "is an audio-language model"),
        ({"model_type": "qwen2_5_omni"}, None, "is a model of text, images and sound"),
        ({"model_type": "qwen3_vl_moe"}, None, "is a vision-language model"),
        ({"model_type": "qwen3_omni_moe"}, None, "is a model of text, images and sound"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, None, "is a classifier, .*rerankers"),
        ({"architectures": ["Qwen2ForCausalLM"], "is_causal": False}, None, "is a model of embeddings"),
    ],
)
def test_models_that_write_no_text_are_called_by_their_name(
    tmp_path: Path, config: dict[str, Any], file: str | None, sentence: str
) -> None:
    if file:
        (tmp_path / file).write_text("{}")
    reason = "only models that read text and write text are served here"
    with pytest.raises(StartError, match=f"^{tmp_path} {sentence}.*: {reason}, .* serves? such models$"):
        refuse_other_kinds(tmp_path, config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"architectures": ["QWenLMHeadModel"]},
        {"architectures": 5, "model_type": 5},
        {"architectures": [None]},
        {"architectures": ["Qwen2ForCausalLM"], "is_causal": True},
    ],
)
def test_models_of_text_are_not_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    refuse_other_kinds(tmp_path, config)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "an adapter"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", "an adapter"),
        ("score.weight", "a reward model"),
        ("v_head.summary.weight", "a reward model"),
        ("visual.blocks.0.attn.qkv.weight", "a vision-language model"),
        ("model.layers.0.self_attn.q_proj.weight", None),
        ("model.layers.0.score_scale", None),
    ],
)
def test_a_tensor_may_tell_what_the_folder_holds(name: str, kind: str | None) -> None:
    told = kind_of_tensor(name)
    assert told is None if kind is None else kind in str(told)


@pytest.mark.parametrize(
    ("names", "config", "base"),
    [
        ("adapter_config.json adapter_model.safetensors", {"base_model_name_or_path": "a/b"}, AdapterBase("a/b", None)),
        (
            "adapter_config.json adapter_model.safetensors config.json optimizer.safetensors",
            {"base_model_name_or_path": "./x", "revision": "v1"},
            AdapterBase("./x", "v1"),
        ),
        ("adapter_config.json adapter_model.safetensors model.safetensors", {"base_model_name_or_path": "a/b"}, None),
        ("config.json model.safetensors", {}, None),
    ],
)
def test_an_adapter_names_its_model(
    tmp_path: Path, names: str, config: dict[str, Any], base: AdapterBase | None
) -> None:
    for name in names.split():
        (tmp_path / name).write_text(json.dumps(config))
    assert adapter_base(tmp_path) == base


@pytest.mark.parametrize("name", [None, "", 5, ["a/b"]])
def test_an_adapter_that_names_no_model(tmp_path: Path, name: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    with pytest.raises(StartError, match="adapter_config.json does not name its model: put its folder or id there"):
        adapter_base(tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "qwen2"}')
    assert read_model_config(tmp_path) == {"model_type": "qwen2"}
