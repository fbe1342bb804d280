"""What config.json says about experts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from engine.link.errors import StartError
from engine.models.experts import read_expert_config

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 6,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, {0, 1, 2, 3, 4, 5}),
        ({"mlp_only_layers": [0, 5]}, {1, 2, 3, 4}),
        ({"decoder_sparse_step": 2}, {1, 3, 5}),
        ({"decoder_sparse_step": 4, "mlp_only_layers": None}, {3}),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2, 3]}, {5}),
        ({"decoder_sparse_step": 7}, set()),
    ],
)
def test_layers_with_experts(changes: dict[str, Any], layers: set[int]) -> None:
    assert read_expert_config({**CONFIG, **changes}, has_shared_expert=False).sparse_layers == layers


def test_the_number_of_experts_has_two_names() -> None:
    config = {**CONFIG, "num_experts": None, "num_local_experts": 4}
    assert read_expert_config(config, has_shared_expert=False).num_experts == 4


@pytest.mark.parametrize("is_normalized", [True, False, None])
def test_weights_add_up_only_where_config_says_so(is_normalized: bool | None) -> None:
    config = {**CONFIG, "norm_topk_prob": is_normalized}
    assert read_expert_config(config, has_shared_expert=True).is_normalized is bool(is_normalized)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts", None),
        ("num_experts", 0),
        ("num_experts", "8"),
        ("num_experts_per_tok", 9),
        ("num_experts_per_tok", 0),
        ("moe_intermediate_size", True),
        ("shared_expert_intermediate_size", None),
        ("decoder_sparse_step", 0),
        ("decoder_sparse_step", None),
        ("mlp_only_layers", [6]),
        ("mlp_only_layers", "0"),
    ],
)
def test_what_is_no_size_is_refused_by_its_name(key: str, value: Any) -> None:
    with pytest.raises(StartError, match=f"^{key} {re.escape(repr(value))} in config.json"):
        read_expert_config({**CONFIG, key: value}, has_shared_expert=True)


def test_more_experts_than_any_model_has_are_refused_before_memory_is_taken_for_them() -> None:
    config = {**CONFIG, "num_experts": 2**14, "num_experts_per_tok": 8}
    assert read_expert_config({**config, "num_hidden_layers": 4}, has_shared_expert=False).num_experts == 2**14
    with pytest.raises(StartError, match="^num_experts 16384 in config.json, in each of 6 layers, is more than any"):
        read_expert_config(config, has_shared_expert=False)


def test_more_experts_than_the_checkpoint_has_tensors_for_are_refused_before_any_is_made() -> None:
    assert read_expert_config(CONFIG, has_shared_expert=False, num_tensors=48).num_experts == 8
    with pytest.raises(
        StartError, match="^num_experts 8 in config.json, in each of 6 layers, is more than the checkpoint's 47"
    ):
        read_expert_config(CONFIG, has_shared_expert=False, num_tensors=47)
