"""Linear layers that know their shard. The methods (`quant.base`) know what the weights look like."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from parallel.partition import UNITS, SplitError, length, lengths, split_features
from parallel.state import ParallelState
from quant.base import (
    GatedKernel,
    GatedLowRankKernel,
    KernelChooser,
    LinearMethod,
    LowRankKernel,
    LowRankUpdate,
    MatrixKernel,
    MatrixShard,
    PackedWeight,
    ParamSpec,
    merge,
)

Cut = tuple[int, slice]
"""A dimension of a stored tensor, and the part of it that is read."""
MakeAdapters = Callable[[int, Sequence[int], int, bool], LowRankKernel]
"""Makes the kernel of adapters for so many inputs, outputs of each part and experts (1: there are none); whether the
first part has gates of the second."""


class ParallelMatrices:
    """One or several checkpoint matrices with the same input, side by side along the output, cut for one rank.

    `outputs` has a shard of each part's outputs (None: all), `inputs` is the shard of the inputs (None: all).
    `is_gated`: the first of two parts has gates of the second (`PackedWeight.is_gated`). Every part has its own method,
    because checkpoints leave single matrices unquantized. A part is packed as soon as its tensors are there. A single
    dense matrix whose rows need no conversion is used where it lies, so that a memory-mapped file is not copied, unless
    its method says that the kernel has an order of its own.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        *,
        has_bias: bool,
        methods: Sequence[LinearMethod],
        kernels: KernelChooser,
        parallel: ParallelState,
        outputs: Sequence[slice] | None = None,
        inputs: slice | None = None,
        is_gated: bool = False,
    ) -> None:
        self._is_gated = is_gated
        self._methods = list(methods)
        self._kernels = kernels
        self._parallel = parallel
        self._in_features, self._out_features = in_features, list(out_features)
        self._specs = [
            method.param_specs(in_features, size, has_bias)
            for method, size in zip(self._methods, out_features, strict=True)
        ]
        self._set_shards([slice(0, size) for size in out_features] if outputs is None else outputs, inputs)
        self._params: list[dict[str, torch.Tensor]] = [{} for _ in self._methods]
        self._packed: list[PackedWeight | None] = [None] * len(self._methods)
        self._merged: list[PackedWeight] = []
        self._matrix_kernels: list[MatrixKernel] = []
        self._gated_kernel: GatedKernel | None = None
        self._adapters: LowRankKernel | None = None
        self._gated_adapters: GatedLowRankKernel | None = None
        """The same, if it takes the gates."""

    def _set_shards(self, outputs: Sequence[slice], inputs: slice | None) -> None:
        """Set what this rank holds. Raises SplitError for shards that stored tensors can't be cut at."""
        self._outputs = list(outputs)
        self._inputs = slice(0, self._in_features) if inputs is None else inputs
        self._cuts = [
            {name: self._cut(spec, part) for name, spec in specs.items()} for part, specs in enumerate(self._specs)
        ]

    @property
    def _is_input_cut(self) -> bool:
        return length(self._inputs) < self._in_features

    def _cut(self, spec: ParamSpec, part: int) -> Cut | None:
        total, shard = self._out_features[part], self._outputs[part]
        if spec.output_dim is not None and length(shard) < total:
            if spec.output_group_size is not None:
                return spec.output_dim, _stored_groups(shard, spec.output_group_size)
            return spec.output_dim, _stored_range(shard, total, spec.shape[spec.output_dim])
        if spec.input_dim is None or not self._is_input_cut:
            return None
        shard = self._inputs
        if spec.group_size is not None:
            return spec.input_dim, _stored_groups(shard, spec.group_size)
        return spec.input_dim, _stored_range(shard, self._in_features, spec.shape[spec.input_dim])

    def decides_order(self, name: str, part: int) -> bool:
        """Whether tensor `name` tells the order of the inputs, and so must be loaded first."""
        return self._methods[part].decides_order(name)

    def cut(self, name: str, part: int, shape: Sequence[int]) -> Cut | None:
        """The part of the tensor `name`, stored in `shape`, that this rank needs; None: all of it.

        Raises KeyError for an unknown name, ValueError for a wrong shape.
        """
        check_shape(shape, self._specs[part][name].shape)
        return self._cuts[part][name]

    def is_copied(self, name: str, part: int, checkpoint_dtype: torch.dtype) -> bool:
        """Whether loading tensor `name` makes a copy (rather than using the file's memory)."""
        cut = self._cuts[part][name]
        is_converted = self._methods[part].is_copied(name, checkpoint_dtype)
        return len(self._specs) > 1 or is_converted or (cut is not None and cut[0] > 0)

    def load(self, name: str, part: int, tensor: torch.Tensor) -> None:
        """Take in the `cut` of a checkpoint tensor. Raises ValueError for one that can't be used."""
        spec, cut = self._specs[part][name], self._cuts[part][name]
        check_kind(tensor, is_integer=spec.is_integer)
        if cut and spec.group_size is not None and cut[0] == spec.input_dim:
            tensor = _for_shard(tensor, cut, spec.group_size, self._inputs)
        elif cut and spec.output_group_size is not None and cut[0] == spec.output_dim:
            tensor = _for_shard(tensor, cut, spec.output_group_size, self._outputs[part])
        if cut and cut[0] > 0:
            tensor = tensor.contiguous()
        self._params[part][name] = tensor
        if len(self._params[part]) == len(self._specs[part]):  # optional ones too: else it is packed in `finish`
            self._pack(part)

    def _pack(self, part: int) -> None:
        params, self._params[part] = self._params[part], {}
        if self._is_input_cut:
            # Groups are in order here, and the tensor that says so numbers those of the whole matrix.
            params = {name: tensor for name, tensor in params.items() if not self.decides_order(name, part)}
        shard = MatrixShard(
            num_outputs=length(self._outputs[part]),
            num_inputs=length(self._inputs),
            total_inputs=self._in_features,
            **({"maximum": self._parallel.maximum} if self._is_input_cut else {}),
        )
        self._packed[part] = self._methods[part].pack(params, shard)
        if all(packed is not None for packed in self._packed):
            self._merged = merge([packed for packed in self._packed if packed is not None])
            self._packed = [None] * len(self._methods)

    def missing(self, part: int) -> list[str]:
        """Names of tensors of `part` not loaded yet."""
        if self._merged or self._matrix_kernels or self._packed[part] is not None:
            return []
        specs = self._specs[part].items()
        return sorted(name for name, spec in specs if name not in self._params[part] and not spec.is_optional)

    def finish(self, device: torch.device) -> None:
        """Move to the device and choose the kernels; the stored form is dropped. Raises ValueError."""
        matrices = self.packed(device)
        if self._is_gated and len(matrices) == 1:
            matrices = [dataclasses.replace(matrices[0], is_gated=True)]
        self._matrix_kernels = [self._kernels(packed) for packed in matrices]
        first = self._matrix_kernels[0]
        self._gated_kernel = first if isinstance(first, GatedKernel) and first.num_gates else None

    @property
    def is_rounding(self) -> bool:
        """Whether all kernels that `finish` chose round activations."""
        return bool(self._matrix_kernels) and all(kernel.rounding is not None for kernel in self._matrix_kernels)

    def packed(self, device: torch.device) -> list[PackedWeight]:
        """Everything that was loaded, in the form that kernels read, on the device. The stored form is dropped."""
        for part, params in enumerate(self._params):
            if params:
                self._pack(part)
        merged, self._merged = self._merged, []
        if self._is_input_cut and self._parallel.rank > 0:
            merged = [packed.without_bias() for packed in merged]  # the ranks' results are summed: rank 0 alone adds it
        return [packed.to(device) for packed in merged]

    def allocate_adapters(self, make: MakeAdapters) -> int:
        """Have memory for adapters, once the weights are there: its bytes."""
        self._adapters = kernel = self.make_adapters(make)
        if isinstance(kernel, GatedLowRankKernel) and kernel.num_gates:
            self._gated_adapters = kernel
        return kernel.num_bytes

    def make_adapters(self, make: MakeAdapters, num_matrices: int = 1) -> LowRankKernel:
        """The kernel of adapters of so many layers like this one."""
        return make(length(self._inputs), lengths(self._outputs), num_matrices, self._is_gated)

    def matrix_shape(self, part: int) -> tuple[int, int]:
        """Outputs and inputs of the whole matrix."""
        return self._out_features[part], self._in_features

    def put_adapter(self, slot: int, updates: Sequence[LowRankUpdate | None]) -> None:
        """Let a slot have this rank's part of the changes of each whole matrix; None: that one is not changed."""
        assert self._adapters is not None, "called before allocate_adapters"
        self._adapters.put(slot, self.cut_updates(updates))

    def cut_updates(self, updates: Sequence[LowRankUpdate | None]) -> list[LowRankUpdate | None]:
        """This rank's part of the changes of each whole matrix."""
        return [
            update and LowRankUpdate(update.a[:, self._inputs], update.b[outputs], update.scaling)
            for update, outputs in zip(updates, self._outputs, strict=True)
        ]

    def _base_product(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, this rank's inputs] -> [rows, this rank's outputs], without the changes of adapters."""
        assert self._matrix_kernels, "called before finish"
        if len(self._matrix_kernels) == 1:
            return self._matrix_kernels[0](x)
        return torch.cat([kernel(x) for kernel in self._matrix_kernels], dim=1)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, this rank's inputs] -> [rows, this rank's outputs]"""
        y = self._base_product(x)
        if self._adapters is not None:
            self._adapters.add_to(y, x)
        return y


class ColumnParallelLinear(ParallelMatrices):
    """Matrices of which each rank computes its shard of the outputs, part by part, from all inputs."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in_features] -> [rows, this rank's outputs, part after part]"""
        return self._product(x)

    def gated(
        self, x: torch.Tensor, gate: Callable[[torch.Tensor], torch.Tensor], reader: MatrixKernel | None = None
    ) -> torch.Tensor:
        """x [rows, in_features] -> [rows, half of this rank's outputs]: silu(first part) * second part.

        `gate` makes that of the product where no kernel does. `reader` is that of `GatedKernel.gated`.
        """
        is_changed = self._adapters is not None and not self._adapters.is_idle
        if is_changed and self._gated_adapters is not None:
            return self._gated_adapters.gated(self._base_product(x), x)
        if self._gated_kernel is None or is_changed:
            return gate(self._product(x))
        return self._gated_kernel.gated(x, reader)


class RowParallelLinear(ParallelMatrices):
    """A matrix whose inputs are split over the ranks into `shards`; every rank gets all outputs.

    Each rank multiplies its inputs, and the results are summed, which adds in another order than one rank does. Two
    kinds of matrices can't have that. They gather all inputs, compute a shard of the outputs and gather those
    (`is_gathered`): the arithmetic of one rank, bit by bit. No weight is read twice, but more activations move.

    - If the stored groups of inputs are unordered (GPTQ act-order), no shard of the inputs has whole groups. The
      tensors say so while they load.
    - If the model's kernels round activations, a last bit sometimes decides which way, and what follows differs by
      the size of a rounding, 10,000 times as much.
    """

    def __init__(
        self,
        shards: Sequence[slice],
        out_features: int,
        *,
        method: LinearMethod,
        kernels: KernelChooser,
        parallel: ParallelState,
        has_bias: bool = False,
        is_gathered: bool = False,
    ) -> None:
        self.input_widths = lengths(shards)
        self.output_widths: list[int] | None = None
        """Outputs of each rank if all inputs are gathered; None: the ranks' results are summed."""
        super().__init__(
            shards[-1].stop,
            [out_features],
            has_bias=has_bias,
            methods=[method],
            kernels=kernels,
            parallel=parallel,
            inputs=shards[parallel.rank],
        )
        if is_gathered and parallel.size > 1:
            self.gather()

    def gather(self) -> None:
        """Have all inputs gathered. No tensor but those that decide the order of the inputs may be loaded yet."""
        shards = split_features(self._out_features[0], self._parallel.size)
        self.output_widths = lengths(shards)
        self._set_shards([shards[self._parallel.rank]], None)

    @property
    def only_reader(self) -> MatrixKernel | None:
        """The kernel that gets x, if nothing else reads it: no rank, no adapter."""
        is_shared = self.output_widths is not None or (self._adapters is not None and not self._adapters.is_idle)
        return None if is_shared or len(self._matrix_kernels) != 1 else self._matrix_kernels[0]

    def cut(self, name: str, part: int, shape: Sequence[int]) -> Cut | None:
        cut = super().cut(name, part, shape)
        return None if self.decides_order(name, part) else cut

    def load(self, name: str, part: int, tensor: torch.Tensor) -> None:
        """Take in a tensor as the base class does; those that decide the order of inputs must come first, and whole."""
        if self._is_input_cut and self._methods[part].has_unordered_groups(name, tensor):
            assert not self._params[0], "the order of the inputs comes first"
            self.gather()
        super().load(name, part, tensor)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, this rank's inputs] -> [rows, out_features], the same on every rank"""
        if self.output_widths is None:
            return self._parallel.all_reduce(self._product(x))
        return self._parallel.all_gather(
            self._product(self._parallel.all_gather(x, self.input_widths)), self.output_widths
        )


def check_shape(shape: Sequence[int], expected: Sequence[int]) -> None:
    """Raise ValueError if a checkpoint's tensor does not have the shape that the model needs.

    A single number may be stored with any number of dimensions.
    """
    if list(shape) != list(expected) and not math.prod(shape) == math.prod(expected) == 1:
        raise ValueError(f"has shape {list(shape)}, the model needs {list(expected)}")


def check_kind(tensor: torch.Tensor, *, is_integer: bool | None = False) -> None:
    """Raise ValueError if a checkpoint's tensor has integers where the model needs other numbers, or the reverse.

    Floats of 8 bits are no such numbers: they need a scale. `is_integer` None: the tensor may be anything.
    """
    if is_integer is None:
        return
    if tensor.is_floating_point() == is_integer:
        raise ValueError(f"is stored as {tensor.dtype}, which the model can't use there")
    if not is_integer and tensor.itemsize == 1:
        raise ValueError(f"is stored as {tensor.dtype}, and no scale says what these numbers stand for")


def _stored_range(shard: slice, total: int, stored: int) -> slice:
    """The part of a dimension that holds `total` features in `stored` numbers. Raises SplitError."""
    start, stop = shard.start * stored, shard.stop * stored
    if start % total or stop % total:
        raise SplitError(f"{total} quantised features can't be cut at {shard.start} and {shard.stop}, within a word")
    return slice(start // total, stop // total)


def _stored_groups(shard: slice, group_size: int) -> slice:
    """The groups that a shard has features of."""
    return slice(shard.start // group_size, -(-shard.stop // group_size))


def _for_shard(tensor: torch.Tensor, cut: Cut, group_size: int, shard: slice) -> torch.Tensor:
    """The groups of a shard of the features, all of one size: smaller ones if it begins or ends within a group.

    14 heads of 64 are 7 groups of 128. The first 7 heads end in the middle of the fourth, so they get 7 groups of 64.
    """
    dim, stored = cut
    size = math.gcd(shard.start, length(shard), group_size)
    if size == group_size:
        return tensor
    groups = torch.arange(shard.start, shard.stop, size) // group_size - stored.start
    return tensor.index_select(dim, groups)


def input_units(method: LinearMethod, in_features: int, out_features: int) -> tuple[int, ...]:
    """Units in which inputs may be split, the best first: whole groups, else what kernels can take."""
    specs = method.param_specs(in_features, out_features, False).values()
    sizes = {spec.group_size for spec in specs if spec.group_size is not None}
    return (*(math.lcm(size, UNITS[0]) for size in sizes), *UNITS)
