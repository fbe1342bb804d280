"""Each primitive of the eight lanes against numpy and torch, and of the sixteen against the eight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from numba import njit

from quant.kernels import powers, simd
from quant.kernels.arrays import flat_view

Floats = npt.NDArray[np.float32]
EDGES = [0.0, -0.0, 1.0, -1.5, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan]
X = np.array([3.5, -1.0, 0.0, 7.25, -2.5, 1e3, -1e-3, 0.5], np.float32)
Y = np.array([1.25, 4.0, -6.0, 0.1, -2.0, 3.0, 1e5, -0.3], np.float32)
Z = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], np.float32)


@njit
def _copy(source: Any, offset: int, out: Any) -> None:
    simd.store(out, 0, simd.load(source, offset))


@njit
def _store_all(out: Any, values: Any) -> None:
    for index in range(0, values.shape[0], simd.LANES):
        simd.store(out, index, simd.load(values, index))


@njit
def _exp(values: Any, out: Any) -> None:
    for index in range(0, values.shape[0], simd.LANES):
        simd.store(out, index, powers.exp(simd.load(values, index)))


@njit
def _exp2(values: Any, out: Any) -> None:
    for index in range(0, values.shape[0], simd.LANES):
        simd.store(out, index, powers.exp2(simd.load(values, index)))


@njit
def _splat(value: Any, out: Any) -> None:
    simd.store(out, 0, simd.splat(value))
    simd.store(out, 8, simd.zeros())


@njit
def _first(count: int, x: Any, other: Any, out: Any) -> None:
    simd.store(out, 0, simd.first_lanes(count, simd.load(x, 0), other))


@njit
def _fold(x: Any) -> tuple[Any, Any]:
    return simd.sum_lanes(simd.load(x, 0)), simd.max_lanes(simd.load(x, 0))


@njit
def _fma(x: Any, y: Any, z: Any, out: Any) -> None:
    simd.store(out, 0, simd.fma(simd.load(x, 0), simd.load(y, 0), simd.load(z, 0)))


def lanes_of(kernel: Callable[..., None], *arguments: Any, size: int = 8) -> Floats:
    out = np.full(size, 99.0, np.float32)
    kernel(*arguments, out)
    return out


def bits(values: Floats) -> npt.NDArray[np.uint32]:
    return values.view(np.uint32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_load_widens_exactly(dtype: torch.dtype, offset: int) -> None:
    values = torch.tensor(EDGES + [65504.0, 6e-8, 0.333, 5.0, -7.0, 100.0, 0.1, -0.2]).to(dtype)
    loaded = lanes_of(_copy, flat_view(values), offset)
    assert np.array_equal(loaded, values[offset : offset + 8].float().numpy(), equal_nan=True)
    assert np.array_equal(np.signbit(loaded[:2]), np.signbit(values[offset : offset + 2].float().numpy()))


def test_store_touches_only_its_eight_lanes() -> None:
    out = np.zeros(24, np.float32)
    _copy(X, 0, out[8:16])
    assert np.array_equal(out, np.concatenate([np.zeros(8, np.float32), X, np.zeros(8, np.float32)]))


def test_splat_and_zeros() -> None:
    assert lanes_of(_splat, np.float32(0.1), size=16).tolist() == [np.float32(0.1)] * 8 + [0.0] * 8


def stored(values: Floats, dtype: Any) -> npt.NDArray[Any]:
    """What `store` writes of any number of values, eight at a time."""
    whole = np.resize(values, -(-len(values) // simd.LANES) * simd.LANES)
    out = np.zeros(len(whole), dtype)
    _store_all(out, whole)
    return out[: len(values)]


def random_floats(seed: int, size: int) -> Floats:
    """Any bit pattern of a float32."""
    return np.random.default_rng(seed).integers(0, 2**32, size, np.uint32).view(np.float32)


@pytest.mark.parametrize("values", [np.array(EDGES, np.float32), random_floats(0, 50_000)], ids=["edges", "random"])
def test_store_rounds_to_bfloat16_as_torch_does(values: Floats) -> None:
    rounded = torch.from_numpy(stored(values, np.uint16)).view(torch.bfloat16)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    is_nan = expected.isnan()
    assert torch.equal(rounded.isnan(), is_nan)
    assert torch.equal(rounded.view(torch.int16)[~is_nan], expected.view(torch.int16)[~is_nan])


def test_store_rounds_halves_to_even() -> None:
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF], np.uint32).view(np.float32)
    assert stored(halfway, np.uint16).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7F80]


def test_store_keeps_a_float32_as_it_is() -> None:
    values = np.array(EDGES, np.float32)
    out = stored(values, np.float32)
    assert np.array_equal(bits(out)[:-1], bits(values)[:-1])
    assert np.isnan(out[-1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("add", X + Y),
        ("subtract", X - Y),
        ("multiply", X * Y),
        ("divide", X / Y),
        ("max_of", np.maximum(X, Y)),
    ],
)
def test_arithmetic(name: str, expected: Floats) -> None:
    operation = getattr(simd, name)

    @njit
    def kernel(x: Any, y: Any, out: Any) -> None:
        simd.store(out, 0, operation(simd.load(x, 0), simd.load(y, 0)))

    assert np.array_equal(bits(lanes_of(kernel, X, Y)), bits(expected))


def test_the_larger_of_a_number_and_nan_is_the_second() -> None:
    @njit
    def kernel(x: Any, y: Any, out: Any) -> None:
        simd.store(out, 0, simd.max_of(simd.load(x, 0), simd.load(y, 0)))

    nan = np.full(8, np.nan, np.float32)
    assert np.isnan(lanes_of(kernel, X, nan)).all()
    assert np.array_equal(lanes_of(kernel, nan, X), X)


def test_fma_rounds_once() -> None:
    x = np.full(8, 1 + 2**-12, np.float32)
    z = np.full(8, -(1 + 2**-11), np.float32)
    assert lanes_of(_fma, x, x, z).tolist() == [2.0**-24] * 8  # two roundings would give 0
    assert np.allclose(lanes_of(_fma, X, Y, Z), X.astype(float) * Y + Z, rtol=1e-7)


@pytest.mark.parametrize("count", [-(2**31), -5, 0, 1, 3, 7, 8, 9, 2**31 - 1])
def test_first_lanes(count: int) -> None:
    chosen = lanes_of(_first, count, X, np.float32(-np.inf))
    most = min(max(count, 0), 8)
    assert chosen.tolist() == X[:most].tolist() + [-np.inf] * (8 - most)


def test_a_sum_is_a_fixed_tree() -> None:
    x = np.random.default_rng(1).standard_normal((1000, 8)).astype(np.float32) * 1e4
    halves = x[:, :4] + x[:, 4:]
    quarters = halves[:, :2] + halves[:, 2:]
    expected = quarters[:, 0] + quarters[:, 1]
    assert [_fold(row)[0] for row in x] == expected.tolist()
    assert [_fold(row)[1] for row in x] == x.max(axis=1).tolist()


@pytest.mark.parametrize("place", range(8))
def test_the_maximum_may_be_in_any_lane(place: int) -> None:
    x = np.full(8, -np.inf, np.float32)
    x[place] = -3.0
    assert _fold(x)[1] == -3.0


@pytest.mark.parametrize(
    ("kernel", "power", "lowest", "highest"), [(_exp, np.exp, -87.0, 88.0), (_exp2, np.exp2, -126.0, 127.0)]
)
def test_powers_are_accurate_over_their_range(kernel: Any, power: Any, lowest: float, highest: float) -> None:
    x = np.linspace(lowest, highest, 400_000, dtype=np.float32)
    exact = power(x.astype(np.float64))
    error = np.abs(lanes_of(kernel, x, size=len(x)) - exact) / exact
    assert error.max() < 1.5 * 2.0**-23  # about one unit in the last place
    near_zero = np.linspace(-1e-3, 1e-3, 80_000, dtype=np.float32)
    error = np.abs(lanes_of(kernel, near_zero, size=len(near_zero)) - power(near_zero.astype(np.float64)))
    assert error.max() < 2.0**-23


@pytest.mark.parametrize(("kernel", "too_low"), [(_exp, -87.5), (_exp2, -126.5)])
def test_powers_at_the_edges(kernel: Any, too_low: float) -> None:
    x = np.array([0.0, -0.0, -np.inf, np.inf, np.nan, too_low, -1e30, 1e30], np.float32)
    values = lanes_of(kernel, x)
    assert values[:3].tolist() == [1.0, 1.0, 0.0]
    assert values[3] == values[7] > 1.6e38
    assert np.isnan(values[4])
    assert values[5:7].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_flat_view_is_no_copy(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 8, dtype=dtype)
    view = flat_view(tensor)
    assert (view.shape, view.itemsize) == ((16,), dtype.itemsize)
    tensor[1, 0] = 1.0
    assert view[8] != 0


@njit
def _sixteen(x: Any, y: Any, ones: Any, count: int, out: Any) -> Any:
    a, b = simd.load16(x, 1), simd.load16(y, 1)
    simd.store(out, 0, simd.fma(a, b, simd.add(simd.zeros16(), simd.splat16(simd.load_one(ones, 1)))))
    simd.store(out, 16, powers.exp2(a))
    simd.store(out, 32, simd.first_lanes(count, simd.max_of(a, b), simd.load_one(ones, 2)))
    return simd.sum_lanes(a), simd.max_lanes(a)


@njit
def _twice_eight(x: Any, y: Any, ones: Any, count: int, out: Any) -> Any:
    for half in range(0, 16, 8):
        a, b = simd.load(x, 1 + half), simd.load(y, 1 + half)
        simd.store(out, half, simd.fma(a, b, simd.splat(simd.load_one(ones, 1))))
        simd.store(out, 16 + half, powers.exp2(a))
        simd.store(out, 32 + half, simd.first_lanes(count - half, simd.max_of(a, b), simd.load_one(ones, 2)))
    low, high = simd.load(x, 1), simd.load(x, 9)
    return simd.sum_lanes(simd.add(low, high)), simd.max_lanes(simd.max_of(low, high))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 3, 8, 11, 16])
def test_sixteen_lanes_are_twice_eight(dtype: torch.dtype, count: int) -> None:
    x, y = (flat_view(torch.tensor(np.concatenate([part, part[::-1], part])).to(dtype)) for part in (X, Y))
    found, expected = np.zeros(48, np.float32), np.zeros(48, np.float32)
    ones = np.array([0, 0.7, -1.3], np.float32)
    assert _sixteen(x, y, ones, count, found) == _twice_eight(x, y, ones, count, expected)
    assert np.array_equal(bits(found), bits(expected))
