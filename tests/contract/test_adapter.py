"""Adapters (LoRA) given in place of a model: merged as `peft` merges them, or refused by what they are made of.

The oracle is `transformers` with weights that the test has merged in float32.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numba
import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.start
from engine.build import build_model
from engine.checkpoint.adapter import AdapterWeights, MergedWeights
from engine.checkpoint.files import read_model_config
from engine.checkpoint.gguf_folder import gguf_folder
from engine.checkpoint.weights import open_weights
from engine.core import EngineCore
from engine.link.config import EngineConfig
from engine.link.errors import StartError
from engine.quantize.options import QuantizeOptions
from engine.quantize.quantize import quantize
from engine.runner import ModelRunner
from engine.start import start_engine
from parallel.state import ParallelState
from tests.contract.harness import KERNELS, make_requests, make_sequence, oracle_greedy, run_requests, run_step
from tests.oracles.adapter_peft import FOLDER as ADAPTERS
from tests.oracles.adapter_peft import write_base
from tests.tiny_gguf import write_gguf
from tests.tiny_model import write_tiny_gptq, write_tiny_qwen2
from tests.unit.parallel.threads import run_ranks

LAYER = "model.layers.1"
ATTENTION = [f"model.layers.{index}.self_attn.{name}_proj" for index in (0, 1) for name in "qkvo"]
MLP = [f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down")]
CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_alpha": 16, "r": 4, "bias": "none"}
RANK = 4
ON_TABLE = "model.embed_tokens"
BESIDE = "saved-along experts experts-by-modules one-parameter".split()
"""Adapters of `peft` that may also be kept beside the model."""
PEFT: dict[str, Any] = json.loads((ADAPTERS / "expected.json").read_text())


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.start, "detect_device", lambda local_rank, name: KERNELS)


def write_adapter(
    folder: Path, base: Path, modules: list[str], *, dtype: torch.dtype = torch.float32, **changes: Any
) -> None:
    """An adapter of `modules` with random matrices, named as `peft` names them."""
    folder.mkdir()
    config = {**CONFIG, "base_model_name_or_path": str(base), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator, weights, tensors = torch.Generator().manual_seed(1), load_file(base / "model.safetensors"), {}
    for module in modules:
        outputs, inputs = weights[f"{module}.weight"].shape
        sizes = {"A": (RANK, inputs), "B": (outputs, RANK)}
        if module == ON_TABLE:
            sizes = {"embedding_A": (RANK, outputs), "embedding_B": (inputs, RANK)}
        for part, size in sizes.items():
            end = "" if "embedding" in part else ".weight"
            name = f"base_model.model.{module}.lora_{part}{end}"
            tensors[name] = torch.randn(size, generator=generator).div(8).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")


def merged_by_hand(base: Path, adapter: Path, folder: Path, scaling: dict[str, float]) -> Path:
    """The base model in float32 with the adapter's changes; `scaling` by module."""
    shutil.copytree(base, folder)
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    tensors = {name: tensor.float() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    for module, factor in scaling.items():
        lora = f"base_model.model.{module}.lora_"
        if module == ON_TABLE:
            change = (tensors[f"{lora}embedding_B"] @ tensors[f"{lora}embedding_A"]).T
        else:
            change = tensors[f"{lora}B.weight"] @ tensors[f"{lora}A.weight"]
        weights[f"{module}.weight"] += factor * change
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    return folder


def start(base: Path, adapter: Path | None, **flags: Any) -> EngineCore:
    adapter_path = None if adapter is None else str(adapter)
    fields = {"dtype": "float32", "max_batch_total_tokens": 512, **flags}
    return start_engine(EngineConfig(model_path=str(base), adapter_path=adapter_path, num_threads=1, **fields))[0]


@pytest.mark.parametrize(
    ("modules", "is_tied", "dtype", "changes", "scaling"),
    [
        (ATTENTION, True, torch.float32, {}, {}),
        ([*ATTENTION, *MLP], True, torch.bfloat16, {}, {}),
        ([*MLP, "lm_head"], False, torch.float16, {"use_rslora": True}, dict.fromkeys([*MLP, "lm_head"], 8.0)),
        ([ON_TABLE, *MLP], False, torch.float32, {"lora_alpha": 2.5}, dict.fromkeys([ON_TABLE, *MLP], 0.625)),
        (
            [*ATTENTION, *MLP],
            True,
            torch.float32,
            {"alpha_pattern": {"down_proj": 2, "0.self_attn.[qk]_proj": 32}},
            {f"{LAYER}.mlp.down_proj": 0.5, ATTENTION[0]: 8.0, ATTENTION[1]: 8.0},
        ),
    ],
)
def test_the_ids_are_those_of_the_merged_model(
    tmp_path: Path,
    modules: list[str],
    is_tied: bool,
    dtype: torch.dtype,
    changes: dict[str, Any],
    scaling: dict[str, float],
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base, is_tied=is_tied, dtype=dtype)
    write_adapter(adapter, base, modules, dtype=dtype, **changes)
    merged = merged_by_hand(base, adapter, tmp_path / "merged", {**dict.fromkeys(modules, 4.0), **scaling})
    prompts = [list(range(30, 60)), [5, 7, 11]]
    requests = make_requests(prompts, max_new_tokens=12)
    expected = [oracle_greedy(merged, prompt, 12)[0] for prompt in prompts]
    assert run_requests(start(base, adapter), requests).token_ids == expected
    assert run_requests(start(base, None), requests).token_ids != expected


@pytest.mark.parametrize("flags", [{}, {"quantize": "eetq"}, {"quantize": "int4"}])
def test_in_16_bits_and_quantised_on_load_it_is_the_merged_model_too(tmp_path: Path, flags: dict[str, Any]) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base, dtype=torch.bfloat16)
    write_adapter(adapter, base, [*ATTENTION, *MLP])
    merged = merged_by_hand(base, adapter, tmp_path / "merged", dict.fromkeys([*ATTENTION, *MLP], 4.0))
    requests = make_requests([list(range(30, 60))], max_new_tokens=12)
    cores = [start(*folders, dtype="bfloat16", **flags) for folders in ((base, adapter), (merged, None))]
    ids = [run_requests(core, requests).token_ids for core in cores]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("index", [(slice(8, 24),), (slice(None), slice(16, 48)), (slice(0, 8), slice(3, 5)), ()])
@pytest.mark.parametrize("module", [f"{LAYER}.self_attn.o_proj", ON_TABLE])
def test_a_rank_reads_its_part(tmp_path: Path, module: str, index: tuple[slice, ...]) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base, dtype=torch.bfloat16)
    write_adapter(adapter, base, [module])
    weights = MergedWeights(open_weights(base), base, adapter)
    name = f"{module}.weight"
    whole = weights.read(name)
    torch.testing.assert_close(weights.read(name, index), whole[index])
    assert (weights.dtype(name), whole.dtype) == ("F32", torch.float32)
    other = "model.norm.weight"
    assert torch.equal(weights.read(other), load_file(base / "model.safetensors")[other])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_dora": True}, "an adapter of DoRA"),
        ({"modules_to_save": ["norm"]}, "lacks norm, which modules_to_save names: fetch the adapter again"),
        ({"modules_to_save": "norm"}, r"cannot be used \(modules_to_save is no list of names\)"),
        ({"lora_bias": True}, "has only one half of the change of model.layers.0.self_attn.k_proj"),
        ({"peft_type": "IA3"}, "an adapter of IA3"),
        ({"peft_type": None}, "an adapter of None"),
        (
            {"task_type": "SEQ_2_SEQ_LM"},
            r"an adapter of a model for another task \(SEQ_2_SEQ_LM\).*: merge it with `peft`",
        ),
        ({"task_type": "SEQ_CLS"}, "an adapter whose model is a classifier, .*, Text Embeddings Inference, vLLM and"),
        ({"task_type": "TOKEN_CLS"}, "an adapter whose model is a classifier, which labels a text .* vLLM serves such"),
        ({"task_type": "QUESTION_ANS"}, "an adapter whose model is a model that marks answers in a text"),
        ({"task_type": "FEATURE_EXTRACTION"}, "an adapter whose model is a model of embeddings, .* are served here"),
        ({"init_lora_weights": "pissa_niter_4"}, "an adapter of a base model that its training has changed"),
        ({"alora_invocation_tokens": [1]}, "an adapter of a part of each prompt only"),
        ({"lora_alpha": None}, "adapter_config.json cannot be used"),
        ({"lora_alpha": "x"}, "adapter_config.json cannot be used"),
        ({"alpha_pattern": {"(": 1}}, "adapter_config.json cannot be used"),
        ({"alpha_pattern": [1]}, "adapter_config.json cannot be used"),
    ],
)
def test_other_adapters_are_refused_by_what_they_are(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base)
    write_adapter(adapter, base, ATTENTION, **changes)
    with pytest.raises(StartError, match=sentence):
        start(base, adapter)


def q_proj(part: str) -> str:
    return f"base_model.model.{LAYER}.self_attn.q_proj.lora_{part}.weight"


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({q_proj("A"): (4, 64)}, "has only one half of the change of model.layers.1.self_attn.q_proj"),
        ({q_proj("A"): (4, 63), q_proj("B"): (64, 4)}, r"they do not belong together"),
        ({q_proj("A"): (4, 64), q_proj("B"): (64, 5)}, r"they do not belong together"),
        ({q_proj("A"): (64,), q_proj("B"): (64, 4)}, r"as F32 \[64\], and an adapter is made of matrices in F32"),
        (
            {"base_model.model.model.norm.weight": (64,)},
            r"has a tensor base_model\.model\.model\.norm\.weight, which is no",
        ),
        ({q_proj("magnitude_vector"): (64,)}, "which is no part of a LoRA"),
        (
            {name.replace("layers.1", "layers.7"): (4, 4) for name in (q_proj("A"), q_proj("B"))},
            "changes model.layers.7.self_attn.q_proj.weight, which its base model does not have",
        ),
    ],
)
def test_an_adapter_that_does_not_fit(tmp_path: Path, tensors: dict[str, tuple[int, ...]], sentence: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base)
    write_adapter(adapter, base, [])
    save_file({name: torch.zeros(size) for name, size in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(StartError, match=sentence):
        start(base, adapter)


@pytest.mark.parametrize("name", PEFT["answers"])
def test_adapters_of_the_real_peft_have_its_ids(name: str, tmp_path: Path) -> None:
    """Experts, tensors trained whole, biases, one of two tied tensors, tensors of the base model that are not used."""
    answer = PEFT["answers"][name]
    assert answer["smallest_gap"] > 1e-3, "a near-tie decides nothing"
    write_base(name, tmp_path)
    [request] = make_requests([PEFT["prompt_ids"]], max_new_tokens=len(answer["ids"]))
    requests = [msgspec.structs.replace(request, is_ignoring_eos=True)]
    assert run_requests(start(tmp_path, ADAPTERS / name), requests).token_ids == [answer["ids"]]
    if name in BESIDE:
        core = start(tmp_path, None, lora_adapters=[("a", str(ADAPTERS / name))])
        both = [*requests, msgspec.structs.replace(requests[0], request_id="a", adapter_id="a")]
        ids = run_requests(core, both).token_ids
        assert ids[1] == answer["ids"] != ids[0]
    else:
        with pytest.raises(StartError, match="beside the model only the matrices of its layers can be changed: give"):
            start(tmp_path, None, lora_adapters=[("a", str(ADAPTERS / name))])


@pytest.mark.parametrize("name", "experts saved-modules tied-saved tied-table added-biases".split())
def test_on_shards_it_is_merged_part_by_part(name: str, tmp_path: Path) -> None:
    write_base(name, tmp_path)
    config = read_model_config(tmp_path)

    def work(parallel: ParallelState) -> torch.Tensor:
        numba.set_num_threads(1)
        model = build_model(config, tmp_path, torch.float32, KERNELS, parallel=parallel, adapter=ADAPTERS / name)
        runner = ModelRunner(model, KERNELS)
        runner.allocate(4, torch.float32, num_positions=64)
        return run_step(runner, [make_sequence(PEFT["prompt_ids"], [0])], [len(PEFT["prompt_ids"])])

    [whole], (first, _) = run_ranks(1, work), run_ranks(2, work)
    torch.testing.assert_close(first, whole, atol=1e-4, rtol=1e-4)
    assert whole.argmax() == PEFT["answers"][name]["ids"][0]


def test_a_copy_may_lack_rows_of_padding_and_be_in_the_dtype_of_training(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base)
    write_adapter(adapter, base, ATTENTION)
    requests = make_requests([list(range(30, 60))], max_new_tokens=12)
    expected = run_requests(start(base, adapter), requests).token_ids
    for name in ("model.embed_tokens", "lm_head", "lm_head.base_layer"):  # of a tied model
        change_copy(base, adapter, name, lambda table: table[:259].to(torch.bfloat16))
        assert run_requests(start(base, adapter), requests).token_ids == expected


def change_copy(base: Path, adapter: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Have the adapter's file say what the base model's table is."""
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{name}.weight"] = change(table).contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda table: torch.cat([table, table[:8]]),
        lambda table: torch.cat([table[:-1], table[-1:] + 1]),
        lambda table: table[:, :-1],
        lambda table: table[0],
        lambda table: table * torch.nan,
        lambda table: table.to(torch.int8),
    ],
    ids="grown trained narrower vector nan integers".split(),
)
@pytest.mark.parametrize("is_merged", [True, False])
def test_a_table_that_was_trained_along_is_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], is_merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoint.adapter.COPIED_ROWS", 100)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base)
    write_adapter(adapter, base, ATTENTION)
    change_copy(base, adapter, "model.embed_tokens", change)
    sentence = (
        r"has base_model\.model\.model\.embed_tokens\.weight \[.*\], and model\.embed_tokens\.weight of its base model "
        "is another, or quantized: such training .* Merge the adapter with `peft`"
    )
    with pytest.raises(StartError, match=sentence):
        start(base, adapter) if is_merged else start(base, None, lora_adapters=[("a", str(adapter))])


@pytest.mark.parametrize("num_rows", [0, 1, 258])
@pytest.mark.parametrize("is_merged", [True, False])
def test_a_copy_lacks_no_row_of_a_token(num_rows: int, is_merged: bool, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base)
    write_adapter(adapter, base, ATTENTION)
    change_copy(base, adapter, "model.embed_tokens", lambda table: table[:num_rows])
    with pytest.raises(
        StartError, match=rf"weight \[{num_rows}, 64\], fewer rows than its base model has tokens: what"
    ):
        start(base, adapter) if is_merged else start(base, None, lora_adapters=[("a", str(adapter))])


def test_a_head_that_a_quantized_model_has_of_its_own_is_not_taken_for_the_table(tmp_path: Path) -> None:
    source, adapter = tmp_path / "source", tmp_path / "adapter"
    write_tiny_qwen2(source, dtype=torch.float16, is_tied=False)
    write_adapter(adapter, source, ATTENTION)
    change_copy(source, adapter, "lm_head", lambda table: table)
    table = "model.embed_tokens.weight"
    write_gguf(source, tmp_path / "model.gguf", "Q8_0", kinds={table: "F16"})
    base = gguf_folder([tmp_path / "model.gguf"], tmp_path / "cache")
    with pytest.raises(StartError, match=r"and lm_head\.weight of its base model is another, or quantized"):
        AdapterWeights(adapter).refuse_changed_copies(base)


def test_quantize_wants_a_whole_model(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "output"
    write_tiny_qwen2(base)
    write_adapter(adapter, base, ATTENTION)
    options = QuantizeOptions(model_id=str(adapter), output_dir=str(output), method="int8")
    with pytest.raises(StartError, match=f"{adapter} is an adapter: merge it with `peft` first, or serve it with"):
        quantize(options)
    assert not output.exists()


def test_a_pickled_adapter_is_not_read(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base)
    write_adapter(adapter, base, ATTENTION)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(StartError, match="has no adapter_model.safetensors, and pickled weights .* are never loaded"):
        start(base, adapter)


@pytest.mark.parametrize("module", ["lm_head", ON_TABLE])
def test_a_copy_of_the_table_as_head_is_changed_apart_from_it(module: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights[f"{ON_TABLE}.weight"].clone()  # as AutoGPTQ stores it
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    write_adapter(adapter, base, [module])
    merged = merged_by_hand(base, adapter, tmp_path / "merged", {module: 4.0})
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    prompt = list(range(30, 60))
    ids = run_requests(start(base, adapter), make_requests([prompt], max_new_tokens=12)).token_ids
    assert ids == [oracle_greedy(merged, prompt, 12)[0]]


def test_one_of_two_tables_that_were_trained_as_one_is_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base)
    write_adapter(adapter, base, [ON_TABLE], ensure_weight_tying=True)
    with pytest.raises(StartError, match=r"changes model.embed_tokens.weight for the table and the head: merge it"):
        start(base, adapter)


def test_nothing_is_merged_into_a_quantised_model(tmp_path: Path) -> None:
    base, dense, adapter = tmp_path / "base", tmp_path / "dense", tmp_path / "adapter"
    write_tiny_gptq(base)
    write_tiny_qwen2(dense)
    write_adapter(adapter, dense, ATTENTION)
    with pytest.raises(StartError, match=f"{base} is quantised, and no adapter can be merged into it: name the dense"):
        start(base, adapter)


def test_a_matrix_that_is_no_number_is_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_qwen2(base)
    write_adapter(adapter, base, ATTENTION)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[q_proj("B")][3, 1] = math.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(StartError, match="has a tensor model.layers.1.self_attn.q_proj.weight with NaN or infinite"):
        start(base, adapter)
