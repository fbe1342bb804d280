"""Shards put together equal the whole, for every way of cutting a layer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional

from parallel.embedding import VocabTable
from parallel.linear import ShardedLinear
from parallel.state import ParallelState
from quant.kernels import running_weight
from quant.none import DenseMethod

CPU = torch.device("cpu")
METHOD = DenseMethod(torch.float32, is_widening=True)
IN = 48


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(
    outs: Sequence[int],
    *,
    has_bias: bool,
    is_output_sharded: bool = True,
    rank: int = 0,
    size: int = 1,
    method: DenseMethod = METHOD,
) -> ShardedLinear:
    """Not loaded yet."""
    return ShardedLinear(
        IN,
        outs,
        has_bias=has_bias,
        is_output_sharded=is_output_sharded,
        methods=[method] * len(outs),
        kernels=running_weight,
        parallel=ParallelState(rank, size),
    )


def load_parts(layer: ShardedLinear, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> ShardedLinear:
    for part in reversed(range(len(weights))):  # in no particular order
        layer.load("weight", part, weights[part])
        if biases:
            layer.load("bias", part, biases[part])
        assert layer.missing(part) == []
    layer.finish(CPU)
    return layer


def make_tensors(outs: Sequence[int], has_bias: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    weights = [random(out, IN, seed=part) for part, out in enumerate(outs)]
    return weights, [random(out, seed=10 + part) for part, out in enumerate(outs)] if has_bias else []


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("outs", [(24,), (16, 16), (32, 8, 16)], ids=["column", "merged", "qkv"])
def test_output_shards_side_by_side_are_the_whole(outs: tuple[int, ...], has_bias: bool) -> None:
    weights, biases = make_tensors(outs, has_bias)
    x = random(5, IN, seed=99)
    expected = [x @ weight.T + (biases[part] if has_bias else 0) for part, weight in enumerate(weights)]
    shards = []
    for rank in range(2):
        layer = load_parts(make_layer(outs, has_bias=has_bias, rank=rank, size=2), weights, biases)
        shards.append(layer(x).split([out // 2 for out in outs], dim=1))
    together = [torch.cat(halves, dim=1) for halves in zip(*shards, strict=True)]
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)
    whole = load_parts(make_layer(outs, has_bias=has_bias), weights, biases)(x)
    assert torch.equal(whole, torch.cat(together, dim=1)), "the outputs are the same sums, only elsewhere"


@pytest.mark.parametrize("has_bias", [True, False])
def test_input_shards_sum_to_the_whole_with_the_bias_once(has_bias: bool) -> None:
    weights, biases = make_tensors((20,), has_bias)
    x = random(5, IN, seed=99)
    total = torch.zeros(5, 20)
    for rank in range(2):
        layer = make_layer((20,), has_bias=has_bias, is_output_sharded=False, rank=rank, size=2)
        load_parts(layer, weights, biases)
        part = x[:, rank * IN // 2 : (rank + 1) * IN // 2].contiguous()
        total += layer(part)
    expected = functional.linear(x, weights[0], biases[0] if has_bias else None)
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("outs", [(16,), (16, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_stored_is_what_is_multiplied_with(outs: tuple[int, ...], dtype: torch.dtype) -> None:
    weights, biases = make_tensors(outs, True)
    weights, biases = [weight.to(dtype) for weight in weights], [bias.to(dtype) for bias in biases]
    x = random(3, IN, seed=99)
    out = load_parts(make_layer(outs, has_bias=True), weights, biases)(x)
    expected = x @ torch.cat(weights).float().T + torch.cat(biases).float()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_parts_stored_in_different_dtypes_lose_nothing_under_float32() -> None:
    weights, _ = make_tensors((16, 16), False)
    weights[1] = weights[1].bfloat16()
    x = random(3, IN, seed=99)
    out = load_parts(make_layer((16, 16), has_bias=False), weights, [])(x)
    torch.testing.assert_close(out, x @ torch.cat([weights[0], weights[1].float()]).T, atol=1e-5, rtol=1e-5)


def test_a_tensor_that_fits_as_it_is_is_not_copied() -> None:
    weight = random(16, IN).bfloat16()
    layer = make_layer((16,), has_bias=False)
    assert not layer.is_copied("weight", 0, torch.bfloat16)
    load_parts(layer, [weight], [])
    x = random(2, IN)
    before = layer(x)
    weight.zero_()
    assert before.any() and not layer(x).any()


@pytest.mark.parametrize(
    ("outs", "size", "dtype"),
    [((16, 16), 1, torch.float32), ((16,), 2, torch.float32), ((16,), 1, torch.bfloat16)],
    ids=["merged", "cut", "converted"],
)
def test_a_tensor_that_is_cut_merged_or_converted_is_copied(
    outs: tuple[int, ...], size: int, dtype: torch.dtype
) -> None:
    method = DenseMethod(dtype, is_widening=True)
    weights, _ = make_tensors(outs, False)
    layer = make_layer(outs, has_bias=False, size=size, method=method)
    assert layer.is_copied("weight", 0, torch.float32)
    load_parts(layer, weights, [])
    x = random(2, IN)
    before = layer(x)
    for weight in weights:
        weight.zero_()
    assert torch.equal(layer(x), before)


def test_what_is_missing_is_named_by_part() -> None:
    layer = make_layer((16, 8), has_bias=True)
    weights, biases = make_tensors((16, 8), True)
    assert (layer.missing(0), layer.missing(1)) == (["bias", "weight"], ["bias", "weight"])
    layer.load("weight", 1, weights[1])
    assert (layer.missing(0), layer.missing(1)) == (["bias", "weight"], ["bias"])
    layer.load("bias", 0, biases[0])
    assert (layer.missing(0), layer.missing(1)) == (["weight"], ["bias"])


def test_tensors_that_do_not_fit() -> None:
    layer = make_layer((16, 8), has_bias=False)
    with pytest.raises(ValueError, match=r"has shape \[16, 48\], the model needs \[8, 48\]"):
        layer.load("weight", 1, random(16, IN))
    with pytest.raises(KeyError):
        layer.load("bias", 0, random(16))
    with pytest.raises(KeyError):
        layer.load("qweight", 0, random(16))


@pytest.mark.parametrize(
    ("total", "size", "expected"),
    [(8, 1, [slice(0, 8)]), (8, 2, [slice(0, 4), slice(4, 8)]), (9, 3, [slice(0, 3), slice(3, 6), slice(6, 9)])],
)
def test_shares(total: int, size: int, expected: list[slice]) -> None:
    assert [ParallelState(rank, size).shard(total) for rank in range(size)] == expected


def test_what_cannot_be_dealt_out_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="9 cannot be split over 2 shards"):
        ParallelState(0, 2).shard(9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_vocabulary_table_is_looked_up_and_multiplied_with(dtype: torch.dtype) -> None:
    weight = random(24, IN).to(dtype)
    table = VocabTable(24, IN, METHOD, METHOD, running_weight)
    assert table.missing(0) == ["weight"]
    table.load("weight", 0, weight)
    assert table.missing(0) == []
    table.finish(CPU)
    ids = torch.tensor([3, 23, 0, 3])
    assert torch.equal(table.embed(ids, torch.float32), weight[ids].float())
    hidden = random(2, IN, seed=1)
    torch.testing.assert_close(table(hidden), hidden @ weight.float().T, atol=1e-5, rtol=1e-5)


def test_a_vocabulary_table_that_does_not_fit() -> None:
    table = VocabTable(24, IN, METHOD, METHOD, running_weight)
    with pytest.raises(ValueError, match=r"has shape \[23, 48\], the model needs \[24, 48\]"):
        table.load("weight", 0, random(23, IN))
    with pytest.raises(KeyError):
        table.load("bias", 0, random(24))
