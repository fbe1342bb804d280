"""The files of an adapter (LoRA): which change they make to which matrix, and what is no such change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import engine.checkpoint.adapter
from engine.checkpoint.adapter import AdapterWeights
from engine.link.errors import StartError

PREFIX = "base_model.model."
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
TABLE = "model.embed_tokens"


def parts(module: str, rank: int = 4, *, prefix: str = PREFIX, end: str = ".weight") -> dict[str, tuple[int, int]]:
    """The names and shapes of a change of a matrix [16, 8]."""
    return {f"{prefix}{module}.lora_A{end}": (rank, 8), f"{prefix}{module}.lora_B{end}": (16, rank)}


def write(folder: Path, tensors: Mapping[str, tuple[int, ...]], **changes: Any) -> Path:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    save_file(arrays, folder / "adapter_model.safetensors")
    return folder


def refusal(folder: Path, tensors: Mapping[str, tuple[int, ...]], **changes: Any) -> str:
    with pytest.raises(StartError) as caught:
        AdapterWeights(write(folder, tensors, **changes))
    return str(caught.value)


def scalings(folder: Path, tensors: dict[str, tuple[int, int]], **changes: Any) -> dict[str, float]:
    weights = AdapterWeights(write(folder, tensors, **changes))
    return {module: weights.read(module)[2] for module in weights.modules}


@pytest.mark.parametrize("prefix", [PREFIX, ""])
@pytest.mark.parametrize("end", [".weight", ".default.weight", ""])
def test_a_module_has_one_name_however_it_is_spelt(tmp_path: Path, prefix: str, end: str) -> None:
    assert scalings(tmp_path, parts(Q, prefix=prefix, end=end)) == {Q: 4.0}


@pytest.mark.parametrize(
    "other",
    [
        parts(Q, prefix=""),
        parts(Q, end=".default.weight"),
        {f"{PREFIX}{Q}.lora_embedding_A": (4, 16), f"{PREFIX}{Q}.lora_embedding_B": (8, 4)},
    ],
)
def test_two_changes_of_one_matrix_are_not_half_read(tmp_path: Path, other: dict[str, tuple[int, int]]) -> None:
    text = refusal(tmp_path, {**parts(Q), **other})
    assert text.startswith(str(tmp_path)) and f"two changes of {Q}: save the adapter once more with `peft`" in text


@pytest.mark.parametrize(
    ("rank", "changes", "factor"),
    [
        (4, {}, 4.0),
        (4, {"r": None}, 4.0),
        (4, {"lora_alpha": 0}, 0.0),
        (2, {"rank_pattern": {"q_proj": 2}}, 8.0),
        (2, {"rank_pattern": {"k_proj": 9, "self_attn.[qk]_proj": 2, "q_proj": 3}}, 8.0),
        (16, {"r": 16, "use_rslora": True}, 4.0),
        (4, {"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 2}}, 0.5),
        (4, {"alpha_pattern": {"proj": 2}}, 4.0),
    ],
)
def test_the_factor_is_that_of_the_module(tmp_path: Path, rank: int, changes: dict[str, Any], factor: float) -> None:
    assert scalings(tmp_path, parts(Q, rank), **changes) == {Q: factor}


@pytest.mark.parametrize(
    ("rank", "changes", "stated"),
    [(2, {}, "4"), (4, {"r": "4"}, "'4'"), (4, {"rank_pattern": {"q_proj": 8}}, "8"), (2, {"r": True}, "True")],
)
def test_a_rank_that_is_not_that_of_the_matrices(
    tmp_path: Path, rank: int, changes: dict[str, Any], stated: str
) -> None:
    text = refusal(tmp_path, parts(Q, rank), **changes)
    assert f"changes {Q} by matrices of rank {rank}, and adapter_config.json says {stated}: they do not" in text


def test_patterns_of_hundreds_of_modules_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`re` keeps 512 of them; beyond that, each look at a pattern would compile it again, while requests wait."""
    compiled: list[str] = []
    compile_pattern = engine.checkpoint.adapter.re.compile
    monkeypatch.setattr(
        engine.checkpoint.adapter.re, "compile", lambda text: compiled.append(text) or compile_pattern(text)
    )
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(30)]
    tensors = {name: shape for module in names for name, shape in parts(module).items()}
    alphas = {name: index for index, name in enumerate(names)}
    assert scalings(tmp_path, tensors, alpha_pattern=alphas) == {name: index / 4 for name, index in alphas.items()}
    assert len(compiled) == len(names)


def test_a_pattern_that_would_never_be_done_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.matching_time.MAX_MATCHING_S", 0.1)
    text = refusal(tmp_path, parts(Q), alpha_pattern={"(.+)+$x": 2})
    assert text.startswith(f"{tmp_path}/adapter_config.json cannot be used (to compare its patterns with the names of")


@pytest.mark.parametrize(
    ("tensors", "changes", "sentence"),
    [
        ({}, {}, "adapter_model.safetensors has no tensors: save the adapter once more with `peft`"),
        (parts(Q, 0), {"r": 0}, "adapter_config.json cannot be used (float division by zero): fetch the adapter again"),
        (parts(Q), {"lora_alpha": float("nan")}, "would be multiplied by nan): fetch the adapter again"),
        (parts(Q), {"lora_alpha": 10**400}, "adapter_config.json cannot be used ("),
        (parts(Q), {"rank_pattern": [1]}, "adapter_config.json cannot be used ("),
        (parts(Q), {"rank_pattern": {"(": 1}}, "adapter_config.json cannot be used ("),
        (parts(Q), {"peft_type": "x" * 10_000}, f"is an adapter of {'x' * 40}, and only plain LoRA"),
        (parts(Q), {"task_type": ["x" * 10_000]}, "is an adapter of a model for another task (['xxx"),
        (parts(Q), {"notes": "x" * (5 << 20)}, "adapter_config.json is larger than 4 MiB"),
    ],
)
def test_what_is_no_adapter_of_ours_is_told_in_a_sentence(
    tmp_path: Path, tensors: dict[str, tuple[int, int]], changes: dict[str, Any], sentence: str
) -> None:
    text = refusal(tmp_path, tensors, **changes)
    assert sentence in text and len(text) < 1000


EXPERTS = "model.layers.0.mlp.experts"
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def stacks(end: str = "", *, rank: int = 6, inputs: int = 8, outputs: int = 10) -> dict[str, tuple[int, int]]:
    """The names and shapes of a change of all experts; `rank` of all of them together."""
    return {
        f"{PREFIX}{EXPERTS}{end}.lora_A.weight": (rank, inputs),
        f"{PREFIX}{EXPERTS}{end}.lora_B.weight": (outputs, rank),
    }


@pytest.mark.parametrize(("layout", "is_grouped"), [(None, False), ("rank_major", False), ("grouped_by_expert", True)])
def test_changes_of_experts_are_those_of_single_matrices(tmp_path: Path, layout: str | None, is_grouped: bool) -> None:
    """The innermost wrapper is of the first parameter, and patterns are compared with the parameter's name."""
    write(
        tmp_path,
        {},
        r=2,
        target_parameters=[DOWN, GATE_UP],
        rank_pattern={"experts.down_proj": 3},
        alpha_pattern={".*gate_up_proj": 1},
        **({"lora_B_layout": layout} if layout else {}),
    )
    shapes = {**stacks(".base_layer"), **stacks(rank=9, inputs=5, outputs=8)}
    arrays = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    weights = AdapterWeights(tmp_path)
    assert weights.max_rank == 3
    matrices = "gate_proj up_proj down_proj".split()
    assert sorted(weights.modules) == sorted(f"{EXPERTS}.{expert}.{name}" for expert in range(3) for name in matrices)
    for expert in range(3):
        for name, end, rank, rows, scaling in (
            ("gate_proj", ".base_layer", 2, slice(0, 5), 0.5),
            ("up_proj", ".base_layer", 2, slice(5, 10), 0.5),
            ("down_proj", "", 3, slice(None), 16 / 3),
        ):
            a, b = (arrays[f"{PREFIX}{EXPERTS}{end}.lora_{half}.weight"] for half in "AB")
            own = slice(expert * rank, (expert + 1) * rank)
            stored = a[own], b[rows, own if is_grouped else slice(expert, None, 3)]
            *read, factor = weights.read(f"{EXPERTS}.{expert}.{name}")
            assert all(np.array_equal(*pair) for pair in zip(read, stored, strict=True))
            assert factor == scaling


ONE = {"target_parameters": [GATE_UP], "r": 2}


@pytest.mark.parametrize(
    ("tensors", "changes", "sentence"),
    [
        (stacks(), {"r": 2}, "and target_parameters in adapter_config.json names no such parameter"),
        (stacks(), {**ONE, "target_parameters": ["layers.1.mlp.experts.down_proj"]}, "names no such parameter"),
        (stacks(".base_layer"), ONE, "names no such parameter"),
        (stacks(), {**ONE, "target_parameters": "x"}, "cannot be used (target_parameters is no list of names)"),
        (stacks(), {**ONE, "target_parameters": [1]}, "cannot be used (target_parameters is no list of names)"),
        (stacks(), {**ONE, "r": 4}, f"[6, 8], and adapter_config.json says rank 4 for {EXPERTS}.gate_up_proj: they do"),
        (stacks(), {**ONE, "r": None}, "says rank None for"),
        (stacks(), {**ONE, "r": True}, "says rank True for"),
        (stacks(), {**ONE, "r": 0}, "says rank 0 for"),
        (stacks(outputs=9), ONE, "lora_B.weight [9, 6], and adapter_config.json says rank 2"),
        (stacks(inputs=0), ONE, "lora_A.weight [6, 0], and adapter_config.json says rank 2"),
        (stacks(rank=2**19, inputs=1), {**ONE, "r": 1}, "changes more experts than any model has: fetch"),
        ({**stacks(), **parts(f"{EXPERTS}.0.up_proj", 2)}, ONE, f"two changes of {EXPERTS}.0.up_proj"),
        (stacks(), {**ONE, "lora_B_layout": "x"}, "lora_B_layout 'x': rank_major, grouped_by_expert are known"),
        (stacks(), {**ONE, "lora_B_layout": []}, "lora_B_layout []: rank_major"),
        (
            stacks(),
            {**ONE, "peft_version": "0.18.1"},
            "was saved by `peft` 0.18.1, which took inputs for outputs: with",
        ),
        (stacks(), {**ONE, "peft_version": "0.19.0"}, "was saved by `peft` 0.19.0, which took"),
    ],
)
def test_changes_of_experts_that_can_not_be_read(
    tmp_path: Path, tensors: dict[str, tuple[int, int]], changes: dict[str, Any], sentence: str
) -> None:
    text = refusal(tmp_path, tensors, **changes)
    assert sentence in text and len(text) < 1000


@pytest.mark.parametrize("version", ["0.19.1", "0.20.0.dev0", "1.0", "new", None, 3])
def test_experts_of_other_versions_are_read(tmp_path: Path, version: object) -> None:
    assert len(scalings(tmp_path, stacks(), **ONE, peft_version=version)) == 6


BIAS, SAVED = f"{PREFIX}{Q}.lora_B.bias", f"{PREFIX}model.norm.weight"


@pytest.mark.parametrize(
    ("tensors", "changes", "sentence"),
    [
        ({BIAS: (16,)}, {"lora_bias": True}, f"has only one half of the change of {Q}: fetch"),
        ({**parts(Q), **parts(V), BIAS: (16,)}, {"lora_bias": True}, f"has only one half of the change of {V}: fetch"),
        ({**parts(Q), SAVED: (16,)}, {}, f"has a tensor {SAVED}, which is no part of a LoRA"),
        (
            {**parts(Q), f"{PREFIX}{Q}.weight": (16, 8)},
            {"modules_to_save": ["q_proj"]},
            f"two changes of {Q}: save the adapter once more with `peft`",
        ),
        (
            {SAVED: (16,), f"{PREFIX}model.norm.base_layer.weight": (16,)},
            {"modules_to_save": ["norm"]},
            "two changes of model.norm: save the adapter once more",
        ),
        (
            {**parts(Q), BIAS: (16,), f"{PREFIX}{Q}.base_layer.bias": (16,)},
            {"lora_bias": True, "bias": "all"},
            f"two changes of {Q}: save",
        ),
        ({**parts(Q), BIAS: (16,)}, {"lora_bias": True}, f"changes {Q}.bias, and beside the model only the matrices"),
        ({**parts(Q), SAVED: (16,)}, {"modules_to_save": ["norm"]}, "changes model.norm.weight, and beside the model"),
        (parts(Q), {"modules_to_save": ["norm"]}, "changes norm, and beside the model only the matrices of its layers"),
    ],
)
def test_biases_and_whole_tensors(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], changes: dict[str, Any], sentence: str
) -> None:
    text = refusal(tmp_path, tensors, **changes)
    assert sentence in text and len(text) < 1000


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"r": ', "\ud800", "null", '"LORA"'])
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    write(tmp_path, parts(Q))
    (tmp_path / "adapter_config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(StartError, match=r"adapter_config\.json (cannot be read|is not a JSON object)"):
        AdapterWeights(tmp_path)


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("org/base", "it says that it was made for 'org/base', serve that or give an adapter of this model"),
        ("a\nb" * 200, "'a\\nba"),
        (None, "it was made for another one"),
        ([1], "it was made for another one"),
    ],
)
def test_an_adapter_says_which_model_it_was_made_for(tmp_path: Path, name: Any, fix: str) -> None:
    text = AdapterWeights(write(tmp_path, parts(Q), base_model_name_or_path=name)).fix
    assert fix in text and len(text) < 500 and "\n" not in text


@pytest.mark.parametrize("size", [0, 7, 100, -8])
def test_weights_that_are_cut_off(tmp_path: Path, size: int) -> None:
    path = write(tmp_path, parts(Q)) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StartError, match="is not a whole safetensors file .*: fetch the adapter again"):
        AdapterWeights(tmp_path)
