"""Rounding without data, and what is written: an independent dequantisation and our loader read the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import awq, gptq
from quant.packing import widen
from quant.rounding import RoundedMatrix, plain_groups, round_symmetric, round_to_nearest
from tests.oracles.dequantize import awq_weight, gptq_weight

NUM_OUTPUTS, NUM_INPUTS = 32, 96


def random_matrix(
    bits: int, group_size: int, seed: int, *, is_symmetric: bool, has_unordered_groups: bool
) -> RoundedMatrix:
    generator = torch.Generator().manual_seed(seed)
    num_groups = 1 if group_size == -1 else NUM_INPUTS // group_size
    most = 2**bits
    shape = (NUM_OUTPUTS, num_groups)
    zeros = torch.randint(0, most, shape, generator=generator, dtype=torch.int32)
    groups = plain_groups(NUM_INPUTS, group_size)
    return RoundedMatrix(
        bits=bits,
        q=torch.randint(0, most, (NUM_OUTPUTS, NUM_INPUTS), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(shape, generator=generator) + 0.1).to(torch.float16),
        zero_points=torch.full_like(zeros, most // 2) if is_symmetric else zeros,
        group_of_input=groups[torch.randperm(NUM_INPUTS, generator=generator)] if has_unordered_groups else groups,
    )


def as_arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    arrays = {f"module.{name}": tensor.numpy() for name, tensor in tensors.items()}
    return {name: array.view(np.uint32) if array.dtype == np.int32 else array for name, array in arrays.items()}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 16, 32, 48]), st.booleans(), st.integers(0, 2**31))
def test_gptq_files_hold_the_numbers(bits: int, group_size: int, has_unordered_groups: bool, seed: int) -> None:
    matrix = random_matrix(bits, group_size, seed, is_symmetric=True, has_unordered_groups=has_unordered_groups)
    tensors = gptq.stored_tensors(matrix)
    expected = matrix.widen().numpy()
    arrays = as_arrays(tensors) | {"module.g_idx": tensors["g_idx"].numpy()}
    np.testing.assert_array_equal(gptq_weight(arrays, "module", True, "word"), expected)
    method = gptq.GptqMethod(bits=bits, group_size=group_size, has_stored_minus_one=True)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: spec.shape for name, spec in method.param_specs(NUM_INPUTS, NUM_OUTPUTS, False).items() if name != "bias"
    }
    np.testing.assert_array_equal(widen(method.pack(tensors)).numpy(), expected)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([-1, 16, 32, 48]), st.integers(0, 2**31))
def test_awq_files_hold_the_numbers(group_size: int, seed: int) -> None:
    matrix = random_matrix(4, group_size, seed, is_symmetric=False, has_unordered_groups=False)
    tensors = awq.stored_tensors(matrix)
    expected = matrix.widen().numpy()
    np.testing.assert_array_equal(awq_weight(as_arrays(tensors), "module"), expected)
    method = awq.AwqMethod(group_size)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: spec.shape for name, spec in method.param_specs(NUM_INPUTS, NUM_OUTPUTS, False).items() if name != "bias"
    }
    np.testing.assert_array_equal(widen(method.pack(tensors)).numpy(), expected)


def test_a_symmetric_gptq_file_has_autogptqs_words() -> None:
    matrix = random_matrix(4, 32, 0, is_symmetric=True, has_unordered_groups=False)
    assert set(gptq.stored_tensors(matrix)["qzeros"].flatten().tolist()) == {0x77777777}


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32])
def test_the_error_is_at_most_that_of_the_whole_range(bits: int, group_size: int, is_symmetric: bool) -> None:
    weight = torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=torch.Generator().manual_seed(bits))
    matrix = round_to_nearest(weight, bits=bits, group_size=group_size, is_symmetric=is_symmetric)
    size = NUM_INPUTS if group_size == -1 else group_size
    groups = weight.reshape(NUM_OUTPUTS, -1, size)
    if is_symmetric:
        scale = groups.abs().amax(dim=2, keepdim=True) / (2 ** (bits - 1) - 0.5)
        plain = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
        assert int(matrix.zero_points.unique()) == 2 ** (bits - 1)
    else:
        low, high = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        zero = (-low / scale).round()
        plain = ((groups / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale
    error = (matrix.widen() - weight).square().sum()
    # Scales are stored in float16: of 8 bits that moves the ends of a range by up to a sixteenth of a step.
    assert error <= 1.01 * (plain - groups).square().sum()


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-9, 0.5, -0.5])
def test_even_groups(value: float, is_symmetric: bool) -> None:
    weight = torch.full((8, 32), value)
    weight[0, 0] = 0.0
    widened = round_to_nearest(weight, bits=4, group_size=16, is_symmetric=is_symmetric).widen()
    assert widened.isfinite().all()
    assert float((widened - weight).abs().max()) <= 0.04


def test_importance_decides_whose_error_counts() -> None:
    weight = torch.tensor([[1.0, 0.31] + [0.0] * 14])
    importances = torch.ones(2, 16)
    importances[0, 0] = importances[1, 1] = 1e6
    scales = [round_symmetric(weight, importance, 2)[..., None] for importance in importances]
    errors = [((weight / scale).round().clamp(-2, 1) * scale - weight).abs()[0] for scale in scales]
    assert errors[0][0] < errors[1][0] and errors[1][1] < errors[0][1]
