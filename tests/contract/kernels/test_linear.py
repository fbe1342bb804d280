"""Shards put together equal the whole, for every way of cutting a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch

from parallel.embedding import VocabTable
from parallel.linear import ColumnParallelLinear, Cut, RowParallelLinear, input_units
from parallel.partition import SplitError, lengths, split_units
from parallel.state import ParallelState
from quant.awq import AwqMethod
from quant.base import LinearMethod
from quant.compressed_tensors import CompressedTensorsMethod
from quant.dense import DenseMethod
from quant.gptq import GptqMethod, stored_tensors
from quant.kernels import choose_kernel
from quant.on_load import Int4Method, Int8Method
from quant.packing import widen
from quant.rounding import round_to_nearest
from tests.unit.parallel.threads import run_ranks

CPU = torch.device("cpu")
DENSE = DenseMethod(torch.float32, computes_in_float32=True)
GPTQ = GptqMethod(bits=4, group_size=32, has_stored_minus_one=True)
IN = 96
ALONE = ParallelState()
CPU_KERNELS = functools.partial(choose_kernel, "cpu")

Layer = ColumnParallelLinear | RowParallelLinear | VocabTable
Tensors = dict[str, torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_column(
    outs: Sequence[int], *, has_bias: bool, parallel: ParallelState = ALONE, method: LinearMethod = DENSE
) -> ColumnParallelLinear:
    """A layer that is not loaded yet. Its outputs are split in eights: 24 over 2 ranks are 16 and 8."""
    return ColumnParallelLinear(
        IN,
        outs,
        has_bias=has_bias,
        methods=[method] * len(outs),
        kernels=CPU_KERNELS,
        parallel=parallel,
        outputs=[split_units(out, parallel.size, 8)[parallel.rank] for out in outs],
    )


def make_row(
    shards: Sequence[slice],
    num_outputs: int,
    *,
    parallel: ParallelState = ALONE,
    method: LinearMethod = DENSE,
    is_gathered: bool = False,
) -> RowParallelLinear:
    """A layer that is not loaded yet."""
    return RowParallelLinear(
        shards, num_outputs, method=method, kernels=CPU_KERNELS, parallel=parallel, is_gathered=is_gathered
    )


def piece(tensor: torch.Tensor, cut: Cut | None) -> torch.Tensor:
    return tensor if cut is None else tensor[(*[slice(None)] * cut[0], cut[1])]


def load(layer: Layer, part: int, tensors: Tensors) -> None:
    for name in sorted(tensors, key=lambda name: not name.endswith("g_idx")):  # as the loader does
        layer.load(name, part, piece(tensors[name], layer.cut(name, part, tensors[name].shape)))


def load_parts(layer: ColumnParallelLinear, parts: Sequence[Tensors]) -> ColumnParallelLinear:
    for part in reversed(range(len(parts))):  # in no particular order
        load(layer, part, parts[part])
        assert layer.missing(part) == []
    layer.finish(CPU)
    return layer


def make_parts(outs: Sequence[int], has_bias: bool) -> list[Tensors]:
    weights: list[Tensors] = [{"weight": random(out, IN, seed=part)} for part, out in enumerate(outs)]
    if not has_bias:
        return weights
    return [{**weight, "bias": random(outs[part], seed=10 + part)} for part, weight in enumerate(weights)]


def product(x: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    return x @ tensors["weight"].float().T + tensors.get("bias", torch.zeros(1)).float()


def make_gptq(num_outputs: int, *, has_unordered_groups: bool) -> Tensors:
    """A matrix of IN inputs with a bias, as stored."""
    matrix = round_to_nearest(random(num_outputs, IN), bits=4, group_size=32, is_symmetric=True)
    tensors = stored_tensors(matrix)
    if has_unordered_groups:
        order = torch.randperm(IN, generator=torch.Generator().manual_seed(3))
        tensors["g_idx"] = tensors["g_idx"][order].contiguous()
    return {**tensors, "bias": random(num_outputs, seed=7)}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("outs", [(24,), (40, 40), (64, 24, 24)], ids=["one", "merged", "qkv"])
def test_output_shards_side_by_side_are_the_whole(outs: tuple[int, ...], has_bias: bool, size: int) -> None:
    parts = make_parts(outs, has_bias)
    x = random(5, IN, seed=99)

    def run(parallel: ParallelState) -> list[torch.Tensor]:
        layer = load_parts(make_column(outs, has_bias=has_bias, parallel=parallel), parts)
        own = [lengths(split_units(out, size, 8))[parallel.rank] for out in outs]
        return list(layer(x).split(own, dim=1))

    together = [torch.cat(shards, dim=1) for shards in zip(*run_ranks(size, run), strict=True)]
    torch.testing.assert_close(together, [product(x, tensors) for tensors in parts], atol=1e-5, rtol=1e-5)
    whole = load_parts(make_column(outs, has_bias=has_bias), parts)(x)
    assert torch.equal(whole, torch.cat(together, dim=1)), "the outputs are the same sums, only elsewhere"


Expected = Callable[[torch.Tensor], torch.Tensor]


def dense_case() -> tuple[LinearMethod, Tensors, Expected]:
    tensors = {"weight": random(40, IN)}
    return DENSE, tensors, lambda x: product(x, tensors)


def gptq_case(has_unordered_groups: bool) -> tuple[LinearMethod, Tensors, Expected]:
    tensors = make_gptq(40, has_unordered_groups=has_unordered_groups)
    weight = widen(GPTQ.pack(tensors))
    return GPTQ, tensors, lambda x: product(x, {"weight": weight, "bias": tensors["bias"]})


ROW_CASES = {
    "dense": dense_case,
    "groups": lambda: gptq_case(has_unordered_groups=False),
    "scattered groups": lambda: gptq_case(has_unordered_groups=True),
}


def run_row(shards: list[slice], case: str, *, is_gathered: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each rank's result, and that of one rank alone."""
    method, tensors, expected = ROW_CASES[case]()
    x = random(5, IN, seed=99)

    def run(parallel: ParallelState) -> torch.Tensor:
        own = shards if parallel.size > 1 else [slice(0, IN)]
        layer = make_row(own, 40, parallel=parallel, method=method, is_gathered=is_gathered)
        load(layer, 0, tensors)
        assert layer.missing(0) == []
        layer.finish(CPU)
        return layer(x[:, own[parallel.rank]].contiguous())

    results = run_ranks(len(shards), run)
    for result in results:
        torch.testing.assert_close(result, expected(x), atol=1e-4, rtol=1e-5)
    return results, run_ranks(1, run)[0]


@pytest.mark.parametrize(
    "shards", [[slice(0, 64), slice(64, 96)], split_units(IN, 3, 32), split_units(IN, 2, 16)], ids=str
)
@pytest.mark.parametrize("case", ROW_CASES)
def test_input_shards_sum_to_the_whole_with_the_bias_once(case: str, shards: list[slice]) -> None:
    results, _ = run_row(shards, case, is_gathered=False)
    assert all(torch.equal(result, results[0]) for result in results), "every rank goes on with the same bits"


@pytest.mark.parametrize(
    ("case", "is_gathered"),
    [("dense", True), ("groups", True), ("scattered groups", True), ("scattered groups", False)],
)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_gathered_inputs_give_the_bits_of_one_rank(case: str, is_gathered: bool, size: int) -> None:
    results, alone = run_row(split_units(IN, size, 16), case, is_gathered=is_gathered)
    assert all(torch.equal(result, alone) for result in results)


@pytest.mark.parametrize("outs", [(16,), (16, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_stored_is_what_is_multiplied_with(outs: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = [{name: tensor.to(dtype) for name, tensor in tensors.items()} for tensors in make_parts(outs, True)]
    x = random(3, IN, seed=99)
    out = load_parts(make_column(outs, has_bias=True), parts)(x)
    expected = torch.cat([product(x, tensors) for tensors in parts], dim=1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_parts_stored_in_different_dtypes_lose_nothing_under_float32() -> None:
    parts = make_parts((16, 16), False)
    parts[1]["weight"] = parts[1]["weight"].bfloat16()
    x = random(3, IN, seed=99)
    out = load_parts(make_column((16, 16), has_bias=False), parts)(x)
    expected = torch.cat([product(x, tensors) for tensors in parts], dim=1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parallel", [ALONE, ParallelState(0, 2), ParallelState(1, 2)], ids=["whole", "first", "last"])
def test_a_single_tensor_or_some_of_its_outputs_is_not_copied(parallel: ParallelState) -> None:
    tensors = {"weight": random(16, IN).bfloat16()}
    layer = make_column((16,), has_bias=False, parallel=parallel)
    assert not layer.is_copied("weight", 0, torch.bfloat16)
    load_parts(layer, [tensors])
    x = random(2, IN)
    before = layer(x)
    tensors["weight"].zero_()
    assert before.any() and not layer(x).any()


@pytest.mark.parametrize(
    ("outs", "dtype"), [((16, 16), torch.float32), ((16,), torch.bfloat16)], ids=["merged", "converted"]
)
def test_a_tensor_that_is_merged_or_converted_is_copied(outs: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = make_parts(outs, False)
    layer = make_column(outs, has_bias=False, method=DenseMethod(dtype, computes_in_float32=True))
    assert layer.is_copied("weight", 0, torch.float32)
    load_parts(layer, parts)
    x = random(2, IN)
    before = layer(x)
    for tensors in parts:
        tensors["weight"].zero_()
    assert torch.equal(layer(x), before)


def test_some_of_the_inputs_are_copied() -> None:
    tensors = {"weight": random(16, IN)}
    shards = split_units(IN, 2)
    layer = make_row(shards, 16, parallel=ParallelState(1, 2))
    assert layer.is_copied("weight", 0, torch.float32)
    load(layer, 0, tensors)
    layer.finish(CPU)
    x = random(2, IN // 2)
    before = layer(x)
    tensors["weight"].zero_()
    assert torch.equal(layer(x), before)
    assert not make_row([slice(0, IN)], 16).is_copied("weight", 0, torch.float32)


def test_what_is_missing_is_named_by_part() -> None:
    layer = make_column((16, 8), has_bias=True)
    parts = make_parts((16, 8), True)
    assert (layer.missing(0), layer.missing(1)) == (["bias", "weight"], ["bias", "weight"])
    layer.load("weight", 1, parts[1]["weight"])
    assert (layer.missing(0), layer.missing(1)) == (["bias", "weight"], ["bias"])
    layer.load("bias", 0, parts[0]["bias"])
    assert (layer.missing(0), layer.missing(1)) == (["weight"], ["bias"])


def test_tensors_that_do_not_fit() -> None:
    layer = make_column((16, 8), has_bias=False, parallel=ParallelState(0, 1))
    with pytest.raises(ValueError, match=r"has shape \[16, 96\], the model needs \[8, 96\]"):
        layer.cut("weight", 1, (16, IN))
    for name in ("bias", "qweight"):
        with pytest.raises(KeyError):
            layer.cut(name, 0, (16,))
    with pytest.raises(ValueError, match=r"is stored as torch.int32, which the model can't use there"):
        layer.load("weight", 0, torch.zeros(16, IN, dtype=torch.int32))


def test_the_shape_that_is_checked_is_that_of_the_whole() -> None:
    shards = split_units(IN, 2)
    layer = make_row(shards, 16, parallel=ParallelState(1, 2))
    assert layer.cut("weight", 0, (16, IN)) == (1, slice(48, 96))
    with pytest.raises(ValueError, match=r"has shape \[16, 48\], the model needs \[16, 96\]"):
        layer.cut("weight", 0, (16, 48))


def test_cuts_are_in_stored_numbers() -> None:
    column = make_column((64,), has_bias=True, parallel=ParallelState(1, 2), method=GPTQ)
    row = make_row([slice(0, 48), slice(48, 96)], 64, parallel=ParallelState(1, 2), method=GPTQ)
    names = ("qweight", "qzeros", "scales", "g_idx", "bias")
    shapes = ((12, 64), (3, 8), (3, 64), (96,), (64,))
    cuts = [column.cut(name, 0, shape) for name, shape in zip(names, shapes, strict=True)]
    assert cuts == [(1, slice(32, 64)), (1, slice(4, 8)), (1, slice(32, 64)), None, (0, slice(32, 64))]
    cuts = [row.cut(name, 0, shape) for name, shape in zip(names, shapes, strict=True)]
    assert cuts == [(0, slice(6, 12)), (0, slice(1, 3)), (0, slice(1, 3)), None, None]


def test_a_word_is_not_cut() -> None:
    method = GptqMethod(bits=3, group_size=32, has_stored_minus_one=True)
    with pytest.raises(SplitError, match="96 quantised features can't be cut at 0 and 48, within a word"):
        make_row([slice(0, 48), slice(48, 96)], 64, parallel=ParallelState(0, 2), method=method)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (DENSE, (64, 32, 16, 8)),
        (Int8Method(), (64, 32, 16, 8)),
        (Int4Method(), (64, 32, 16, 8)),
        (GPTQ, (64, 64, 32, 16, 8)),
        (GptqMethod(bits=8, group_size=-1, has_stored_minus_one=True), (768, 64, 32, 16, 8)),
        (AwqMethod(group_size=128), (128, 64, 32, 16, 8)),
        (CompressedTensorsMethod(bits=4, group_size=96, is_symmetric=True), (192, 64, 32, 16, 8)),
    ],
    ids="dense int8 int4 gptq gptq-channel awq compressed-tensors".split(),
)
def test_inputs_are_dealt_in_whole_groups_where_they_can_be(method: LinearMethod, expected: tuple[int, ...]) -> None:
    assert input_units(method, 768, 64) == expected


def make_table(weight: torch.Tensor, parallel: ParallelState = ALONE) -> VocabTable:
    """24 rows, dealt in eights."""
    table = VocabTable(split_units(24, parallel.size, 8), IN, DENSE, DENSE, CPU_KERNELS, parallel)
    assert table.missing(0) == ["weight"]
    load(table, 0, {"weight": weight})
    assert table.missing(0) == []
    table.finish(CPU)
    return table


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_vocabulary_table_is_looked_up_and_multiplied_with(dtype: torch.dtype, size: int) -> None:
    weight = random(24, IN).to(dtype)
    ids = torch.tensor([3, 23, 0, 3, 8, 15, 16])
    hidden = random(2, IN, seed=1)

    def run(parallel: ParallelState) -> tuple[torch.Tensor, torch.Tensor]:
        table = make_table(weight, parallel)
        return table.embed(ids, torch.float32), table(hidden)

    embedded, logits = zip(*run_ranks(size, run), strict=True)
    assert all(torch.equal(rows, weight[ids].float()) for rows in embedded)
    torch.testing.assert_close(torch.cat(logits, dim=1), hidden @ weight.float().T, atol=1e-5, rtol=1e-5)


def test_rows_of_other_ranks_are_zeros() -> None:
    weight = random(24, IN)
    ids = torch.tensor([3, 23, 0, 15, 16])
    shards = [make_table(weight, ParallelState(rank, 2)).embed(ids, torch.float32) for rank in range(2)]
    is_first = ids < 16
    assert torch.equal(shards[0][is_first], weight[ids[is_first]]) and not shards[0][~is_first].any()
    assert torch.equal(shards[1][~is_first], weight[ids[~is_first]]) and not shards[1][is_first].any()


def test_a_vocabulary_table_that_does_not_fit() -> None:
    table = VocabTable(split_units(24, 2, 8), IN, DENSE, DENSE, CPU_KERNELS, ParallelState(1, 2))
    assert table.cut("weight", 0, (24, IN)) == (0, slice(16, 24))
    with pytest.raises(ValueError, match=r"has shape \[23, 96\], the model needs \[24, 96\]"):
        table.cut("weight", 0, (23, IN))
    with pytest.raises(KeyError):
        table.cut("bias", 0, (24,))
