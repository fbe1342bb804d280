"""GGUF files of models with experts: one tensor holds a matrix of all experts of a layer.

The truth is an independent dequantisation by the package `gguf`, run by `transformers`, and llama.cpp itself
(`tests/oracles/llama_cpp_ids.py`). The reference implementations run here, for which nothing is compiled.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.attention.cpu import BLOCK_SIZE
from engine.build import build_model
from engine.checkpoint.files import read_model_config
from engine.checkpoint.gguf_folder import gguf_folder
from engine.checkpoint.gguf_weights import OpenFiles
from engine.checkpoint.weights import open_weights
from engine.device import Device
from engine.link.errors import StartError
from engine.runner import ModelRunner
from parallel.state import ParallelState
from tests.contract.harness import KERNELS, REFERENCES, all_logits, make_runner, oracle_logits, random_ids
from tests.contract.test_quantized_checkpoints import FOLDERS, greedy_ids
from tests.contract.test_sharded import distance, run_batches
from tests.oracles.dequantize import gguf_weights
from tests.oracles.llama_cpp_ids import SOURCES, write_source
from tests.tiny_gguf import write_gguf
from tests.tiny_model import VOCAB_SIZE
from tests.unit.parallel.threads import run_ranks
from tests.unit.test_seams import generate, reference_device

LLAMA_CPP: dict[str, Any] = json.loads((Path(__file__).parent / "llama_cpp_ids.json").read_text())
TORCH = dataclasses.replace(REFERENCES, matrices="torch")
SPARSE = [folder for folder in FOLDERS if "moe" in folder.name]
MIXTURE = {
    "model.layers.1.mlp.experts.gate_proj.weight": "Q4_0",
    "model.layers.1.mlp.experts.up_proj.weight": "Q5_1",
    "model.layers.1.mlp.experts.down_proj.weight": "Q8_0",
    "model.layers.1.mlp.shared_expert.up_proj.weight": "Q4_1",
}
"""Gates and ups that can't be joined, and matrices in floats beside them."""
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    **{kind: (kind, {}) for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0")},
    "mixture": ("F16", MIXTURE),
}


def write_file(architecture: str, folder: Path, kind: str = "Q8_0", **changes: Any) -> Path:
    """A tiny model's file, whose layers have experts or, in Qwen2's, have none in the first."""
    folder.mkdir(exist_ok=True)
    if not (folder / "source").exists():
        SOURCES[architecture](folder / "source", is_tied=False)
    write_gguf(folder / "source", folder / "model.gguf", kind, architecture, **changes)
    return folder / "model.gguf"


def served(architecture: str, folder: Path, kind: str = "Q8_0", **changes: Any) -> Path:
    return gguf_folder([write_file(architecture, folder, kind, **changes)], folder / "cache")


def refusal(architecture: str, folder: Path, **changes: Any) -> str:
    with pytest.raises(StartError) as caught:
        make_runner(served(architecture, folder, **changes), device=TORCH)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", SOURCES)
def test_logits_are_those_of_the_dequantized_weights(architecture: str, kind: str, tmp_path: Path) -> None:
    widest, kinds = KINDS[kind]
    check_dequantized(served(architecture, tmp_path, widest, kinds=kinds), tmp_path, TORCH)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", SOURCES)
def test_kernels_have_the_logits_of_the_dequantized_weights(architecture: str, kind: str, tmp_path: Path) -> None:
    widest, kinds = KINDS[kind]
    check_dequantized(served(architecture, tmp_path, widest, kinds=kinds), tmp_path, KERNELS)


def check_dequantized(folder: Path, root: Path, device: Device) -> None:
    dense, config = root / "dense", json.loads((folder / "config.json").read_text())
    dense.mkdir()
    config.pop("quantization_config", None)
    (dense / "config.json").write_text(json.dumps(config))
    weights = {name: torch.from_numpy(weight) for name, weight in gguf_weights(root / "model.gguf").items()}
    assert weights.keys() == load_file(root / "source" / "model.safetensors").keys()
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    token_ids = random_ids(30)
    logits = all_logits(make_runner(folder, device=device), token_ids, 20, [7])
    torch.testing.assert_close(logits, oracle_logits(dense, token_ids)[19:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("folder", SPARSE, ids=lambda folder: folder.name)
def test_files_of_the_real_quantizer_have_the_ids_of_transformers(folder: Path) -> None:
    expected = np.load(folder / "expected.npz")
    found = greedy_ids(folder, TORCH, [expected[f"prompt_{number}"].tolist() for number in range(2)])
    assert found == [expected[f"ids_{number}"].tolist() for number in range(2)]


@pytest.mark.parametrize("architecture", SOURCES)
def test_llama_cpp_itself_goes_on_in_the_same_way(architecture: str, tmp_path: Path) -> None:
    """It has the weights of Qwen3's experts add up to one, and Qwen2's not, whatever the file says."""
    write_source(architecture, tmp_path / "source")
    answer, folder = LLAMA_CPP["answers"][architecture], served(architecture, tmp_path, "F32")
    assert answer["smallest_gap"] > 1e-3, "a near-tie decides nothing"
    runner = make_runner(folder, device=TORCH)
    token_ids = LLAMA_CPP["prompt_ids"] + answer["ids"][:-1]
    logits = all_logits(runner, token_ids, len(LLAMA_CPP["prompt_ids"]), [])
    assert logits.argmax(dim=1).tolist() == answer["ids"]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", SOURCES)
def test_shards_give_the_logits_of_the_whole(architecture: str, kind: str, tmp_path: Path) -> None:
    folder = served(architecture, tmp_path, kind)
    whole = logits_of(folder, 1)
    for size in (2, 3):
        assert distance(logits_of(folder, size), whole) < 3e-6


def logits_of(folder: Path, size: int) -> torch.Tensor:
    """Logits in float32 by rank 0 of `size` ranks, by the reference implementations."""

    def run(parallel: ParallelState) -> torch.Tensor:
        model = build_model(read_model_config(folder), folder, torch.float32, TORCH, parallel=parallel)
        runner = ModelRunner(model, TORCH)
        runner.allocate(64, torch.float32, num_positions=64 * BLOCK_SIZE)
        return run_batches(runner, VOCAB_SIZE)

    return run_ranks(size, run)[0]


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_a_matrix_of_an_expert_is_read_without_the_others(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = served("qwen3moe", tmp_path, kind)
    expected, weights = gguf_weights(tmp_path / "model.gguf"), open_weights(folder)
    num_bytes: list[int] = []
    read = OpenFiles.read

    def count(*arguments: Any) -> np.ndarray[Any, Any]:
        num_bytes.append((array := read(*arguments)).nbytes)
        return array

    monkeypatch.setattr(OpenFiles, "read", count)
    for name in [name for name in weights.names if "experts.5." in name]:
        part = weights.read(name)
        assert part.shape == weights.shape(name)
        for index in [(slice(8, 40),), (slice(None), slice(32, 64)), (slice(3, 9), slice(None))]:
            places = index if "scales" not in name and "offsets" not in name else index[:1]
            assert torch.equal(weights.read(name, places), part[places])
        if kind == "F16":
            np.testing.assert_array_equal(part.float().numpy(), expected[name])
    assert max(num_bytes) <= 64 * 64 * 2


def test_sizes_are_those_of_the_tensors_where_a_file_does_not_state_them(tmp_path: Path) -> None:
    first = (served("qwen2moe", tmp_path) / "config.json").read_text()
    sizes = {f"qwen2moe__expert_{name}feed_forward_length": None for name in ("", "shared_")}
    assert (served("qwen2moe", tmp_path, **sizes) / "config.json").read_text() == first


def test_routers_in_float32_do_not_make_a_model_one_of_float32(tmp_path: Path) -> None:
    config = json.loads((served("qwen3moe", tmp_path, "BF16") / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


UP = "model.layers.1.mlp.experts.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"qwen3moe__expert_count": 7},
            r"has model\.layers.* as \[8, 64, 64\], and 7 experts by its metadata: fetch it",
        ),
        ({"qwen3moe__expert_count": "8"}, r"as \[8, 64, 64\], and '8' experts by its metadata: fetch it again"),
        ({"qwen3moe__expert_count": None}, "the GGUF file does not say expert_count: fetch it again, or another one"),
        ({"qwen3moe__expert_used_count": None}, "the GGUF file does not say expert_used_count: fetch it again"),
        (
            {"qwen3moe__expert_used_count": 9},
            "says 9 for expert_used_count, which is not a whole number of 1 to 8: fetch it again, or another one",
        ),
        (
            {"kinds": {UP: "MXFP4"}},
            rf"has {UP} in the type MXFP4; only F32, .* can be run: choose a file in one of them",
        ),
        (
            {"without": "layers.0.mlp.experts.up_proj"},
            r"lacks the tensor model\.layers\.0\.mlp\.experts\.0\.up_proj\.weight: the checkpoint",
        ),
        ({"without": "experts."}, "has an expert_count and no experts: fetch it again, or another one"),
        (
            {"without": "mlp.gate."},
            r"lacks the tensor model\.layers\.0\.mlp\.gate\.weight: the checkpoint is not complete",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused_in_a_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    write_file("qwen3moe", tmp_path)
    without = changes.pop("without", None)
    if without is not None:
        names = {re.sub(r"experts\.\d+", "experts", name) for name in gguf_weights(tmp_path / "model.gguf")}
        changes["chosen"] = [name for name in names if without not in name]
    assert re.search(sentence, refusal("qwen3moe", tmp_path, **changes))


def test_a_matrix_in_place_of_all_experts_is_refused(tmp_path: Path) -> None:
    write_file("qwen3moe", tmp_path)
    path = tmp_path / "source" / "model.safetensors"
    weights = load_file(path)
    stacked = {name: tensor for name, tensor in weights.items() if ".experts.3." not in name}
    save_file(stacked, path, metadata={"format": "pt"})
    assert "and 8 experts by its metadata: fetch it again, or another one" in refusal("qwen3moe", tmp_path)


@pytest.mark.parametrize("num_experts", [0, 2**31 - 1])
def test_experts_that_take_no_bytes_are_refused_before_any_is_made(num_experts: int, tmp_path: Path) -> None:
    """A file of a kilobyte could announce as many as it likes."""
    path = write_file("qwen3moe", tmp_path, qwen3moe__expert_count=num_experts)
    change_sizes(path, "_exps.", [64, 0, num_experts])
    with pytest.raises(StartError, match=r"has blk\.0\..*_exps\.weight as \[.*\], without a number: fetch it again"):
        gguf_folder([path], tmp_path / "cache")


def change_sizes(path: Path, part: str, sizes: list[int]) -> None:
    """Have a file say other sizes, innermost first, of the tensors with `part` in their names."""
    fields = [tensor.field for tensor in gguf.GGUFReader(path).tensors if part in tensor.name]
    content = bytearray(path.read_bytes())
    for field in fields:
        start = field.offset + sum(each.nbytes for each in field.parts[:3])  # behind the name and how many there are
        content[start : start + 8 * len(sizes)] = np.array(sizes, "<u8").tobytes()
    path.write_bytes(content)


def test_a_gate_of_several_rows_is_refused(tmp_path: Path) -> None:
    """Its first row would be read in place of the whole."""
    write_file("qwen2moe", tmp_path)
    path = tmp_path / "source" / "model.safetensors"
    gates = {name: gate.repeat(5, 1) for name, gate in load_file(path).items() if "shared_expert_gate" in name}
    save_file({**load_file(path), **gates}, path, metadata={"format": "pt"})
    sentence = r"shared_expert_gate\.weight has shape \[5, 64\], the model needs \[1, 64\]: config.json and the weights"
    assert re.search(sentence, refusal("qwen2moe", tmp_path))


def test_a_tensor_that_two_parts_have_is_refused(tmp_path: Path) -> None:
    path = write_file("qwen3moe", tmp_path)
    second = path.with_name("second.gguf")
    second.write_bytes(path.read_bytes())
    with pytest.raises(StartError, match=r"the GGUF file has .*\.weight twice: fetch it again"):
        gguf_folder([path, second], tmp_path / "cache")


def test_an_engine_starts_from_such_a_file(tmp_path: Path) -> None:
    folder = served("qwen2moe", tmp_path, "F32")
    assert generate(folder, reference_device()) == generate(tmp_path / "source", reference_device())
