"""Random weights in every form that kernels read, made where they are needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from quant.base import LinearMethod, MatrixShard, PackedWeight, ParamSpec
from quant.dense import DenseMethod
from quant.packing import widen


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """A layout with its groups."""

    layout: str
    group_size: int = 0
    """Inputs that share a scale; 0: all of an output."""
    has_order: bool = False
    """Whether the inputs lie in another order, as GPTQ's act-order leaves them."""


FORMS: dict[str, Form] = {
    "dense": Form("dense"),
    "int8": Form("int8"),
    "int8 in 128": Form("int8", 128),
    "int4 in 32": Form("int4", 32),
    "int4 in 64": Form("int4", 64),
    "int4 in 128": Form("int4", 128),
    "act-order": Form("int4", 128, has_order=True),
}
"""`int4 in 128` is what GPTQ and AWQ checkpoints become, `int4 in 64` what is made of a dense one on load."""


def random_weight(
    form: Form,
    num_outputs: int,
    num_inputs: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    has_bias: bool = False,
    order: torch.Tensor | None = None,
) -> PackedWeight:
    """A weight on the generator's device, whose products with numbers near 1 are near 1.

    `order` is taken where the form has one; None: a random one.
    """
    device, shape = generator.device, (num_outputs, num_inputs)
    bias = torch.randn(num_outputs, device=device, generator=generator).to(dtype) if has_bias else None
    if form.layout == "dense":
        weight = torch.randn(
            shape, device=device, generator=generator, dtype=torch.float32 if device.type == "cpu" else dtype
        )
        return PackedWeight("dense", weight.mul_(num_inputs**-0.5).to(dtype), bias)
    num_groups = num_inputs // form.group_size if form.group_size else 1
    is_int4 = form.layout == "int4"
    half_range = 8 if is_int4 else 128
    spread = torch.rand(num_outputs, num_groups, device=device, generator=generator) + 0.5
    scales = (spread * (2 / half_range) * num_inputs**-0.5).to(torch.float16 if num_groups > 1 else torch.float32)
    if form.has_order and order is None:
        order = torch.randperm(num_inputs, device=device, generator=generator)
    kind: dict[str, Any] = {"device": device, "generator": generator}
    if is_int4:
        weight = torch.randint(0, 256, (num_outputs, num_inputs // 2), dtype=torch.uint8, **kind)
        zeros = torch.randint(0, 16, scales.shape, dtype=torch.int8, **kind)
    else:
        weight = torch.randint(-128, 128, shape, dtype=torch.int8, **kind)
        zeros = torch.randint(-8, 9, scales.shape, dtype=torch.int32, **kind)
    return PackedWeight(form.layout, weight, bias, scales, zeros, order if form.has_order else None)


def exact_product(packed: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    """x @ weight.T + bias in float64."""
    if packed.scales is None:
        weight = packed.weight
    else:
        weight = widen(dataclasses.replace(packed, scales=packed.scales.float()))
    product = x.double() @ weight.double().T
    return product if packed.bias is None else product + packed.bias.double()


@dataclasses.dataclass(frozen=True)
class RandomMethod(LinearMethod):
    """Takes a stored tensor's shape and makes its numbers up."""

    form: Form
    dtype: torch.dtype
    generator: torch.Generator
    orders: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    """By number of inputs: matrices that are merged have the same order, as in checkpoints."""

    def param_specs(self, in_features: int, out_features: int, has_bias: bool) -> dict[str, ParamSpec]:
        return DenseMethod(self.dtype, computes_in_float32=False).param_specs(in_features, out_features, has_bias)

    def pack(self, params: Mapping[str, torch.Tensor], shard: MatrixShard | None = None) -> PackedWeight:
        num_outputs, num_inputs = params["weight"].shape
        order = self._order(num_inputs) if self.form.has_order else None
        return random_weight(
            self.form, num_outputs, num_inputs, self.dtype, self.generator, has_bias="bias" in params, order=order
        )

    def _order(self, num_inputs: int) -> torch.Tensor:
        if num_inputs not in self.orders:
            self.orders[num_inputs] = torch.randperm(num_inputs, device=self.generator.device, generator=self.generator)
        return self.orders[num_inputs]
