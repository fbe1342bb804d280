"""What every family must do: all formats, shards, steps as programs. Other tests have logits of dense models."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine.checkpoint.weights import open_weights
from engine.device import Device
from engine.layers.base import Rotation
from engine.link.errors import StartError
from engine.link.progress import StartProgress
from engine.models import MODELS
from engine.models.base import RowSelection
from engine.models.blocks import DecoderForCausalLM, FeedForward
from engine.sampling.sampler_cpu import sample
from engine.scheduling.step_limit import StepLimit
from engine.warm_up import WARM_UP_TOKENS, warm_up
from tests.contract.harness import (
    KERNELS,
    REFERENCES,
    all_logits,
    make_runner,
    make_sequence,
    oracle_logits,
    random_ids,
    run_step,
)
from tests.contract.oracles import FAMILIES
from tests.contract.test_sharded import LAYOUTS, QUANTIZED, distance, logits_of
from tests.contract.test_step_programs import make_runner as make_repeating_runner
from tests.contract.test_step_programs import steps_of
from tests.oracles.dequantize import dequantize
from tests.tiny_model import VOCAB_SIZE

GROUP_SIZE = 32
SIZES = (2, 3, 4)
STORED = [name for name in LAYOUTS if LAYOUTS[name].config(GROUP_SIZE)]
SHARDED = [name for name in ("float32", *QUANTIZED) if name not in ("int4 on load", "gptq 3 bits")]
"""These tiny matrices are cut within a group of the one and within a word of the other: `test_sharded` has both."""
SPARSE = [family for family in FAMILIES if family.endswith("_moe")]
DENSE = [family for family in FAMILIES if family not in SPARSE]
"""All formats of `SPARSE` are with the slow tests, as each is some kernels more to compile."""
CUT = [(family, "float32") for family in FAMILIES] + [("qwen3", "int8 on load"), ("qwen3", "gptq 4 bits")]
"""`test_sharded` cuts every layout of a Qwen2, as the layers of all families do; the slow tests have the others."""
FolderOf = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """Family and layout -> the folder of a tiny model whose matrices are stored so, which is written once."""
    root = tmp_path_factory.mktemp("families")

    def write(family: str, layout: str) -> Path:
        folder = root / f"{family} {layout}"
        if not folder.exists():
            FAMILIES[family].write(folder)
            store_as(folder, layout)
        return folder

    return write


def store_as(folder: Path, name: str) -> None:
    """Put random matrices in the form of the layout in place of the dense ones."""
    layout, path = LAYOUTS[name], folder / "model.safetensors"
    settings, generator = layout.config(GROUP_SIZE), torch.Generator().manual_seed(0)
    tensors = {key: tensor.to(layout.dtype) for key, tensor in load_file(path).items()}
    for key in [key for key in tensors if key.endswith("_proj.weight") and settings]:
        matrix = layout.stored(*tensors.pop(key).shape, GROUP_SIZE, generator)
        tensors |= {f"{key.removesuffix('.weight')}.{leaf}": part.contiguous() for leaf, part in matrix.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"torch_dtype": str(layout.dtype).removeprefix("torch.")}
    config |= {"quantization_config": settings} if settings else {}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("layout", STORED)
@pytest.mark.parametrize("family", DENSE)
def test_quantised_checkpoints_are_the_model_of_their_weights(
    family: str, layout: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    check_stored_weights(folder_of(family, layout), tmp_path)


def check_stored_weights(folder: Path, dense_folder: Path) -> None:
    """Logits are those of `transformers` with the weights that an independent reading finds."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (dense_folder / "config.json").write_text(json.dumps(config))
    dense = {name: torch.from_numpy(weight) for name, weight in dequantize(folder).items()}
    save_file(dense, dense_folder / "model.safetensors", metadata={"format": "pt"})
    token_ids = random_ids(30)
    logits = all_logits(make_runner(folder), token_ids, 20, [7])
    torch.testing.assert_close(logits, oracle_logits(dense_folder, token_ids)[19:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("family", DENSE)
def test_quantized_while_loading_by_kernels_and_references(family: str, method: str, folder_of: FolderOf) -> None:
    check_references(folder_of(family, "float32"), method)


def check_references(folder: Path, method: str) -> None:
    """The kernels give the logits of the reference implementations."""
    rows = []
    for device in (KERNELS, dataclasses.replace(REFERENCES, matrices="torch")):
        runner = make_runner(folder, device=device, quantize=method)
        rows.append(all_logits(runner, random_ids(30), 20, [7]))
    assert distance(rows[0], rows[1]) < 3e-6


@pytest.mark.parametrize(("family", "layout"), CUT)
def test_shards_give_the_logits_of_the_whole(family: str, layout: str, folder_of: FolderOf) -> None:
    check_shards(folder_of(family, layout), layout)


def check_shards(folder: Path, layout: str) -> None:
    """The logits of the whole, from 2, 3 and 4 ranks."""
    quantize = LAYOUTS[layout].quantize
    for dtype in {torch.float32, LAYOUTS[layout].dtype}:
        whole = logits_of(folder, dtype, quantize, 1, VOCAB_SIZE)
        for size in SIZES:
            assert distance(logits_of(folder, dtype, quantize, size, VOCAB_SIZE), whole) < 3e-6, (dtype, size)


@pytest.mark.parametrize("is_whole_expert", [True, False])
def test_an_expert_may_be_dense_as_a_whole(is_whole_expert: bool, folder_of: FolderOf, tmp_path: Path) -> None:
    """Where its gate alone is, it can't be joined with its up as those of the others are (`docs/quantization.md`)."""
    dense, folder = load_file(folder_of("qwen3_moe", "float32") / "model.safetensors"), tmp_path / "mixed"
    shutil.copytree(folder_of("qwen3_moe", "gptq 4 bits"), folder)
    stored, expert = load_file(folder / "model.safetensors"), "model.layers.1.mlp.experts.2"
    for name in ("gate_proj", "up_proj") if is_whole_expert else ("gate_proj",):
        stored = {key: tensor for key, tensor in stored.items() if not key.startswith(f"{expert}.{name}.")}
        stored[f"{expert}.{name}.weight"] = dense[f"{expert}.{name}.weight"].to(torch.float16)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    if is_whole_expert:
        make_runner(folder)
        return
    with pytest.raises(StartError, match="some experts have matrices that can be joined and others have not"):
        make_runner(folder)


@pytest.mark.parametrize("family", SPARSE)
def test_experts_that_are_stored_together(family: str, folder_of: FolderOf, tmp_path: Path) -> None:
    """As `transformers` keeps them in memory, and saves them if it is told so: the same tensors, whole and cut."""
    folder = folder_of(family, "float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path, save_original_format=False)
    stored = load_file(tmp_path / "model.safetensors")
    fused = [name for name in stored if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]
    assert len(fused) == sum(name.endswith(".experts.0.up_proj.weight") for name in open_weights(folder).names) * 2 > 0
    single, together = open_weights(folder), open_weights(tmp_path)
    assert sorted(together.names) == sorted(single.names)
    for name in single.names:
        assert together.shape(name) == single.shape(name) and together.dtype(name) == single.dtype(name)
        for index in [(), (slice(3, 8),), (slice(None), slice(8, 24))][: 1 + len(single.shape(name))]:
            assert torch.equal(together.read(name, index), single.read(name, index))
    no_bytes = torch.empty(2**20, 0, 8)  # as many experts as a file likes to announce
    for other in (stored[fused[0]][0].clone(), no_bytes):
        save_file({**stored, fused[0]: other}, tmp_path / "model.safetensors")
        with pytest.raises(StartError, match=f"has a tensor {fused[0]} of shape .*: save the model once more"):
            open_weights(tmp_path)


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family in FAMILIES for method in ([None] if family in SPARSE else [None, "int8", "int4"])],
)
def test_programs_give_the_bits_of_calls(family: str, method: str | None, folder_of: FolderOf) -> None:
    check_programs(folder_of(family, "bfloat16"), method)


@pytest.mark.parametrize("family", SPARSE)
def test_programs_with_as_many_experts_as_a_token_has(family: str, tmp_path: Path) -> None:
    """Numbers for each expert and numbers for each chosen one are as many: their memory has one size."""
    FAMILIES[family].write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_experts"] = config["num_experts_per_tok"]
    weights = load_file(tmp_path / "model.safetensors")
    gates = {
        name: tensor[: config["num_experts"]] for name, tensor in weights.items() if name.endswith("mlp.gate.weight")
    }
    known = {name: tensor for name, tensor in weights.items() if expert_of(name) < config["num_experts"]}
    save_file({**known, **gates}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_programs(tmp_path, None)


def expert_of(name: str) -> int:
    """The number of the expert to which a tensor belongs; -1: to none."""
    match = re.search(r"\.experts\.(\d+)\.", name)
    return -1 if match is None else int(match[1])


def check_programs(folder: Path, method: str | None) -> None:
    """Steps as programs have the bits of steps call by call."""
    runs = []
    for is_off in (True, False):
        runner, programs = make_repeating_runner(folder, torch.bfloat16, method)
        programs.is_off = is_off
        runs.append(steps_of(runner))
        assert len(programs.programs) == (0 if is_off else 3) and not programs.refusals
    for plain, repeated in zip(*runs, strict=True):
        assert torch.equal(plain, repeated)


@pytest.mark.parametrize("device", [KERNELS, REFERENCES], ids=["kernels", "references"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_computes_only_tokens_that_have_logits(
    family: str, device: Device, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts end in a step and one goes on: the logits are those of a step that computes all tokens."""
    runner, counts = make_runner(folder_of(family, "float32"), device=device), [30, 9, 10]
    model = runner._model
    assert isinstance(model, DecoderForCausalLM)
    if runner._programs is not None:
        runner._programs.is_off = True  # a program would not see what is replaced here
    num_rows: list[int] = []
    for layer in model.layers:
        monkeypatch.setattr(layer, "mlp", counted(layer.mlp, num_rows))

    def logits() -> torch.Tensor:
        sizes = [(30, [0, 1]), (9, [2]), (25, [3, 4])]
        return run_step(runner, [make_sequence(random_ids(size, size), blocks) for size, blocks in sizes], counts)

    needed, rows = logits(), num_rows.copy()
    assert rows == [sum(counts)] * (model.num_layers - 1) + [2]
    forward = model.forward

    def forward_all(
        input_ids: torch.Tensor, rotation: Rotation, prepared: Any, selection: RowSelection
    ) -> torch.Tensor:
        return forward(input_ids, rotation, prepared)[selection.rows]

    monkeypatch.setattr(model, "forward", forward_all)
    expected = logits()
    torch.testing.assert_close(needed, expected, atol=1e-5, rtol=1e-5)
    assert device is REFERENCES or torch.equal(needed, expected), "a row's bits do not depend on its company"
    assert num_rows[len(rows) :] == [sum(counts)] * model.num_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_warm_up_has_many_rows_and_one_in_every_layer(
    family: str, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of a kind of its own has kernels that no other one compiles, wherever it is."""
    runner = make_runner(folder_of(family, "float32"))
    model = runner._model
    assert isinstance(model, DecoderForCausalLM)
    num_rows: dict[int, list[int]] = {index: [] for index in range(model.num_layers)}
    for index, layer in enumerate(model.layers):
        monkeypatch.setattr(layer, "mlp", counted(layer.mlp, num_rows[index]))
    limit, progress = StepLimit(None, None), StartProgress()
    assert warm_up(runner, sample, limit, WARM_UP_TOKENS, block_size=runner.block_size, progress=progress)
    assert [set(rows) for rows in num_rows.values()] == [{1, WARM_UP_TOKENS}] * model.num_layers


def counted(mlp: FeedForward, num_rows: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The block, which notes how many rows it computes."""

    def compute(x: torch.Tensor) -> torch.Tensor:
        num_rows.append(len(x))
        return mlp(x)

    return compute


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_that_config_json_lacks_mean_what_they_mean_to_transformers(family: str, tmp_path: Path) -> None:
    defaults = importlib.import_module(MODELS[family].split(":")[0]).DEFAULTS
    theirs = AutoConfig.for_model(family)
    assert {key: getattr(theirs, key) for key in defaults} == defaults
    hidden = {key: defaults[key] for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")}
    hidden |= {key: defaults[key] for key in ("num_experts_per_tok",) if key in defaults}
    heads = {"num_attention_heads": 2 * hidden["num_key_value_heads"], "head_dim": 16}
    FAMILIES[family].write(tmp_path, **heads, **hidden)
    config = json.loads((tmp_path / "config.json").read_text())
    check_config(tmp_path, {key: value for key, value in config.items() if key not in hidden})


@pytest.mark.parametrize("family", DENSE)
def test_no_number_of_key_value_heads_is_that_of_all_heads(family: str, tmp_path: Path) -> None:
    """`transformers` has a number for a missing key, and none for null where there are experts."""
    FAMILIES[family].write(tmp_path, num_key_value_heads=4)
    config = json.loads((tmp_path / "config.json").read_text())
    check_config(tmp_path, {**config, "num_key_value_heads": None})


def check_config(folder: Path, config: dict[str, object]) -> None:
    """Logits are those of `transformers` with such a config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    token_ids = random_ids(30)
    logits = all_logits(make_runner(folder), token_ids, 20, [7])
    torch.testing.assert_close(logits, oracle_logits(folder, token_ids)[19:], atol=2e-5, rtol=1e-4)
