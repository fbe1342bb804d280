"""Linear layers that know their shard. What the weights look like is the method's business (`quant.base`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parallel.state import ParallelState
from quant.base import LinearMethod, ParamSpec, RunningWeight


class ShardedLinear:
    """One or several checkpoint matrices with the same input, side by side along the output, cut for one rank.

    `is_output_sharded` cuts each part's outputs (column parallel); otherwise the inputs are cut (row parallel), and
    the caller must sum the ranks' results. A tensor that needs neither cut, merge nor conversion is used where it
    lies, so that a memory-mapped file is not copied.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        *,
        has_bias: bool,
        is_output_sharded: bool,
        method: LinearMethod,
        parallel: ParallelState,
    ) -> None:
        self._method = method
        self._parallel = parallel
        self._is_output_sharded = is_output_sharded
        self._specs = [method.param_specs(in_features, size, has_bias) for size in out_features]
        self._params: dict[str, torch.Tensor] = {}
        self._missing = {(name, part) for part, specs in enumerate(self._specs) for name in specs}
        self._running: RunningWeight | None = None

    def _cut(self, spec: ParamSpec) -> tuple[int, slice] | None:
        """The dimension and the range of `spec` that this rank holds; None: all of it."""
        dim = spec.output_dim if self._is_output_sharded else spec.input_dim
        if dim is None or self._parallel.size == 1:
            return None
        return dim, self._parallel.shard(spec.shape[dim])

    def _local_shape(self, spec: ParamSpec) -> list[int]:
        shape = list(spec.shape)
        if cut := self._cut(spec):
            shape[cut[0]] = cut[1].stop - cut[1].start
        return shape

    def is_copied(self, name: str, checkpoint_dtype: torch.dtype) -> bool:
        """Whether loading tensor `name` makes a copy (rather than using the file's memory)."""
        spec = self._specs[0][name]
        is_converted = self._method.storage_dtype(name, checkpoint_dtype) != checkpoint_dtype
        return len(self._specs) > 1 or is_converted or self._cut(spec) is not None

    def load(self, name: str, part: int, tensor: torch.Tensor) -> None:
        """Take in a checkpoint tensor. Raises KeyError for an unknown name, ValueError for a wrong shape."""
        spec = self._specs[part][name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"has shape {list(tensor.shape)}, the model needs {list(spec.shape)}")
        if not self.is_copied(name, tensor.dtype):
            self._params[name] = tensor
        else:
            if cut := self._cut(spec):
                tensor = tensor.narrow(cut[0], cut[1].start, cut[1].stop - cut[1].start)
            self._place(name, part, tensor)
        self._missing.discard((name, part))

    def _place(self, name: str, part: int, tensor: torch.Tensor) -> None:
        """Copy into this part's range of the merged tensor, which is made on first use."""
        shapes = [self._local_shape(specs[name]) for specs in self._specs]
        dim = self._specs[part][name].output_dim
        if dim is None:
            raise ValueError(f"{name} cannot be merged")
        dtype = self._method.storage_dtype(name, tensor.dtype)
        if name not in self._params:
            merged = [*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :]]
            self._params[name] = torch.empty(merged, dtype=dtype)
        # Parts may be stored in different dtypes: keep the one that holds them all.
        self._params[name] = self._params[name].to(torch.promote_types(self._params[name].dtype, dtype))
        start = sum(shape[dim] for shape in shapes[:part])
        self._params[name].narrow(dim, start, shapes[part][dim]).copy_(tensor)

    def missing(self, part: int) -> list[str]:
        """Names of tensors of `part` not loaded yet."""
        return sorted(name for name, of in self._missing if of == part)

    def finish(self, device: torch.device) -> None:
        """Move to the device and make the running weight; the stored form is dropped."""
        params = {name: tensor.to(device) for name, tensor in self._params.items()}
        if not self._is_output_sharded and self._parallel.rank > 0:
            params.pop("bias", None)  # the ranks' results are summed: rank 0 alone adds it
        self._running = self._method.finish(params)
        self._params = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in_features of this rank] -> [rows, out_features of this rank]; row parallel: a partial sum."""
        assert self._running is not None, "called before finish"
        return self._running(x)
