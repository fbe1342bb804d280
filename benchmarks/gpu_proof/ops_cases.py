"""Cases of the operations between matrices: norms, SiLU and product, rotation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_proof.checks import Case, Check
from benchmarks.gpu_proof.inputs import Inputs
from engine.layers.base import Ops, RotaryTable, Rotation
from engine.layers.torch import TorchOps
from engine.layers.triton import TritonOps

EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float16)
HIDDEN_SIZES = (896, 3584, 8192)
OPS: Ops = TritonOps()
REFERENCE = TorchOps()


def ops_checks(*, is_toy: bool) -> Iterator[Check]:
    sizes, rows = ((96,), 3) if is_toy else (HIDDEN_SIZES, 65)
    for dtype in DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for size in sizes:
            yield _check(f"norm of {size}, {kind}", _norm, size, rows, dtype)
            yield _check(f"addition and norm of {size}, {kind}", _added_norm, size, rows, dtype)
            yield _check(f"SiLU and product of {size + 8}, {kind}", _product, size + 8, rows, dtype)
        for head_dim in (64, 128):
            yield _check(f"rotation of heads of {head_dim}, {kind}", _rotation, head_dim, rows, dtype)


def _check(
    name: str, make: Callable[[Inputs, int, int, torch.dtype], Case], size: int, rows: int, dtype: torch.dtype
) -> Check:
    return Check.of(name, lambda inputs: make(inputs, size, rows, dtype))


def _norm(inputs: Inputs, size: int, rows: int, dtype: torch.dtype) -> Case:
    x, weight = inputs.normal(rows, size, dtype=dtype, spread=2), inputs.normal(size, dtype=dtype)
    return Case(
        lambda: OPS.rms_norm(x, weight, EPS),
        lambda: _exact_norm(x.double(), weight),
    )


def _added_norm(inputs: Inputs, size: int, rows: int, dtype: torch.dtype) -> Case:
    """The norm and the residual, which is updated in place."""
    residual, x, weight = (inputs.normal(*shape, dtype=dtype) for shape in ((rows, size), (rows, size), (size,)))

    def run() -> torch.Tensor:
        updated = residual.clone()
        normed = OPS.add_rms_norm(updated, x, weight, EPS)
        return torch.cat([normed, updated])

    def expected() -> torch.Tensor:
        updated = residual.double() + x.double()
        return torch.cat([_exact_norm(updated, weight), updated])

    return Case(run, expected)


def _exact_norm(wide: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()


def _product(inputs: Inputs, size: int, rows: int, dtype: torch.dtype) -> Case:
    gate_up = inputs.normal(rows, 2 * size, dtype=dtype, spread=3)
    return Case(lambda: OPS.silu_and_mul(gate_up), lambda: REFERENCE.silu_and_mul(gate_up.double()))


def _rotation(inputs: Inputs, head_dim: int, rows: int, dtype: torch.dtype) -> Case:
    """Seven heads are rotated, three stay."""
    angles, positions = inputs.normal(50, head_dim // 2, spread=3), inputs.integers(50, rows)
    rotation = Rotation(RotaryTable(angles.cos(), angles.sin()), positions)
    qkv = inputs.normal(rows, 10 * head_dim, dtype=dtype)

    def run() -> torch.Tensor:
        rotated = qkv.clone()
        OPS.rotate(rotated, rotation, 7)
        return rotated

    def expected() -> torch.Tensor:
        heads = qkv.double().view(rows, 10, 2, head_dim // 2)
        cos, sin = (table.double()[positions].unsqueeze(1) for table in (angles.cos(), angles.sin()))
        first, second = heads[:, :, 0], heads[:, :, 1]
        rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=2)
        rotated[:, 7:] = heads[:, 7:]
        return rotated.view(rows, -1)

    return Case(run, expected)
