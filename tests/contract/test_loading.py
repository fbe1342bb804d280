"""Folders that cannot be served are refused with one sentence that names what is wrong; flags set the limits."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM

import engine.start
from engine.build import build_model
from engine.checkpoint.files import read_model_config
from engine.checkpoint.weights import WeightSource
from engine.core import EngineCore
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.link.messages import EngineReady
from engine.start import start_engine
from tests.contract.harness import KERNELS, make_core, make_requests, make_runner, oracle_greedy, run_requests
from tests.oracles.quant_stored import CHECKPOINTS
from tests.tiny_model import EOS_TOKEN_IDS, write_tiny_gptq, write_tiny_qwen2, write_tokenizer

Weights = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
LAYER = "model.layers.1"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.start, "detect_device", lambda local_rank, name: KERNELS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_qwen2(tmp_path)
    return tmp_path


def change_weights(folder: Path, change: Callable[[Weights], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def refusal(folder: Path) -> str:
    """The sentence of the error that ends the start."""
    with pytest.raises(StartError) as caught:
        make_runner(folder)
    return str(caught.value)


def start(folder: Path, **flags: Any) -> tuple[EngineCore, EngineReady]:
    return start_engine(EngineConfig(model_path=str(folder), dtype="float32", num_threads=1, **flags))


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.self_attn.q_proj.weight",
        f"{LAYER}.self_attn.k_proj.bias",
        f"{LAYER}.self_attn.v_proj.weight",
        f"{LAYER}.mlp.up_proj.weight",
        f"{LAYER}.mlp.down_proj.weight",
        f"{LAYER}.input_layernorm.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    change_weights(folder, lambda weights: weights.pop(name))
    assert refusal(folder) == f"{folder} lacks the tensor {name}: the checkpoint is not complete"


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=False)
    assert refusal(folder) == f"{folder} lacks the tensor lm_head.weight: the checkpoint is not complete"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        f"{LAYER}.self_attn.o_proj.bias",
        f"{LAYER}.self_attn.q_proj.weights",
        f"{LAYER}.self_attn.q_norm.weight",
        f"{LAYER}.input_layernorm.bias",
        "model.embed_tokens.bias",
        "stray",
    ],
)
def test_an_unknown_tensor_is_named(folder: Path, name: str) -> None:
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(64)}))
    assert refusal(folder) == f"{WEIGHTS} has a tensor {name} that the model does not know"


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        (f"{LAYER}.self_attn.k_proj.weight", [64, 64], [32, 64]),
        (f"{LAYER}.self_attn.k_proj.bias", [64], [32]),
        (f"{LAYER}.self_attn.o_proj.weight", [64, 63], [64, 64]),
        (f"{LAYER}.mlp.down_proj.weight", [96, 64], [64, 96]),
        (f"{LAYER}.input_layernorm.weight", [1], [64]),
        ("model.embed_tokens.weight", [265, 64], [264, 64]),
    ],
)
def test_a_wrong_shape_is_named(folder: Path, name: str, shape: list[int], wanted: list[int]) -> None:
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(shape)}))
    assert refusal(folder) == (
        f"tensor {name} has shape {shape}, the model needs {wanted}: config.json and the weights do not belong together"
    )


def test_a_dtype_that_is_not_loaded(folder: Path) -> None:
    tensor = f"{LAYER}.mlp.up_proj.weight"
    change_weights(folder, lambda weights: weights.update({tensor: weights[tensor].to(torch.float64)}))
    loaded = "F32, F16, BF16, F8_E4M3, I8, I32, I64"
    assert refusal(folder) == f"tensor {tensor} is stored as F64: only {loaded} are loaded"


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
@pytest.mark.parametrize(
    "tensor", [f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.input_layernorm.weight", "model.embed_tokens.weight"]
)
def test_integers_without_a_scale(folder: Path, dtype: torch.dtype, tensor: str) -> None:
    change_weights(folder, lambda weights: weights.update({tensor: weights[tensor].to(dtype)}))
    stored = f"tensor {tensor} is stored as {dtype}, which the model can't use there"
    assert refusal(folder) == f"{stored}: config.json and the weights do not belong together"


@pytest.mark.parametrize("kept", [0, 5, 100, 10_000, -1])
def test_a_file_that_was_cut_off(folder: Path, kept: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(folder)
    assert message.startswith(f"{path} is not a whole safetensors file (")
    assert message.endswith("): fetch the model again")


def test_a_shard_that_was_cut_off(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, num_shards=3)
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(tmp_path)
    assert message.startswith(f"{path} is not a whole safetensors file (")
    assert message.endswith("): fetch the model again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        f"{LAYER}.input_layernorm.weight",
        f"{LAYER}.self_attn.k_proj.bias",
        f"{LAYER}.self_attn.v_proj.weight",
        f"{LAYER}.mlp.down_proj.weight",
    ],
)
def test_weights_that_are_no_numbers(tmp_path: Path, name: str, value: float, dtype: torch.dtype) -> None:
    write_tiny_qwen2(tmp_path, is_tied=False, dtype=dtype)
    change_weights(tmp_path, lambda weights: weights[name].view(-1)[-1:].fill_(value))
    assert refusal(tmp_path) == (
        f"{tmp_path / WEIGHTS} has a tensor {name} with NaN or infinite values: fetch the model again"
    )


def test_finite_weights_whose_sum_overflows_are_no_reason(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, dtype=torch.float16)
    change_weights(tmp_path, lambda weights: weights[f"{LAYER}.mlp.up_proj.weight"].fill_(60_000.0))
    make_runner(tmp_path)


def test_a_file_that_is_something_else(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert "is not a whole safetensors file" in refusal(folder)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, num_shards=3)
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.unlink()
    assert refusal(tmp_path) == f"{path} is named by model.safetensors.index.json but missing: fetch the model again"


def test_no_weights_at_all(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert refusal(folder) == f"{folder} has no *.safetensors file and no *.gguf: other weights are not loaded"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported; supported: qwen2, qwen2_moe, qwen3, qwen3_moe"),
        ({"model_type": ...}, "model_type '' is not supported; supported: qwen2, qwen2_moe, qwen3, qwen3_moe"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "the quantisation's bits is None, which can't be loaded: fetch the model again",
        ),
        (
            {"rope_scaling": {"type": "longrope", "factor": 4.0}},
            "rope scaling 'longrope' is not supported; supported: default, dynamic, linear, llama3, yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            "rope scaling 'linear' needs a factor of at least 1, not None: "
            "correct it in config.json, or give --rope-scaling and --rope-factor",
        ),
        (
            {"use_sliding_window": True, "sliding_window": 0},
            "sliding_window 0 in config.json is not a number of tokens: correct it or remove it",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' in config.json is not supported; Qwen has silu"),
    ],
)
def test_models_that_cannot_be_served(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    assert refusal(folder) == message


def whole(key: str, value: Any) -> tuple[dict[str, Any], str]:
    return {key: value}, f"{key} {value!r} in config.json is not a size: fetch the model again"


SLIDING = {"use_sliding_window": True, "sliding_window": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        whole("hidden_size", "64"),
        whole("hidden_size", True),
        whole("hidden_size", 10**30),
        whole("num_hidden_layers", 64.0),
        whole("num_hidden_layers", 10**9),
        whole("max_position_embeddings", "x"),
        whole("max_position_embeddings", 0),
        whole("vocab_size", -264),
        whole("intermediate_size", [96]),
        whole("num_attention_heads", {}),
        whole("num_key_value_heads", -2),
        whole("head_dim", "16"),
        (
            {"rms_norm_eps": "x"},
            "rms_norm_eps 'x' in config.json is not a number between 0 and 1: fetch the model again",
        ),
        (
            {"rms_norm_eps": float("nan")},
            "rms_norm_eps nan in config.json is not a number between 0 and 1: fetch the model again",
        ),
        ({"model_type": []}, "model_type '[]' is not supported; supported: qwen2, qwen2_moe, qwen3, qwen3_moe"),
        ({"torch_dtype": 1}, "dtype '1' is not supported: give --dtype one of float32, bfloat16, float16"),
        (
            {"layer_types": 5},
            "layer_types in config.json must say full_attention or sliding_attention for each of 2 layers",
        ),
        (
            {"layer_types": [[], {}]},
            "layer_types in config.json must say full_attention or sliding_attention for each of 2 layers",
        ),
        (
            {**SLIDING, "max_window_layers": None},
            "max_window_layers None in config.json is not a number of layers: correct it",
        ),
        (
            {**SLIDING, "sliding_window": 10**30},
            f"sliding_window {10**30} in config.json is not a number of tokens: correct it or remove it",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1}},
            "rope scaling 'yarn' cannot be computed with these numbers: correct config.json's rope_theta (1) and "
            "rope_scaling",
        ),
    ],
)
def test_a_configuration_of_wrong_types(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, dtype=..., **changes)
    with pytest.raises(StartError) as caught:
        start_engine(EngineConfig(model_path=str(folder)))
    assert str(caught.value) == message


def test_rope_parameters_beside_rope_scaling_are_not_looked_into(folder: Path) -> None:
    change_config(folder, rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=[1], rope_theta=...)
    start(folder)


def test_a_factor_that_no_position_fits(folder: Path) -> None:
    with pytest.raises(StartError, match=r"rope scaling 'linear' with a factor of 1e\+308 stretches .* too far: lower"):
        start(folder, rope_factor=1e308)


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, OverflowError, ZeroDivisionError])
def test_what_no_check_foresaw(folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(config: dict[str, Any]) -> None:
        raise error("why")

    monkeypatch.setattr("engine.models.qwen2.attention_windows", fail)
    assert refusal(folder) == f"config.json can't be used ({error('why')!r}): fetch the model again"


def test_weights_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, framework: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("engine.checkpoint.safetensors_weights.safe_open", refuse)
    assert refusal(folder) == (
        f"{folder / WEIGHTS} cannot be read (Permission denied): fix that, or fetch the model again"
    )


class MemoryWeights:
    """A `WeightSource` whose tensors never were in a file."""

    files: list[Path] = []

    def __init__(self, tensors: Weights) -> None:
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        return [*self._tensors]

    def file(self, name: str) -> Path:
        return Path("memory")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return "F32"

    def read(self, name: str, index: tuple[slice, ...] = (), *, is_kept: bool = False) -> torch.Tensor:
        return self._tensors[name][index]


def test_weights_may_come_from_any_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = make_requests([list(range(30, 60))], max_new_tokens=10)
    expected = run_requests(make_core(folder), requests).token_ids
    source: WeightSource = MemoryWeights(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    monkeypatch.setattr("engine.build.open_weights", lambda folder: source)
    assert run_requests(make_core(folder), requests).token_ids == expected


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(("wrapper", "decoder"), [("", ""), ("base_model.model.", "model."), ("_orig_mod.", "model.")])
def test_tensors_may_have_other_prefixes(tmp_path: Path, wrapper: str, decoder: str, is_tied: bool) -> None:
    write_tiny_qwen2(tmp_path, is_tied=is_tied)
    requests = make_requests([list(range(30, 60))], max_new_tokens=10)
    expected = run_requests(make_core(tmp_path), requests).token_ids
    weights = load_file(tmp_path / WEIGHTS)
    renamed = {wrapper + name.replace("model.", decoder, 1): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / WEIGHTS)
    assert run_requests(make_core(tmp_path), requests).token_ids == expected


def test_a_table_that_is_the_head_too_may_be_stored_under_its_name(folder: Path) -> None:
    """`save_model` of safetensors keeps one name of memory that has two, and that is the head's."""
    requests = make_requests([list(range(30, 60))], max_new_tokens=10)
    expected = run_requests(make_core(folder), requests).token_ids
    save_model(AutoModelForCausalLM.from_pretrained(folder), str(folder / WEIGHTS))
    names = load_file(folder / WEIGHTS).keys()
    assert "lm_head.weight" in names and "model.embed_tokens.weight" not in names
    assert run_requests(make_core(folder), requests).token_ids == expected
    change_config(folder, tie_word_embeddings=False)
    assert "lacks the tensor model.embed_tokens.weight" in refusal(folder)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_tied_model_with_a_head_of_its_own_has_that_head(
    tmp_path: Path, num_shards: int, caplog: pytest.LogCaptureFixture
) -> None:
    """`transformers` 5 ties only what is equal; with a copy of the table the model is tied."""
    write_tiny_qwen2(tmp_path, is_tied=False, num_shards=num_shards)
    change_config(tmp_path, tie_word_embeddings=True)
    prompt = list(range(30, 60))
    expected, gap = oracle_greedy(tmp_path, prompt, 10)
    assert gap > 1e-4
    core = make_core(tmp_path)
    assert run_requests(core, make_requests([prompt], max_new_tokens=10)).token_ids == [expected]
    assert "has a head that is not the table of embeddings" in caplog.text


def test_a_tied_model_with_a_copy_of_its_table_is_tied(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 0}))
    model = build_model(read_model_config(folder), folder, torch.float32, KERNELS)
    assert model.lm_head is model.checkpoint_layers()["model.embed_tokens"][0]
    assert "head" not in caplog.text


@pytest.mark.parametrize("kind", ["gptq", "gptq head", "eetq"])
def test_a_tied_model_that_is_quantised_has_its_own_head_too(tmp_path: Path, kind: str) -> None:
    if kind == "gptq head":
        shutil.copytree(CHECKPOINTS / "gptqmodel-v1-lm-head", tmp_path, dirs_exist_ok=True)
        write_tokenizer(tmp_path)
    else:
        write = write_tiny_gptq if kind == "gptq" else write_tiny_qwen2
        write(tmp_path, is_tied=False)
    requests = make_requests([list(range(30, 60))], max_new_tokens=10)
    ids = []
    for is_tied in (False, True):
        change_config(tmp_path, tie_word_embeddings=is_tied)
        runner = make_runner(tmp_path, quantize=kind if kind == "eetq" else None)
        ids.append(run_requests(make_core(tmp_path, runner=runner), requests).token_ids)
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (f"{LAYER}.self_attn.q_proj.lora_A.default.weight", "holds an adapter (LoRA) that is not merged"),
        ("score.weight", "is a reward model"),
        ("v_head.summary.weight", "is a reward model"),
        *(
            (f"{LAYER}.mlp.up_proj.{leaf}", "is quantised, and otherwise than its config.json says: fetch config.json")
            for leaf in ("qweight", "g_idx", "weight_packed", "weight_scale_inv")
        ),
    ],
)
def test_a_tensor_of_another_kind_of_model_is_explained(folder: Path, name: str, sentence: str) -> None:
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(64)}))
    assert refusal(folder).startswith(
        f"{WEIGHTS} has a tensor {name} that the model does not know: the folder {sentence}"
    )


def test_what_a_folder_has_beside_its_model_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("adapter_model.safetensors", "._model.safetensors"):
        (folder / name).write_bytes(b"not weights")
    change_config(folder, dual_chunk_attention_config={"original_max_position_embeddings": 262144})
    with caplog.at_level("INFO"):
        start(folder, max_batch_total_tokens=256)
    assert "Files beside the model that are not loaded: ._model.safetensors, adapter_model.safetensors" in caplog.text
    assert "dual_chunk_attention_config in config.json has no effect" in caplog.text
    assert "answers to more than 262144 tokens" in caplog.text


def test_other_kinds_of_models_are_refused_before_their_weights_are_read(folder: Path) -> None:
    change_config(folder, architectures=["Qwen2ForRewardModel"])
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(StartError, match="is a reward model, which gives a text a score and writes none"):
        start(folder)


@pytest.mark.parametrize("is_strict", [False, True])
def test_a_text_ends_at_the_ids_of_all_files(folder: Path, is_strict: bool) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 10**6]}))
    change_config(folder, eos_token_id=9)
    core, _ = start(folder, max_batch_total_tokens=256, is_strict_tgi=is_strict)
    assert core.scheduler.eos_token_ids == ({7} if is_strict else {7, 9, EOS_TOKEN_IDS[0]})


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"])
def test_a_size_that_config_json_does_not_say_is_named_where_the_weights_have_another(folder: Path, key: str) -> None:
    change_config(folder, **{key: ...})
    assert refusal(folder).endswith(f"; config.json does not say {key}")


def test_sizes_that_the_kernels_cannot_take_are_refused_in_words(tmp_path: Path) -> None:
    write_tiny_qwen2(tmp_path, intermediate_size=100)
    assert "100" in refusal(tmp_path)


def test_an_unknown_dtype_names_the_known_ones(folder: Path) -> None:
    change_config(folder, torch_dtype="float8_e4m3fn")
    with pytest.raises(StartError) as caught:
        start_engine(EngineConfig(model_path=str(folder)))
    assert str(caught.value) == (
        "dtype 'float8_e4m3fn' is not supported: give --dtype one of float32, bfloat16, float16"
    )


def test_start_gives_an_engine_that_answers_like_transformers(tiny_model_dir: Path) -> None:
    core, limits = start(tiny_model_dir, max_batch_total_tokens=512)
    assert limits == EngineReady(
        max_input_tokens=511,
        max_total_tokens=512,
        max_batch_prefill_tokens=512,
        max_batch_total_tokens=512,
        vocab_size=264,
    )
    assert core.scheduler.eos_token_ids == frozenset(EOS_TOKEN_IDS)
    assert core.scheduler.stats().num_cached_blocks == 0, "the warm-up leaves nothing behind"
    prompt = list(range(30, 60))
    expected, smallest_gap = oracle_greedy(tiny_model_dir, prompt, 10)
    assert smallest_gap > 1e-3
    assert run_requests(core, make_requests([prompt], max_new_tokens=10)).token_ids == [expected]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (511, 512, 512, 32_768)),
        ({"max_total_tokens": 100, "max_batch_total_tokens": 100}, (99, 100, 112, 112)),
        ({"max_total_tokens": 100}, (99, 100, 512, 32_768)),
        ({"max_batch_total_tokens": 10}, (15, 16, 16, 16)),
        ({"max_batch_total_tokens": 64, "max_batch_prefill_tokens": 3}, (63, 64, 3, 64)),
    ],
)
def test_limits_of_a_started_engine(
    tiny_model_dir: Path, flags: dict[str, int], expected: tuple[int, int, int, int]
) -> None:
    core, limits = start(tiny_model_dir, **flags)
    assert (
        limits.max_input_tokens,
        limits.max_total_tokens,
        limits.max_batch_prefill_tokens,
        limits.max_batch_total_tokens,
    ) == expected
    stats = core.scheduler.stats()
    assert stats.num_blocks * stats.block_size == limits.max_batch_total_tokens
    longest = make_requests([[5] * limits.max_input_tokens], max_new_tokens=1)
    assert len(run_requests(core, longest).token_ids[0]) == 1


def test_more_kv_than_there_is_memory(tiny_model_dir: Path) -> None:
    with pytest.raises(
        StartError, match="Not enough memory to handle .* GB of .* GB .*: lower --max-batch-total-tokens to [1-9]"
    ):
        start(tiny_model_dir, max_batch_total_tokens=10**12)


def test_a_model_larger_than_the_memory(tiny_model_dir: Path) -> None:
    with pytest.raises(StartError, match="Not enough memory for the model: its weights take"):
        start(tiny_model_dir, memory_fraction=1e-9)


def test_a_step_larger_than_the_memory(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(KERNELS, free_memory_bytes=lambda: 150_000_000)
    monkeypatch.setattr(engine.start, "detect_device", lambda local_rank, name: small)
    with pytest.raises(StartError, match=r"Not enough memory to handle 100000 prefill tokens\. You need to decrease"):
        start(tiny_model_dir, max_batch_prefill_tokens=100_000, max_batch_total_tokens=100_000)


def test_the_summary_says_what_was_resolved(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        start(tiny_model_dir, max_batch_total_tokens=1024, max_batch_size=3)
    for text in (
        "dtype float32, not quantised, head dense",
        "Setting max batch total tokens to 1024",
        "KV cache of 1024 tokens in float32 (2.0 requests of full length), prefix caching on",
        "Limits: 511 input tokens, 512 total tokens, 512 tokens per step",
        "Kernels: cpu, ",
        "Row-invariant: the bits of a token's logits do not depend",
    ):
        assert text in caplog.text


def test_prefix_caching_can_be_turned_off(tiny_model_dir: Path) -> None:
    for is_on in (True, False):
        core, _ = start(tiny_model_dir, max_batch_total_tokens=256, is_prefix_caching=is_on)
        run_requests(core, make_requests([[5] * 40], max_new_tokens=2))
        assert bool(core.scheduler.stats().num_cached_blocks) is is_on


@pytest.mark.parametrize(("sizes", "is_told"), [((1, 2), True), ((0,), False), (None, False)])
def test_graphs_that_a_cpu_does_not_have_are_told(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, sizes: tuple[int, ...] | None, is_told: bool
) -> None:
    caplog.set_level("INFO")
    start(tiny_model_dir, graph_sizes=sizes, max_batch_total_tokens=512)
    assert ("--cuda-graphs has no effect: the device has none" in caplog.text) == is_told
