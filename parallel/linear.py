"""Linear layers that know their shard. What the weights look like is the methods' business (`quant.base`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parallel.state import ParallelState
from quant.base import Kernels, LinearMethod, PackedWeight, ParamSpec, RunningWeight, merge


class ShardedLinear:
    """One or several checkpoint matrices with the same input, side by side along the output, cut for one rank.

    `is_output_sharded` cuts each part's outputs (column parallel); otherwise the inputs are cut (row parallel), and
    the caller must sum the ranks' results. Every part has a method of its own, as checkpoints leave single matrices
    unquantised; a part is packed as soon as its tensors are there. A single dense matrix that needs neither cut nor
    conversion is used where it lies, so that a memory-mapped file is not copied.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        *,
        has_bias: bool,
        is_output_sharded: bool,
        methods: Sequence[LinearMethod],
        kernels: Kernels,
        parallel: ParallelState,
    ) -> None:
        self._methods = list(methods)
        self._kernels = kernels
        self._parallel = parallel
        self._is_output_sharded = is_output_sharded
        self._has_bias = has_bias
        self._specs = [
            method.param_specs(in_features, size, has_bias)
            for method, size in zip(self._methods, out_features, strict=True)
        ]
        self._params: list[dict[str, torch.Tensor]] = [{} for _ in self._methods]
        self._packed: list[PackedWeight | None] = [None] * len(self._methods)
        self._merged: list[PackedWeight] = []
        self._running: list[RunningWeight] = []

    def _cut(self, spec: ParamSpec) -> tuple[int, slice] | None:
        """The dimension and the range of `spec` that this rank holds; None: all of it."""
        dim = spec.output_dim if self._is_output_sharded else spec.input_dim
        if dim is None or self._parallel.size == 1:
            return None
        return dim, self._parallel.shard(spec.shape[dim])

    def is_copied(self, name: str, part: int, checkpoint_dtype: torch.dtype) -> bool:
        """Whether loading tensor `name` makes a copy (rather than using the file's memory)."""
        spec = self._specs[part][name]
        is_converted = self._methods[part].is_copied(name, checkpoint_dtype)
        return len(self._specs) > 1 or is_converted or self._cut(spec) is not None

    def load(self, name: str, part: int, tensor: torch.Tensor) -> None:
        """Take in a checkpoint tensor. Raises KeyError for an unknown name, ValueError for a tensor that can't fit."""
        spec = self._specs[part][name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"has shape {list(tensor.shape)}, the model needs {list(spec.shape)}")
        if tensor.is_floating_point() == spec.is_integer:
            raise ValueError(f"is stored as {tensor.dtype}, which the model can't use there")
        if cut := self._cut(spec):
            tensor = tensor.narrow(cut[0], cut[1].start, cut[1].stop - cut[1].start).clone()
        self._params[part][name] = tensor
        if len(self._params[part]) == len(self._specs[part]):  # optional ones too: else it is packed in `finish`
            self._pack(part)

    def _pack(self, part: int) -> None:
        self._packed[part] = self._methods[part].pack(self._params[part])
        self._params[part] = {}
        if all(packed is not None for packed in self._packed):
            self._merged = merge([packed for packed in self._packed if packed is not None])
            self._packed = [None] * len(self._methods)

    def missing(self, part: int) -> list[str]:
        """Names of tensors of `part` not loaded yet."""
        if self._merged or self._packed[part] is not None:
            return []
        specs = self._specs[part].items()
        return sorted(name for name, spec in specs if name not in self._params[part] and not spec.is_optional)

    def finish(self, device: torch.device) -> None:
        """Move to the device and choose the kernels; the stored form is dropped. Raises ValueError."""
        for part, params in enumerate(self._params):
            if params:
                self._pack(part)
        for packed in self._merged:
            on_device = packed.to(device)
            if not self._is_output_sharded and self._parallel.rank > 0:
                on_device = on_device.without_bias()  # the ranks' results are summed: rank 0 alone adds it
            self._running.append(self._kernels(on_device))
        self._merged = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in_features of this rank] -> [rows, out_features of this rank]; row parallel: a partial sum."""
        assert self._running, "called before finish"
        if len(self._running) == 1:
            return self._running[0](x)
        return torch.cat([running(x) for running in self._running], dim=1)
