"""Matrices stored as 8-bit floats (e4m3) or 8-bit integers beside scales, one for each block of the matrix.

Every format of such checkpoints has them; they differ in names, in the size of a block, and in what they say about
activations, which stays unread: weights alone are stored in 8 bits here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from quant.base import FormatError, LinearMethod, MatrixShard, PackedWeight, ParamSpec
from quant.packing import BYTE_CHUNK, widen

WHOLE = -1
"""Size of a block that takes in all outputs, or all inputs."""


@dataclasses.dataclass(frozen=True, slots=True)
class ScaledMethod(LinearMethod):
    """`weight` [n, k] in 8 bits, a scale for each `block` of (outputs, inputs), and perhaps a zero point."""

    block: tuple[int, int]
    is_float: bool
    scale_names: Sequence[str] = ("weight_scale",)
    """Names that the scales may have; one of them is there."""
    ignored_names: Sequence[str] = ("input_scale",)
    """Scales and zero points of activations: one number each."""
    ignored_zero_point_name: str | None = None
    """Zero points of a weight whose scales alone count, in integers or in the weight's own type."""
    zero_point_name: str | None = None

    def param_specs(self, in_features: int, out_features: int, has_bias: bool) -> dict[str, ParamSpec]:
        outputs, inputs = self._block_of(out_features, in_features)
        shape = (-(-out_features // outputs), -(-in_features // inputs))
        by_block = {
            "output_dim": None if self.block[0] == WHOLE else 0,
            "input_dim": None if self.block[1] == WHOLE else 1,
            "group_size": None if self.block[1] == WHOLE else inputs,
            "output_group_size": None if self.block[0] in (WHOLE, 1) else outputs,
        }
        has_choice = len(self.scale_names) > 1
        specs = {
            # `pack` holds it to the one dtype that it may have.
            "weight": ParamSpec((out_features, in_features), 0, 1, is_integer=None),
            "bias": ParamSpec((out_features,), output_dim=0, input_dim=None, is_optional=not has_bias),
        }
        for name in self.scale_names:
            specs[name] = ParamSpec(shape, **by_block, is_optional=has_choice)  # type: ignore[arg-type]
        for name in self.ignored_names:
            specs[name] = ParamSpec((1,), output_dim=None, input_dim=None, is_integer=None, is_optional=True)
        if self.ignored_zero_point_name is not None:
            specs[self.ignored_zero_point_name] = ParamSpec(
                shape, output_dim=None, input_dim=None, is_integer=None, is_optional=True
            )
        if self.zero_point_name is not None:
            specs[self.zero_point_name] = ParamSpec(shape, **by_block, is_integer=True)  # type: ignore[arg-type]
        return specs

    def _block_of(self, num_outputs: int, num_inputs: int) -> tuple[int, int]:
        outputs, inputs = self.block
        return num_outputs if outputs == WHOLE else outputs, num_inputs if inputs == WHOLE else inputs

    def is_copied(self, name: str, checkpoint_dtype: torch.dtype) -> bool:
        return name != "weight"

    def pack(self, params: Mapping[str, torch.Tensor], shard: MatrixShard | None = None) -> PackedWeight:
        weight, bias = params["weight"], params.get("bias")
        stored = next((params[name] for name in self.scale_names if name in params), None)
        if stored is None:
            raise FormatError(f"has no {' or '.join(self.scale_names)}: fetch the model again")
        dtype = torch.float8_e4m3fn if self.is_float else torch.int8
        if weight.dtype != dtype:
            raise FormatError(f"belongs to a weight in {weight.dtype}, which has to be {dtype}: fetch the model again")
        scales = self._by_output(stored, weight.shape)
        zero_points = torch.zeros(scales.shape, dtype=torch.int32, device=weight.device)
        if self.zero_point_name is not None:
            zero_points = self._by_output(params[self.zero_point_name], weight.shape).to(torch.int32)
        layout = "fp8" if self.is_float else "int8"
        bits = weight.view(torch.uint8) if self.is_float else weight
        packed = PackedWeight(layout, bits, None if bias is None else bias.float(), scales, zero_points)
        if weight.shape[1] // scales.shape[1] % BYTE_CHUNK:
            return PackedWeight("dense", widen(packed), packed.bias)
        return packed

    def _by_output(self, stored: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Numbers by block -> [n, groups] of as many inputs each as divide both a block and the matrix."""
        num_outputs, num_inputs = shape
        outputs, inputs = self._block_of(num_outputs, num_inputs)
        stored = stored.reshape(-1, stored.shape[-1] if stored.dim() > 1 else 1)
        rows, columns = stored.shape
        # A shard that begins within a block got smaller blocks, all of one size.
        outputs = outputs if rows == -(-num_outputs // outputs) else num_outputs // rows
        inputs = inputs if columns == -(-num_inputs // inputs) else num_inputs // columns
        group = math.gcd(min(inputs, num_inputs), num_inputs)
        row_of = torch.arange(num_outputs, device=stored.device) // outputs
        column_of = torch.arange(0, num_inputs, group, device=stored.device) // inputs
        return stored[row_of][:, column_of].contiguous()
