"""Which method loads which matrix, and the sentences about what can't be loaded."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from quant.awq import AwqMethod
from quant.base import FormatError
from quant.compressed_tensors import CompressedTensorsMethod
from quant.config import FORMATS, ON_LOAD, Quantization, resolve_quantization
from quant.dense import DenseMethod
from quant.gptq import GptqMethod
from quant.on_load import Int4Method, Int8Method
from quant.packing import pack_words, widen
from quant.registry import load_entry

DENSE = DenseMethod(torch.bfloat16, computes_in_float32=True)
Q, K, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "lm_head"
TENSORS = {f"{Q}.qweight", f"{Q}.scales", f"{K}.weight", "lm_head.weight"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GGUF = {"quant_method": "gguf", "types": {Q: "Q4_K"}}
WEIGHTS = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}


def compressed_for(targets: Any) -> dict[str, Any]:
    return {**COMPRESSED, "config_groups": {"group_0": {"targets": targets, "weights": WEIGHTS}}}


def compressed_with(**changes: Any) -> dict[str, Any]:
    return {**COMPRESSED, "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**WEIGHTS, **changes}}}}


def rotated(*places: Any) -> dict[str, Any]:
    """A checkpoint whose weights and activations are transformed at these places."""
    apply = [{"targets": ["Linear"], "location": place} for place in places]
    return {**COMPRESSED, "transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": apply}}}}


def resolve(
    flag: str | None = None, stored: dict[str, Any] | None = None, head: str | None = None, *, is_exact: bool = False
) -> Quantization:
    return resolve_quantization(flag, head, stored, TENSORS, DENSE, matrices="cpu", is_exact=is_exact)


def test_a_dense_checkpoint_stays_dense() -> None:
    made = resolve()
    assert {made.method_for(Q), made.method_for(K), made.head_method_for(HEAD)} == {DENSE}
    assert made.description == "not quantised, head dense"


@pytest.mark.parametrize(
    ("is_bfloat16", "instructions", "is_reordered"),
    [(True, "AVX-512", True), (True, None, False), (False, "AVX-512", False)],
)
def test_weights_that_a_kernel_reorders_are_let_go_of_and_tables_are_mapped(
    is_bfloat16: bool, instructions: str | None, is_reordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has a copy: pages of the file would count beside it. Rows of a table are looked up in the file."""
    monkeypatch.setattr("quant.config.rounding_instructions", lambda matrices, layout: instructions)
    made = resolve_quantization(
        None, None, None, TENSORS, DENSE, matrices="cpu", is_exact=False, is_bfloat16=is_bfloat16
    )
    methods = made.method_for(Q), made.head_method_for(HEAD), made.dense
    assert [method.is_copied("weight", torch.bfloat16) for method in methods] == [is_reordered, is_reordered, False]


@pytest.mark.parametrize(("flag", "kind"), [("eetq", Int8Method), ("int8", Int8Method), ("int4", Int4Method)])
def test_every_matrix_of_a_dense_checkpoint_is_quantized_on_load(flag: str, kind: type) -> None:
    made = resolve(flag)
    assert isinstance(made.method_for(Q), kind) and isinstance(made.method_for(K), kind)
    assert isinstance(made.head_method_for(HEAD), Int8Method)
    assert made.description == f"{flag}, head int8"
    assert made.size_factor < 1


@pytest.mark.parametrize(("is_exact", "table_bytes"), [(False, 64), (True, 128)])
def test_blocks_take_more_memory_than_in_the_file(is_exact: bool, table_bytes: int) -> None:
    """256 weights in Q6_K run in 12 bits each, 32 of a table in Q4_0 in 16 or 32."""
    stored = {**GGUF, "bytes": {"Q6_K": 210, "F32": 100}, "table_bytes": {"Q4_0": 18}}
    assert resolve(None, stored, is_exact=is_exact).size_factor == (384 + 100 + table_bytes) / 328
    assert resolve(None, GPTQ).size_factor == 1


@pytest.mark.parametrize(
    ("head", "is_exact", "kind"),
    [
        (None, False, Int8Method),
        (None, True, DenseMethod),
        ("none", False, DenseMethod),
        ("int4", False, Int4Method),
        ("int8", True, Int8Method),
    ],
)
def test_the_head(head: str | None, is_exact: bool, kind: type) -> None:
    assert isinstance(resolve(None, GPTQ, head, is_exact=is_exact).head_method_for(HEAD), kind)


def test_only_matrices_with_quantized_tensors_are_taken_for_quantized() -> None:
    made = resolve(None, GPTQ)
    assert made.method_for(Q) == GptqMethod(4, 32, has_stored_minus_one=True)
    assert made.method_for(K) is DENSE
    assert made.description == "gptq, 4 bits, groups of 32, head int8"


@pytest.mark.parametrize(
    ("changes", "has_stored_minus_one"),
    [
        ({}, True),
        ({"checkpoint_format": "gptq"}, True),
        ({"format": "gptq"}, True),
        ({"checkpoint_format": "gptq_v2"}, False),
    ],
)
def test_both_conventions_of_zero_points(changes: dict[str, str], has_stored_minus_one: bool) -> None:
    method = resolve(None, {**GPTQ, **changes}).method_for(Q)
    assert isinstance(method, GptqMethod)
    assert method.has_stored_minus_one is has_stored_minus_one


def test_single_matrices_may_have_other_settings() -> None:
    dynamic = {"-:.*mlp.*": {}, r"+:.*\.q_proj": {"bits": 8, "group_size": 64}}
    method = resolve(None, {**GPTQ, "dynamic": dynamic}).method_for(Q)
    assert isinstance(method, GptqMethod)
    assert (method.bits, method.group_size) == (8, 64)


@pytest.mark.parametrize(
    ("packing", "method"),
    [
        ("auto_round:auto_gptq", GptqMethod(4, 32, has_stored_minus_one=True)),
        (None, GptqMethod(4, 32, has_stored_minus_one=True)),
        ("auto_round", GptqMethod(4, 32, has_stored_minus_one=False)),
        ("auto_round:gptqmodel", GptqMethod(4, 32, has_stored_minus_one=False)),
        ("auto_round:auto_awq", AwqMethod(32)),
    ],
)
def test_auto_round_packs_as_gptq_or_as_awq(packing: str | None, method: Any) -> None:
    assert resolve(None, {**AUTO_ROUND, "packing_format": packing}).method_for(Q) == method


def test_single_matrices_of_auto_round_may_have_other_settings() -> None:
    """The tool looks a module up by its name, then for the first pattern that is found in it."""
    eight = {"bits": 8, "group_size": 64, "data_type": "int", "act_bits": 16}
    dense = {"bits": 16, "data_type": "float"}
    for extra, expected in (
        ({K: dense, Q: eight, r".*self_attn.*": {"bits": 2}}, (8, 64)),
        ({r"self_attn\.q": {"bits": 2}, r"q_proj$": eight}, (2, 32)),
        ({r".*o_proj.*": eight, "lm_head": eight}, (4, 32)),
    ):
        method = resolve(None, {**AUTO_ROUND, "extra_config": extra}).method_for(Q)
        assert isinstance(method, GptqMethod)
        assert (method.bits, method.group_size) == expected


def test_the_settings_of_old_awq_checkpoints() -> None:
    """Their quant_config.json, from before AutoAWQ wrote into config.json."""
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    assert resolve("awq", old).method_for(Q) == AwqMethod(64)
    with pytest.raises(FormatError, match="the quantisation's bits is 3, which can't be loaded"):
        resolve(None, {**old, "w_bit": 3})


def test_act_order_of_compressed_tensors_gathers_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    method = CompressedTensorsMethod(4, 32, is_symmetric=True)
    q = torch.randint(0, 16, (8, 128), generator=generator)
    scales = torch.rand(8, 4, generator=generator).to(torch.float16)
    groups = (torch.arange(128) // 32)[torch.randperm(128, generator=generator)]
    params = {
        "weight_packed": pack_words(q, 4, dim=1),
        "weight_scale": scales,
        "weight_shape": torch.tensor([8, 128]),
        "weight_g_idx": groups.to(torch.int32),
    }
    packed = method.pack(params)
    assert packed.layout == "int4"
    torch.testing.assert_close(widen(packed), (q - 8).float() * scales.float()[:, groups], atol=0, rtol=0)
    unset = torch.full((128,), -1, dtype=torch.int32)
    assert torch.equal(
        widen(method.pack({**params, "weight_g_idx": unset})), (q - 8).float() * scales.float().repeat_interleave(32, 1)
    )
    with pytest.raises(FormatError, match="has a weight_g_idx outside of its 4 groups"):
        method.pack({**params, "weight_g_idx": groups + 1})


@pytest.mark.parametrize("stored", [{**COMPRESSED, "transform_config": {}}, rotated("weight_input", "weight_output")])
def test_weights_that_were_rotated_before_they_were_stored_are_weights_as_any(stored: dict[str, Any]) -> None:
    assert resolve(None, stored).description == resolve(None, COMPRESSED).description


def test_a_channel_is_one_group() -> None:
    weights = {**WEIGHTS, "strategy": "channel", "group_size": None, "symmetric": False}
    stored = {**COMPRESSED, "config_groups": {"group_0": {"targets": ["re:.*q_proj$"], "weights": weights}}}
    made = resolve_quantization(None, None, stored, {f"{Q}.weight_scale"}, DENSE, matrices="cpu", is_exact=False)
    assert made.method_for(Q) == CompressedTensorsMethod(4, -1, is_symmetric=False)


@pytest.mark.parametrize("flag", [*FORMATS])
def test_the_flag_may_say_what_the_checkpoint_says(flag: str) -> None:
    known = (GPTQ, AWQ, AUTO_ROUND, COMPRESSED, FP8, GGUF)
    stored = next(each for each in known if each["quant_method"] == flag)
    assert resolve(flag, stored).description == resolve(None, stored).description


HAVE = f"{', '.join(FORMATS)} can, and dense checkpoints with --quantize {', '.join(ON_LOAD)}"


@pytest.mark.parametrize(
    ("flag", "stored", "sentence"),
    [
        ("awq", GPTQ, "--quantize awq, but the checkpoint is gptq: leave --quantize out"),
        ("auto-round", GPTQ, "--quantize auto-round, but the checkpoint is gptq: leave --quantize out"),
        (
            "gguf",
            None,
            "--quantize gguf needs a checkpoint in that format, this one is dense: give the path of one",
        ),
        ("eetq", AWQ, "--quantize eetq, but the checkpoint is awq: leave --quantize out"),
        (
            "gptq",
            None,
            "--quantize gptq needs a checkpoint in that format, this one is dense: give the path of one "
            "as --model-id, or --quantize one of eetq, int8, int4",
        ),
        (None, {"quant_method": "exl2"}, f"the checkpoint is quantised with 'exl2', which can't be loaded; {HAVE}"),
        (None, {**FP8, "fmt": "e5m2"}, "the checkpoint has 8-bit floats 'e5m2'; only e4m3 can be loaded"),
        (None, {**FP8, "weight_block_size": 128}, "the quantisation's weight_block_size is 128, which can't be loaded"),
        (None, {**FP8, "weight_block_size": [0, 9]}, "the quantisation's weight_block_size is [0, 9], which can't be"),
        (None, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised with 'bitsandbytes', which can't"),
        (None, {**GPTQ, "bits": 5}, "the quantisation's bits is 5, which can't be loaded"),
        (None, {**GPTQ, "bits": None}, "the quantisation's bits is None, which can't be loaded"),
        (None, {**GPTQ, "group_size": 0}, "the quantisation's group_size is 0, which can't be loaded"),
        (None, {**GPTQ, "checkpoint_format": "marlin"}, "GPTQ in the form 'marlin'; gptq and gptq_v2 can be loaded"),
        (None, {**GPTQ, "format": "gptq_p"}, "GPTQ in the form 'gptq_p'; gptq and gptq_v2 can be loaded"),
        (None, {**AWQ, "version": "gemv"}, "AWQ in the form 'gemv'; only gemm can be loaded"),
        (None, {**AWQ, "bits": 8}, "the quantisation's bits is 8, which can't be loaded"),
        (
            None,
            {**COMPRESSED, "format": "nvfp4-pack-quantized"},
            "compressed-tensors in the form 'nvfp4-pack-quantized'; only pack-quantized, int-quantized, float-quant",
        ),
        (None, {**COMPRESSED, "format": "float-quantized"}, "the quantisation's num_bits is 4, which can't be loaded"),
        (None, compressed_with(strategy="tensor"), "the quantisation's strategy is 'tensor'; only group, channel can"),
        (None, compressed_with(type="float"), "the quantisation's type is 'float'; only int can be loaded"),
        (None, {**COMPRESSED, "format": ["pack-quantized"]}, "in the form ['pack-quantized']; only pack-quantized"),
        (None, rotated("weight_output", "output"), "matrices are rotated (transform_config), and what they are multi"),
        (None, rotated(None), "matrices are rotated (transform_config)"),
        (None, {**COMPRESSED, "transform_config": [1]}, "the quantisation's transform_config is [1], not a map"),
        (None, {**COMPRESSED, "config_groups": {}}, "has no config_groups"),
        (None, {**COMPRESSED, "config_groups": [1]}, "the quantisation's config_groups is [1], not a map"),
        (None, {**COMPRESSED, "config_groups": "x" * 10_000}, "not a map"),
        (None, {**COMPRESSED, "config_groups": {"a": 5}}, "the quantisation's a is 5, not a map"),
        (
            None,
            {**COMPRESSED, "config_groups": {"a": {"weights": [1]}}},
            "the quantisation's weights is [1], not a map",
        ),
        (None, compressed_for("Linear"), "a config_group's targets are not a list of names"),
        (None, compressed_for([1]), "a config_group's targets are not a list of names"),
        (None, compressed_for(["re:("]), "the quantisation's pattern '(' is no regular expression"),
        (None, {**GPTQ, "dynamic": [1]}, "the quantisation's dynamic is [1], not a map"),
        (None, {**GPTQ, "dynamic": {"a": 1}}, "the quantisation's a is 1, not a map"),
        (None, {**GPTQ, "dynamic": {"+:[": {}}}, "the quantisation's pattern '[' is no regular expression"),
        (
            None,
            {**AUTO_ROUND, "packing_format": "auto_round:fp8_static"},
            "AutoRound in the form 'auto_round:fp8_static'; auto_round:auto_gptq, auto_round:gptq, auto_round, auto",
        ),
        (
            None,
            {**AUTO_ROUND, "packing_format": ["auto_round"]},
            "AutoRound in the form ['auto_round']; auto_round:auto",
        ),
        (None, {**AUTO_ROUND, "data_type": "mx_fp"}, "AutoRound of the type 'mx_fp'; only int can be loaded"),
        (None, {**AUTO_ROUND, "act_bits": 8}, "AutoRound with activations of 8 bits; only those of weights alone can"),
        (None, {**AUTO_ROUND, "rotation_config": {"a": 1}}, "AutoRound with rotated activations, which can't be"),
        (None, {**AUTO_ROUND, "bits": 5}, "the quantisation's bits is 5, which can't be loaded"),
        (None, {**AUTO_ROUND, "extra_config": [1]}, "the quantisation's extra_config is [1], not a map"),
        (None, {**AUTO_ROUND, "extra_config": {"a": 1}}, "the quantisation's a is 1, not a map"),
        (None, {**AUTO_ROUND, "extra_config": {"a[": {}}}, "the quantisation's pattern 'a[' is no regular expression"),
        (None, {**AUTO_ROUND, "extra_config": {"a": {"act_bits": 4}}}, "AutoRound with activations of 4 bits"),
        (None, {"quant_method": ["gptq"]}, "the checkpoint is quantised with ['gptq'], which can't be loaded"),
        (None, {"quant_method": {"a": 1}}, "the checkpoint is quantised with {'a': 1}, which can't be loaded"),
    ],
)
def test_what_can_not_be_loaded(flag: str | None, stored: dict[str, Any] | None, sentence: str) -> None:
    with pytest.raises(FormatError) as caught:
        resolve(flag, stored)
    assert sentence in str(caught.value)


HOSTILE = "(.+)+$x"


@pytest.mark.parametrize(
    ("stored", "num_names"),
    [
        ({**GPTQ, "dynamic": {f"+:{HOSTILE}": {"bits": 8}}}, 1),
        (compressed_for([f"re:{HOSTILE}"]), 1),
        ({**AUTO_ROUND, "extra_config": {HOSTILE: {"bits": 8}}}, 1),
        ({**GPTQ, "dynamic": {"(.?){20}$x": {"bits": 8}}}, 20_000),
    ],
)
def test_patterns_that_would_never_be_done_are_refused(
    stored: dict[str, Any], num_names: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes long enough for one name, and one that does for all together."""
    monkeypatch.setattr("quant.matching_time.MAX_MATCHING_S", 0.1)
    stored_format = load_entry(FORMATS[stored["quant_method"]])(stored)
    with pytest.raises(
        FormatError, match=r"can't be used \(to compare its patterns .* takes more than 0\.1 s\): fetch"
    ):
        for index in range(num_names):
            stored_format.method_for(f"model.layers.{index}.self_attn.q_proj")
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(FormatError, match="a matrix of 40 inputs and 12 outputs can't be packed in 3 bits"):
        GptqMethod(3, 32, has_stored_minus_one=True).param_specs(40, 12, False)
    with pytest.raises(FormatError, match="can't have groups of 48"):
        resolve(None, {**AWQ, "group_size": 48}).method_for(Q).param_specs(64, 32, False)
