"""Rope scaling: what config.json and the flags say, what is refused, and the tables against transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from engine.layers.rope import Rotary, make_rotary, read_rope, replace_rope_scaling
from engine.link.errors import StartError

WINDOW = 128
BASE = {"max_position_embeddings": WINDOW, "rope_theta": 1e6}
YARN = {"type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SUPPORTED = "supported: default, dynamic, linear, llama3, yarn"


def scaled(**scaling: Any) -> dict[str, Any]:
    return {**BASE, "rope_scaling": scaling}


def make(config: dict[str, Any], num_positions: int = 1000, head_dim: int = 64) -> Rotary:
    rotary = make_rotary(config, head_dim, torch.device("cpu"))
    rotary.allocate(num_positions)
    return rotary


def their_config(config: dict[str, Any]) -> Qwen2Config:
    sizes: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    return Qwen2Config(**sizes, **copy.deepcopy(config))  # it writes into what it is given


@pytest.mark.parametrize(
    "config",
    [
        {"max_position_embeddings": WINDOW},
        BASE,
        {**BASE, "rope_theta": 10_000},
        {**BASE, "rope_scaling": None},
        {"max_position_embeddings": WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {**BASE, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {**BASE, "rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 1e6}},
        scaled(type="linear", factor=2.5),
        scaled(type="linear", factor=2.5, rope_type="default"),
        scaled(type="linear", factor=4.0, rope_theta=3e4),
        scaled(**LLAMA3),
        scaled(**LLAMA3, original_max_position_embeddings=32),
        scaled(**{**LLAMA3, "low_freq_factor": 2, "high_freq_factor": 30}, original_max_position_embeddings=64),
        {**scaled(**LLAMA3), "original_max_position_embeddings": 16},
        scaled(**YARN),
        scaled(**YARN, original_max_position_embeddings=32),
        scaled(**YARN, original_max_position_embeddings=32, attention_factor=0.8),
        scaled(**YARN, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.3),
        scaled(**YARN, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=0),
        scaled(**YARN, original_max_position_embeddings=32, beta_fast=6, beta_slow=0.5),
        scaled(**YARN, original_max_position_embeddings=32, beta_fast=None, beta_slow=0),
        scaled(**YARN, original_max_position_embeddings=64, truncate=False),
        scaled(type="yarn", factor=1.0),
        {**scaled(**YARN, original_max_position_embeddings=32), "original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_the_table_is_transformers(config: dict[str, Any]) -> None:
    cos, sin = Qwen2RotaryEmbedding(their_config(config))(torch.zeros(1), torch.arange(1000).unsqueeze(0))
    table = make(config).table
    torch.testing.assert_close(table.cos, cos[0, :, :32], atol=1e-4, rtol=0)
    torch.testing.assert_close(table.sin, sin[0, :, :32], atol=1e-4, rtol=0)
    if read_rope(config).kind == "default":
        assert torch.equal(table.cos, cos[0, :, :32])


@pytest.mark.parametrize("num_prompt_tokens", [1, 100, WINDOW, WINDOW + 1, 300])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_dynamic_rotates_as_generate_does(num_prompt_tokens: int, chunk: int) -> None:
    config = scaled(type="dynamic", factor=4.0)
    theirs = Qwen2RotaryEmbedding(their_config(config))
    length = 320
    steps = [list(range(num_prompt_tokens)), *([position] for position in range(num_prompt_tokens, length))]
    expected = torch.cat([theirs(torch.zeros(1), torch.tensor([positions]))[0][0, :, :32] for positions in steps])
    rotary = make(config, length)
    rows = []
    for first in range(0, length, chunk):  # as after a preemption: chunks of prompt and output together
        positions = list(range(first, min(first + chunk, length)))
        other = list(range(5))  # a short neighbour in the same step
        rows_of_step = torch.tensor(other + positions)
        starts = [0, 5, 5 + len(positions)]
        rotation = rotary.prepare(rows_of_step, starts, [5, positions[-1] + 1], [40, num_prompt_tokens])
        cos = rotation.table.cos[rotation.rows]
        assert torch.equal(cos[:5], rotary.table.cos[:5])
        rows.append(cos[5:])
    torch.testing.assert_close(torch.cat(rows), expected, atol=1e-4, rtol=0)


def test_a_step_without_long_prompts_uses_the_table_as_it_is() -> None:
    for kind in ("linear", "dynamic"):
        rotary = make(scaled(type=kind, factor=2.0))
        rotation = rotary.prepare(torch.tensor([3, 4, 300]), [0, 2, 3], [5, 301], [WINDOW, 299])
        assert rotation.table is rotary.table
        assert rotation.rows.tolist() == [3, 4, 300]
        assert rotary.is_prompt_dependent is (kind == "dynamic")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BASE, WINDOW),
        (scaled(type="linear", factor=2.0), 2 * WINDOW),
        (scaled(type="dynamic", factor=2.5), 320),
        (scaled(type="dynamic", factor=2.0, original_max_position_embeddings=32), 2 * WINDOW),
        (scaled(**YARN, original_max_position_embeddings=32), WINDOW),
        (scaled(**YARN, original_max_position_embeddings=64), 2 * WINDOW),
        (scaled(**YARN), 4 * WINDOW),
        (scaled(**LLAMA3, original_max_position_embeddings=8), WINDOW),
    ],
)
def test_the_longest_window(config: dict[str, Any], expected: int) -> None:
    assert read_rope(config).max_window == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (scaled(type="longrope", factor=2.0), f"rope scaling 'longrope' is not supported; {SUPPORTED}"),
        (scaled(type="su", factor=2.0), f"rope scaling 'su' is not supported; {SUPPORTED}"),
        (scaled(rope_type="mrope", type="default"), f"rope scaling 'mrope' is not supported; {SUPPORTED}"),
        (
            {**BASE, "rope_parameters": {"rope_type": ["yarn"]}},
            f"""rope scaling "['yarn']" is not supported; {SUPPORTED}""",
        ),
        (
            {**BASE, "rope_scaling": "yarn"},
            "rope_scaling in config.json is 'yarn', not an object: correct it or remove it",
        ),
        (
            {**BASE, "rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}},
            "rope_parameters in config.json differ by layer (full_attention, sliding_attention): not supported",
        ),
        (
            scaled(**LLAMA3 | {"high_freq_factor": 1.0}),
            "rope scaling 'llama3' needs a high_freq_factor above its low_freq_factor 1.0",
        ),
        (
            scaled(type="llama3", factor=8.0),
            "rope scaling 'llama3' needs low_freq_factor as a number above 0, not None: put it in config.json",
        ),
        (
            scaled(**YARN, beta_fast="32"),
            "rope scaling 'yarn' needs beta_fast as a number above 0, not '32': put it in config.json",
        ),
        (
            scaled(**YARN, original_max_position_embeddings=-1),
            "rope scaling 'yarn' needs original_max_position_embeddings as a number above 0, not -1: "
            "put it in config.json",
        ),
        (
            {**BASE, "rope_theta": 0},
            "rope scaling 'default' needs rope_theta as a number above 0, not 0: put it in config.json",
        ),
        (
            {**BASE, "rope_theta": 10**400},
            f"rope scaling 'default' needs rope_theta as a number above 0, not {10**400}: put it in config.json",
        ),
        (
            scaled(type="linear", factor=1e308),
            "rope scaling 'linear' with a factor of 1e+308 stretches 128 positions too far: "
            "lower it in config.json, or by --rope-factor",
        ),
    ],
)
def test_what_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(StartError) as caught:
        read_rope(config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("config", "theta"),
    [
        (scaled(**YARN, rope_theta=1), "1"),
        (scaled(**YARN, beta_fast=1e308), "1e+06"),
        (scaled(**YARN, original_max_position_embeddings=0.5), "1e+06"),
        (scaled(**YARN, attention_factor=1e308), "1e+06"),
        (scaled(**YARN, mscale=1e308, mscale_all_dim=1.0), "1e+06"),
        (scaled(type="default", rope_theta=1e-308), "1e-308"),
    ],
    ids=str,
)
def test_numbers_that_make_no_table(config: dict[str, Any], theta: str) -> None:
    kind = config["rope_scaling"]["type"]
    with pytest.raises(StartError) as caught:
        make_rotary(config, 64, torch.device("cpu"))
    assert str(caught.value) == (
        f"rope scaling {kind!r} cannot be computed with these numbers: correct config.json's rope_theta ({theta}) and "
        "rope_scaling"
    )


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
@pytest.mark.parametrize("factor", [None, "4", 0.5, -1, True, float("nan"), float("inf"), [4]])
def test_a_bad_factor(kind: str, factor: Any) -> None:
    with pytest.raises(StartError) as caught:
        read_rope(scaled(type=kind, factor=factor))
    assert str(caught.value) == (
        f"rope scaling {kind!r} needs a factor of at least 1, not {factor!r}: "
        "correct it in config.json, or give --rope-scaling and --rope-factor"
    )


OWN = {"type": "yarn", "factor": 9.0, "beta_fast": 3.0, "original_max_position_embeddings": 64, "rope_theta": 77.0}


@pytest.mark.parametrize(
    ("config", "flags", "same_as"),
    [
        (scaled(**OWN), (None, None), scaled(**OWN)),
        (scaled(type="dynamic", factor=9.0), (None, 2.0), scaled(type="linear", factor=2.0)),
        (BASE, ("dynamic", None), scaled(type="dynamic", factor=1.0)),
        (BASE, ("yarn", 4.0), scaled(**YARN, original_max_position_embeddings=WINDOW)),
        (
            scaled(**OWN),
            ("yarn", 4.0),
            scaled(**YARN, original_max_position_embeddings=64, rope_theta=77.0),
        ),
        (scaled(**OWN), ("default", None), scaled(type="default", rope_theta=77.0)),
        (
            {"max_position_embeddings": WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
            ("linear", 2.0),
            {"max_position_embeddings": WINDOW, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2}},
        ),
        (scaled(**LLAMA3), ("llama3", 2.0), scaled(**LLAMA3 | {"factor": 2.0})),
        (scaled(**LLAMA3 | {"factor": None}), ("llama3", 2.0), scaled(**LLAMA3 | {"factor": 2.0})),
    ],
)
def test_flags_replace_the_configuration(
    config: dict[str, Any], flags: tuple[str | None, float | None], same_as: dict[str, Any]
) -> None:
    assert read_rope(replace_rope_scaling(config, *flags)) == read_rope(same_as)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("llama3", 8.0), "rope scaling 'llama3' needs low_freq_factor as .* not None: put it in config.json"),
        (("longrope", 2.0), "rope scaling 'longrope' is not supported; supported: default, dynamic"),
        (("default", 2.0), "--rope-factor has no effect with --rope-scaling default: leave one of them out"),
        (("yarn", 0.5), "needs a factor of at least 1, not 0.5: .* give --rope-scaling and --rope-factor"),
    ],
)
def test_flags_that_cannot_be_served(flags: tuple[str | None, float | None], message: str) -> None:
    with pytest.raises(StartError, match=message):
        read_rope(replace_rope_scaling(BASE, *flags))


@pytest.mark.parametrize("head_dim", [1, 33])
def test_heads_of_an_odd_size_are_refused(head_dim: int) -> None:
    with pytest.raises(StartError, match=f"^heads have {head_dim} features .* rotary positions take pairs: correct it"):
        make(BASE, head_dim=head_dim)
