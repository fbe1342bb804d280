"""Plain checkpoints: `weight` [out_features, in_features] and perhaps `bias` [out_features], dense layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from quant.base import LinearMethod, MatrixShard, PackedWeight, ParamSpec


class DenseMethod(LinearMethod):
    """Keeps a 16- or 32-bit weight as it is stored if the kernel widens it exactly.

    `dtype` is what the model should run in. If that is float32, a bfloat16 weight stays bfloat16 on devices whose
    kernels multiply in float32 anyway (`computes_in_float32`): the same numbers in half the memory, straight from the
    file.
    """

    def __init__(self, dtype: torch.dtype, *, computes_in_float32: bool) -> None:
        self._dtype = dtype
        self._computes_in_float32 = computes_in_float32

    def param_specs(self, in_features: int, out_features: int, has_bias: bool) -> dict[str, ParamSpec]:
        return dense_specs(in_features, out_features, has_bias)

    def reordered(self) -> ReorderedDenseMethod:
        """The same for matrices whose kernel puts weights into an order of its own."""
        return ReorderedDenseMethod(self._dtype, computes_in_float32=self._computes_in_float32)

    def is_copied(self, name: str, checkpoint_dtype: torch.dtype) -> bool:
        return self._storage_dtype(name, checkpoint_dtype) != checkpoint_dtype

    def _storage_dtype(self, name: str, checkpoint_dtype: torch.dtype) -> torch.dtype:
        if self._computes_in_float32 and (self._dtype == torch.float32 or name == "bias"):
            return torch.float32 if name == "bias" else checkpoint_dtype
        return self._dtype

    def pack(self, params: Mapping[str, torch.Tensor], shard: MatrixShard | None = None) -> PackedWeight:
        stored = {name: tensor.to(self._storage_dtype(name, tensor.dtype)) for name, tensor in params.items()}
        return PackedWeight("dense", stored["weight"], stored.get("bias"))


class ReorderedDenseMethod(DenseMethod):
    """Lets go of what was read: the kernel has a copy."""

    def is_copied(self, name: str, checkpoint_dtype: torch.dtype) -> bool:
        return True


def dense_specs(in_features: int, out_features: int, has_bias: bool) -> dict[str, ParamSpec]:
    """The stored tensors of a dense matrix, by name."""
    specs = {"weight": ParamSpec((out_features, in_features), output_dim=0, input_dim=1)}
    if has_bias:
        specs["bias"] = ParamSpec((out_features,), output_dim=0, input_dim=None)
    return specs
