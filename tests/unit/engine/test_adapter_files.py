"""The files of an adapter (LoRA): which change they make to which matrix, and what is no such change."""

from __future__ import annotations

import json
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


def write(folder: Path, tensors: dict[str, tuple[int, int]], **changes: Any) -> Path:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    arrays = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    save_file(arrays, folder / "adapter_model.safetensors")
    return folder


def refusal(folder: Path, tensors: dict[str, tuple[int, int]], **changes: Any) -> str:
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


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, '{"r": ', "\ud800", "null", '"LORA"'])
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    write(tmp_path, parts(Q))
    (tmp_path / "adapter_config.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(StartError, match=r"adapter_config\.json (cannot be read|is not a JSON object)"):
        AdapterWeights(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100, -8])
def test_weights_that_are_cut_off(tmp_path: Path, size: int) -> None:
    path = write(tmp_path, parts(Q)) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(StartError, match="is not a whole safetensors file"):
        AdapterWeights(tmp_path)
