"""`make kernels-aot` compiles what a model launches, and finds what a card can't run; faults are planted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.layers.triton import TritonOps
from quant.base import PackedWeight, RowGroups
from quant.kernels import compiled_row_counts
from quant.kernels.grouped_triton import GroupedTriton
from quant.kernels.launch import Launch, recorded_launches
from scripts.kernels_aot import (
    ADAPTER_RANKS,
    CARDS,
    FORMS,
    MAX_ADAPTER_LAUNCHES,
    MAX_LAUNCHES_PER_LAYER,
    MODELS,
    STEPS,
    Resources,
    compile_launch,
    complaints_of,
    launch_complaints,
    launches_per_layer,
    record_launches,
)
from tests.diagonal import diagonal

SMALL = "0.5B"
MATRIX_KERNELS = "skinny_kernel sum_kernel widen_kernel shrink_kernel expand_kernel".split()
TILE = "TILE_ROWS", "BLOCK_INPUTS", "BLOCK_OUTPUTS"


@pytest.fixture(autouse=True)
def compiled_anew(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def recorded(name: str, form: str = "dense", step: str = "decode 1") -> Launch:
    return next(launch for launch in record_launches(SMALL, form, torch.bfloat16, STEPS[step]) if launch.name == name)


def changed(launch: Launch, **constants: Any) -> Launch:
    return dataclasses.replace(launch, constants=tuple(sorted({**dict(launch.constants), **constants}.items())))


@pytest.mark.parametrize(("model_name", "form"), diagonal([*MODELS], FORMS))
def test_a_layer_has_as_many_launches_as_are_known(model_name: str, form: str) -> None:
    assert launch_complaints(launches_per_layer(model_name, form, torch.bfloat16)) == []


def test_an_eleventh_launch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    silu_and_mul = TritonOps.silu_and_mul

    def planted(ops: TritonOps, gate_up: torch.Tensor) -> torch.Tensor:
        ops.rms_norm(gate_up, gate_up[0].clone(), 1e-6)
        return silu_and_mul(ops, gate_up)

    assert launches_per_layer(SMALL, "dense", torch.bfloat16) == MAX_LAUNCHES_PER_LAYER == 10
    monkeypatch.setattr(TritonOps, "silu_and_mul", planted)
    (complaint,) = launch_complaints(launches_per_layer(SMALL, "dense", torch.bfloat16))
    assert complaint.startswith("11 launches")


def test_adapters_add_two_launches_for_each_common_input_and_compile() -> None:
    num_launches = launches_per_layer(SMALL, "dense", torch.bfloat16, ADAPTER_RANKS[0])
    assert num_launches == MAX_LAUNCHES_PER_LAYER + MAX_ADAPTER_LAUNCHES == 18
    assert launch_complaints(num_launches, has_adapters=True) == []
    assert launch_complaints(num_launches) == ["18 launches a layer, at most 10 are known"]
    launches = record_launches(SMALL, "dense", torch.bfloat16, STEPS["decode 1"], rank=ADAPTER_RANKS[-1])
    for name in ("shrink_kernel", "expand_kernel"):
        launch = next(launch for launch in launches if launch.name == name)
        assert complaints_of(compile_launch(launch, CARDS["sm_80"]), CARDS["sm_80"], is_decoding=True) == []


@pytest.mark.parametrize("form", FORMS)
def test_other_row_counts_than_those_of_warm_up_need_no_other_program(form: str) -> None:
    def programs(num_rows: int) -> set[Launch]:
        launches = record_launches(SMALL, form, torch.bfloat16, [(1, 300)] * num_rows, rank=16)
        return {launch for launch in launches if launch.name in MATRIX_KERNELS}

    counts = compiled_row_counts("triton")
    assert counts == [1, 17, 33, 65]
    compiled = set[Launch]().union(*map(programs, counts))
    for num_rows in (2, 9, 16, 18, 48, 64, 100, 128):
        assert programs(num_rows) <= compiled


@pytest.mark.parametrize("card_name", ["sm_80", "sm_120", "gfx942"])
def test_attention_of_a_decode_step_compiles(card_name: str) -> None:
    resources = compile_launch(recorded("attend_kernel"), CARDS[card_name])
    assert resources.registers > 0 and resources.shared_bytes > 0
    assert complaints_of(resources, CARDS[card_name], is_decoding=True) == []


@pytest.mark.parametrize(
    ("card_name", "kernel", "form", "step"),
    [
        pytest.param("float32-sm_75", "attend_kernel", "dense", "prompt", marks=pytest.mark.long),
        ("float32-sm_75", "skinny_kernel", "dense", "decode 64"),
        ("float32-sm_89", "skinny_kernel", "int8", "decode 64"),
    ],
)
def test_float32_fits_with_the_tiles_that_it_gets(card_name: str, kernel: str, form: str, step: str) -> None:
    """7B has the largest tiles of each kernel."""
    card = CARDS[card_name]
    launches = [launch for launch in record_launches("7B", form, card.dtype, STEPS[step]) if launch.name == kernel]
    largest = max(launches, key=lambda launch: [dict(launch.constants).get(name, 0) for name in TILE])
    resources = compile_launch(largest, card)
    assert resources.shared_bytes > 0
    assert complaints_of(resources, card, is_decoding=True) == []


def test_the_kernels_of_other_families_compile() -> None:
    """The norm of heads, and experts of 4 bits whose inputs are in an order of their own."""
    scales = torch.empty(64, 4, dtype=torch.float16)
    weight = torch.empty(64, 128, dtype=torch.uint8)
    packed = PackedWeight("int4", weight, None, scales, scales.to(torch.int32), torch.empty(256, dtype=torch.int64))
    with FakeTensorMode(allow_non_fake_inputs=True), recorded_launches() as launches:
        TritonOps().norm_heads(torch.empty(4, 48 * 128), torch.empty(40, 128), 1e-6)
        starts, rows = torch.empty(3, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
        GroupedTriton([packed] * 2)(torch.empty(8, 256, dtype=torch.bfloat16), RowGroups(starts, starts, rows, rows))
    assert [launch.name for launch in launches] == ["head_norm_kernel", "grouped_kernel"]
    for launch in launches:
        assert complaints_of(compile_launch(launch, CARDS["sm_90"]), CARDS["sm_90"], is_decoding=True) == []


def test_an_oversize_tile_is_caught() -> None:
    launch = dataclasses.replace(changed(recorded("skinny_kernel"), BLOCK_OUTPUTS=128, BLOCK_INPUTS=256), num_stages=4)
    (complaint,) = complaints_of(compile_launch(launch, CARDS["sm_89"]), CARDS["sm_89"], is_decoding=False)
    assert "the card has 101376" in complaint


def test_a_spill_is_caught_where_it_matters() -> None:
    launch = changed(recorded("attend_kernel", step="prompt"), TILE_ROWS=128, TILE_KEYS=128)
    resources = compile_launch(launch, CARDS["sm_80"])
    assert resources.spilled_bytes > 0
    spilling = dataclasses.replace(resources, shared_bytes=0)
    assert complaints_of(spilling, CARDS["sm_80"], is_decoding=True) == [f"spills {resources.spilled_bytes} bytes"]
    assert complaints_of(spilling, CARDS["sm_80"], is_decoding=False) == []
    assert complaints_of(Resources(255, 8, 0), CARDS["sm_75"], is_decoding=True) == []


@pytest.mark.parametrize("form", ["dense", "int8"])
@pytest.mark.parametrize("model_name", ["0.5B", "7B"], ids=["tied", "untied"])
def test_head_logits_are_float32_from_the_kernel(model_name: str, form: str) -> None:
    launches = record_launches(model_name, form, torch.bfloat16, STEPS["decode 1"])
    head = [launch for launch in launches if launch.name == "skinny_kernel"][-1]
    assert dict(head.signature)["out_ptr"] == "*fp32"


def test_the_choice_of_tokens_is_compiled_too() -> None:
    launches = record_launches(SMALL, "dense", torch.bfloat16, STEPS["drafts 8 x 5"])
    chosen = [launch.name for launch in launches[-6:]]
    assert chosen == "green_kernel adjust_kernel mask_kernel part_kernel choose_kernel list_kernel".split()
    assert "widen_kernel" in [launch.name for launch in record_launches(SMALL, "int4", torch.float16, STEPS["prompt"])]
