"""What a quantization method must offer. A linear layer holds a method and kernels and never asks which they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch


class FormatError(ValueError):
    """A checkpoint or a setting that can't be run; the text is a whole sentence that names the fix."""


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
    """One stored tensor of a matrix, as the checkpoint has it.

    `output_dim` and `input_dim` say which dimension is cut if outputs or inputs are sharded (None: not cut). A
    dimension holds as many numbers as there are outputs or inputs, or packs several into one. With a `group_size` the
    input dimension holds one number for each group of that many inputs, and so does the output dimension with an
    `output_group_size`.
    """

    shape: tuple[int, ...]
    output_dim: int | None
    input_dim: int | None
    is_integer: bool | None = False
    """None: either will do, for nothing is made of it, or `pack` looks itself. False: floats of more than 8 bits."""
    is_optional: bool = False
    group_size: int | None = None
    output_group_size: int | None = None


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


@dataclasses.dataclass(frozen=True, slots=True)
class MatrixShard:
    """The part of a matrix that a rank packs, and what it must know of the inputs that other ranks hold."""

    num_outputs: int
    num_inputs: int
    total_inputs: int
    maximum: Callable[[torch.Tensor], torch.Tensor] = _same
    """Takes the maximum over the ranks that hold the other inputs, element by element."""


@dataclasses.dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix in the form that its kernel reads, whatever the checkpoint's format was.

    In the `layout` "dense", `weight` is [n, k] floating; in "int8" it is int8 [n, k]; in "int4" it is uint8 [n, k / 2],
    where each eight bytes hold sixteen inputs, the first eight in the lower halves; in "fp8" it is uint8 [n, k], the
    bits of 8-bit floats (e4m3), whose zero points are 0. A quantized weight stands for
    `scales * (q - zero_points)`; scales [n, groups] and zero_points [n, groups] (int32 in "int8", int8 in "int4") are
    for k / groups inputs each. Float32 `zero_points` are offsets: the weight is `scales * q - zero_points`. Column i of
    `weight` belongs to input `input_order[i]`, [k] int64; None: in order. Kernels that can give the product in
    `out_dtype` without rounding it do so; None: the dtype of x. `is_gated`: the first half of the outputs are gates of
    the other half, of which a `GatedKernel` makes use. `architecture` is that of the device, as `sm_90`, for which
    kernels may have been tuned; None: not known.
    """

    layout: str
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    zero_points: torch.Tensor | None = None
    input_order: torch.Tensor | None = None
    out_dtype: torch.dtype | None = None
    is_gated: bool = False
    architecture: str | None = None

    @property
    def num_inputs(self) -> int:
        return self.weight.shape[1] * (2 if self.layout == "int4" else 1)

    def outputs(self, part: slice) -> PackedWeight:
        """Some of the outputs, in the same memory."""
        names = ("weight", "bias", "scales", "zero_points")
        tensors = {name: getattr(self, name) for name in names}
        cut = {name: tensor[part] for name, tensor in tensors.items() if tensor is not None}
        return dataclasses.replace(self, **cut)

    def without_bias(self) -> PackedWeight:
        return dataclasses.replace(self, bias=None)

    def to(self, device: torch.device) -> PackedWeight:
        names = ("weight", "bias", "scales", "zero_points", "input_order")
        tensors = {name: getattr(self, name) for name in names}
        moved = {name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None}
        return dataclasses.replace(self, **moved)


class MatrixKernel(Protocol):
    """A packed weight with its kernel."""

    rounding: ClassVar[str | None]
    """The instructions with which it rounds activations, to bfloat16 in the layout "dense" and to 8 bits in others;
    None: it takes them as they are."""
    row_counts: ClassVar[Sequence[int]]
    """A number of rows for each program that is compiled when it is first needed; none where rows decide nothing."""

    @staticmethod
    def why_not(packed: PackedWeight) -> list[str]:
        """Reasons why the kernel can't run the weight here; empty if it can."""

    def __init__(self, packed: PackedWeight) -> None: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in_features] -> [rows, out_features], in the dtype of x; `PackedWeight.out_dtype` if it can.

        Or x is what `GatedKernel.gated` made for this kernel as its reader.
        """


@runtime_checkable
class GatedKernel(MatrixKernel, Protocol):
    """A kernel that can multiply with gates itself, so that they never go to memory."""

    num_gates: int
    """Number of outputs that are gates; 0: there are none, or they do not fill whole tiles."""

    def gated(self, x: torch.Tensor, reader: MatrixKernel | None = None) -> torch.Tensor:
        """silu(first half of the outputs) * second half, [rows, num_gates]: the bits that two kernels would give.

        `reader` is the kernel that gets the result, if nobody else does. Then the result's dtype, the size of its
        rows, and the order of its numbers in memory may be those that this kernel reads best.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """The change that an adapter makes to one matrix: `scaling * b @ a`, a [rank, inputs] and b [outputs, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclasses.dataclass(slots=True)
class AdapterRows:
    """The rows that layers see, by adapter.

    One object for all layers. Whoever runs steps fills it before each, and again where the last layer goes on with
    fewer rows.
    """

    rows: torch.Tensor | None = None
    """[num_rows] int64: every row that a layer sees, once, sorted by slot; None: no row of the step has an adapter."""
    slots: torch.Tensor | None = None
    """[num_rows] int64: the slot of the adapter of each of `rows`; -1: it has none."""
    segments: Sequence[tuple[int, int, int]] = ()
    """Slot, first and last (exclusive) place among `rows` of each adapter."""

    def take(self, other: AdapterRows) -> None:
        """Have what the other one has."""
        self.rows, self.slots, self.segments = other.rows, other.slots, other.segments


@dataclasses.dataclass(frozen=True, slots=True)
class LowRankShape:
    """Matrices side by side that adapters change, as one rank has them, and the memory for the changes."""

    num_inputs: int
    num_outputs: Sequence[int]
    """The number of each matrix."""
    num_slots: int
    max_rank: int
    dtype: torch.dtype
    """What the changes are kept in; sums are float32."""
    device: torch.device
    num_matrices: int = 1
    """Experts, each of which has such matrices: a row is of one of them."""
    is_gated: bool = False
    """Whether there are two matrices, and the first has the gates of the second (`PackedWeight.is_gated`)."""

    @property
    def num_places(self) -> int:
        """Changes that there is memory for: those of a slot are one after the other, matrix by matrix."""
        return self.num_slots * self.num_matrices


class LowRankKernel(Protocol):
    """The changes that the adapters in all slots make to matrices side by side."""

    is_host_driven: ClassVar[bool]
    """Whether what the host calls depends on the adapters of a step's rows: no graph has it."""
    num_bytes: int

    @property
    def is_idle(self) -> bool:
        """Whether no row of the running step has an adapter."""

    @staticmethod
    def why_not(shape: LowRankShape) -> list[str]:
        """Reasons why the kernel can't run such matrices; empty if it can."""

    def __init__(self, shape: LowRankShape, step: AdapterRows) -> None: ...

    def put(self, place: int, updates: Sequence[LowRankUpdate | None]) -> None:
        """Let a place have a change for each matrix; None: that matrix is not changed."""

    def add_to(self, y: torch.Tensor, x: torch.Tensor, groups: RowGroups | None = None) -> None:
        """Add to y [rows, outputs of all matrices] what the adapters of the step's rows make of x [rows, inputs].

        `groups` says which of the step's rows each row is made of, and its expert; None: the rows are the step's.
        """


@runtime_checkable
class GatedLowRankKernel(LowRankKernel, Protocol):
    """One that can take the gates as well, where the first of two matrices has gates of the second."""

    num_gates: int
    """Outputs of each of the two; 0: the matrices have no gates, or these do not fill whole tiles."""

    def gated(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """y [rows, 2 * num_gates], x [rows, inputs], float32 -> silu(first half) * second half, [rows, num_gates].

        The halves are those of what `add_to` would make of y, which stays: the same bits as two kernels give. Some row
        has an adapter.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class RowGroups:
    """Rows in the order of their matrices."""

    starts: torch.Tensor
    """The first row of each matrix, and the number of rows: [num_matrices + 1] int32."""
    active: torch.Tensor
    """How many matrices have rows, then which ones: [num_matrices + 1] int32, the rest without meaning."""
    matrices: torch.Tensor
    """The matrix of each row: [num_rows] int32."""
    sources: torch.Tensor
    """The step's row that each row is made of: [num_rows] int32."""


class GroupedKernel(Protocol):
    """The packed weights of many matrices with their kernel."""

    is_host_driven: bool
    """Whether what the host calls depends on the rows of each matrix: it waits for the device, and no graph has it."""

    def __call__(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """x [rows, in_features] -> [rows, out_features]. A row's result does not depend on the other rows."""


class LinearMethod(Protocol):
    """Makes packed weights of stored tensors, one matrix at a time.

    A subclass inherits what most methods answer: tensors are copied, and none of them decides the order of inputs.
    """

    def param_specs(self, in_features: int, out_features: int, has_bias: bool) -> dict[str, ParamSpec]:
        """The stored tensors by name, without the layer's prefix. Raises FormatError for sizes that don't divide."""

    def is_copied(self, name: str, checkpoint_dtype: torch.dtype) -> bool:
        """Whether `pack` makes something new of tensor `name`, rather than using its memory."""
        return True

    def decides_order(self, name: str) -> bool:
        """Whether stored tensor `name` tells in which group each input is: a cut of the inputs depends on it."""
        return False

    def has_unordered_groups(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether stored tensor `name` puts the inputs out of order, so that they can't be cut between groups."""
        return False

    def pack(self, params: Mapping[str, torch.Tensor], shard: MatrixShard | None = None) -> PackedWeight:
        """Make the packed weight once every tensor is there; `shard` None: it is whole. Raises FormatError.

        With a shard of the inputs, tensors that decide the order of inputs are left out: groups are in order.
        """


class OnLoadMethod(LinearMethod, Protocol):
    """A method that quantizes a dense checkpoint while it loads. It is made without arguments."""

    SIZE_FACTOR: float
    """Memory over that of the 16-bit checkpoint, roughly, with scales and a table of embeddings that stays dense."""


class CheckpointFormat(Protocol):
    """A format of quantized checkpoints, as the settings of one checkpoint describe it."""

    MARKER: str | tuple[str, ...]
    """The name of a tensor that every quantized matrix has, and only those; several: every one has one of them."""
    description: str
    """For the start-up summary: the format, bits and groups."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """`settings` is the checkpoint's `quantization_config`. Raises FormatError for what can't be loaded."""

    @staticmethod
    def is_recognized(settings: Mapping[str, Any]) -> bool:
        """Whether settings that name no format, as tools of old wrote them, are of this one."""

    def size_factor(self, *, is_exact: bool) -> float:
        """Memory of the weights over the size of the files, roughly; `is_exact`: in float32 as far as it can be."""

    def method_for(self, module: str) -> LinearMethod | None:
        """The method of a quantized matrix, by the checkpoint's name for it; None: it is dense all the same."""


class KernelChooser(Protocol):
    """Makes the kernel of a packed weight, whatever method packed it."""

    def __call__(self, packed: PackedWeight) -> MatrixKernel:
        """Choose the kernel for the layout. Raises ValueError with the reasons if none takes the weight."""


def merge(parts: Sequence[PackedWeight]) -> list[PackedWeight]:
    """Join neighbours that one kernel call can serve along their outputs; the order stays."""
    merged: list[PackedWeight] = []
    for part in parts:
        if merged and _is_compatible(merged[-1], part):
            merged[-1] = _side_by_side(merged[-1], part)
        else:
            merged.append(part)
    return merged


def _is_compatible(a: PackedWeight, b: PackedWeight) -> bool:
    if (a.layout, a.weight.shape[1], a.weight.dtype) != (b.layout, b.weight.shape[1], b.weight.dtype):
        return False
    if (a.input_order is None) != (b.input_order is None):
        return False
    if a.input_order is not None and b.input_order is not None and a.input_order is not b.input_order:
        if not torch.equal(a.input_order, b.input_order):
            return False
    if a.scales is None or b.scales is None:
        return True
    return (a.scales.shape[1], a.scales.dtype, _dtype(a.zero_points)) == (
        b.scales.shape[1],
        b.scales.dtype,
        _dtype(b.zero_points),
    )


def _dtype(tensor: torch.Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _side_by_side(a: PackedWeight, b: PackedWeight) -> PackedWeight:
    bias = None
    if a.bias is not None or b.bias is not None:
        bias = torch.cat([_bias_or_zeros(a), _bias_or_zeros(b)])
    return PackedWeight(
        a.layout,
        torch.cat([a.weight, b.weight]),
        bias,
        _concatenated(a.scales, b.scales),
        _concatenated(a.zero_points, b.zero_points),
        a.input_order,
    )


def _bias_or_zeros(part: PackedWeight) -> torch.Tensor:
    return torch.zeros(part.weight.shape[0]) if part.bias is None else part.bias


def _concatenated(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])
