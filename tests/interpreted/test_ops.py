"""The operations between matrices in Triton against those in torch, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.layers.base import RotaryTable, Rotation
from engine.layers.torch import TorchOps
from engine.layers.triton import PRODUCT_BLOCK, TritonOps
from tests.interpreted.closeness import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REFERENCE, OPS = TorchOps(), TritonOps()
EPS = 1e-6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(rows=st.sampled_from([1, 2, 7]), size=st.sampled_from([1, 8, 64, 200, 896]))
@settings(max_examples=12)
def test_norms(dtype: torch.dtype, rows: int, size: int) -> None:
    x, added, weight = (random(rows, size, seed=seed).to(dtype) for seed in (0, 1, 2))
    weight = weight[0].contiguous()
    before = x.clone()
    expected = _norm(x, weight)
    assert_close(OPS.rms_norm(x, weight, EPS), expected, num_roundings=2)
    assert torch.equal(x, before)
    residual = x.clone()
    normed = OPS.add_rms_norm(residual, added, weight, EPS)
    assert_close(residual, x.double() + added.double())
    assert_close(normed, _norm(residual, weight), num_roundings=2)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_norms_of_heads(dtype: torch.dtype, head_dim: int) -> None:
    qkv, weight = random(3, 5 * head_dim).to(dtype), random(4, head_dim, seed=1).to(dtype)
    heads = qkv.view(3, 5, head_dim)
    expected = torch.stack([_norm(heads[:, i], weight[i]) for i in range(4)], dim=1)
    normed = qkv.clone()
    OPS.norm_heads(normed, weight, EPS)
    assert_close(normed.view(3, 5, head_dim)[:, :4], expected, num_roundings=2)
    assert torch.equal(normed[:, 4 * head_dim :], qkv[:, 4 * head_dim :]), "other heads are not normed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, PRODUCT_BLOCK, PRODUCT_BLOCK + 1])
def test_silu_and_mul(dtype: torch.dtype, size: int) -> None:
    gate_up = random(3, 2 * size)
    gate_up[0, :4] = torch.tensor([-200.0, -90.0, 0.0, 200.0])
    gate_up = gate_up.to(dtype)
    expected = REFERENCE.silu_and_mul(gate_up.double())
    assert_close(OPS.silu_and_mul(gate_up), expected, num_roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_rotate(dtype: torch.dtype, head_dim: int) -> None:
    angles = random(50, head_dim // 2, seed=3)
    rotation = Rotation(RotaryTable(angles.cos(), angles.sin()), torch.tensor([49, 0, 7, 7, 20]))
    qkv = random(5, 5 * head_dim).to(dtype)
    expected, rotated = qkv.double(), qkv.clone()
    heads = expected[:, : 3 * head_dim].view(5, 3, 2, head_dim // 2)
    cos, sin = (part.double()[rotation.rows].unsqueeze(1) for part in (angles.cos(), angles.sin()))
    first, second = heads[:, :, 0].clone(), heads[:, :, 1].clone()
    heads[:, :, 0], heads[:, :, 1] = first * cos - second * sin, second * cos + first * sin
    OPS.rotate(rotated, rotation, 3)
    assert_close(rotated, expected)
    assert torch.equal(rotated[:, 3 * head_dim :], qkv[:, 3 * head_dim :]), "other heads are not rotated"


def test_no_rows() -> None:
    nothing = torch.empty(0, 16)
    assert OPS.rms_norm(nothing, torch.ones(16), EPS).shape == (0, 16)
    assert OPS.silu_and_mul(nothing).shape == (0, 8)
    OPS.norm_heads(nothing, torch.ones(1, 16), EPS)
