"""Adapters (LoRA) beside the model: the slots of memory in which steps find them, filled as steps need them.

Each matrix of the decoder's layers has a change for each slot, and adds those of a step's rows to its own product
(`parallel.linear`). Experts have memory for changes only if an adapter that the start names changes any. The scheduler
says which adapter is in which slot (`engine.scheduling.adapters`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from engine.adapter_rows import StepRows
from engine.checkpoint.adapter import AdapterWeights
from engine.checkpoint.adapter_config import HEAD
from engine.link.errors import StartError
from engine.models.base import CausalLM
from engine.scheduling.adapters import NO_SLOT
from parallel.experts import ExpertMatrices
from parallel.linear import ParallelMatrices
from quant.base import GatedLowRankKernel, LowRankKernel, LowRankShape, LowRankUpdate, RowGroups
from quant.kernels import make_low_rank_kernel

logger = logging.getLogger(__name__)

MAX_OPEN = 256
"""Adapters whose files are open before no more are opened while steps run. The start may name more.

Files stay open until nobody can name the adapter: what was loaded once stays loadable if somebody deletes its folder.
"""
DEFAULT_MAX_RANK = 16
"""Largest rank where no adapter is named at the start."""

AdaptableLayer = ParallelMatrices | ExpertMatrices


class AdapterSlots:
    """This rank's memory for adapters."""

    beat: Callable[[], None] = staticmethod(lambda: None)
    """Called after each part of a file that is read: a slow disk is not to pass for a process that hangs."""

    def __init__(
        self,
        model: CausalLM,
        base: Path,
        adapters: Sequence[Sequence[str]],
        *,
        backend: str,
        num_slots: int,
        max_rank: int | None,
        dtype: torch.dtype,
        activation_dtype: torch.dtype,
        device: torch.device,
        free_bytes: int | None = None,
    ) -> None:
        """`base`: the model's folder. `adapters`: name and folder of those that the start names, numbered from 0 on.

        They are kept in `dtype`, and meet rows in `activation_dtype`. `max_rank` None: that of the largest of them.
        `free_bytes` are there for all slots; None: that is not known. Raises StartError for an adapter that does not
        fit the model, and for slots that do not fit the memory.
        """
        self._device, self._dtype, self._base = device, dtype, base
        self._weights = {number: AdapterWeights(Path(folder)) for number, (_, folder) in enumerate(adapters)}
        self._choose_matrices(model)
        ranks = [weights.max_rank for weights in self._weights.values()]
        self.max_rank = max(ranks, default=DEFAULT_MAX_RANK) if max_rank is None else max_rank
        self._check_start(num_slots, free_bytes, model.num_ranks)
        self._in_slot: list[int | None] = [None] * num_slots
        self.rows = StepRows(device)
        """Which of a step's rows have an adapter, and which one."""
        self._layers = list(dict.fromkeys(layer for layer, _ in self._matrices.values()))
        kernels = self._allocate(backend, dtype)
        for number in range(min(num_slots, len(adapters))):
            self._load(number, number)
        self._compile(kernels, activation_dtype)
        self.is_host_driven = any(kernel.is_host_driven for kernel in kernels.values())
        """Whether what the host calls depends on the adapters of a step's rows: no graph has them."""

    def _choose_matrices(self, model: CausalLM) -> None:
        """Set which matrices have memory for changes. Experts, most of a model, have it if an adapter changes any."""
        matrices = adaptable_matrices(model)
        experts = {name for name, (layer, _) in matrices.items() if isinstance(layer, ExpertMatrices)}
        is_changing_experts = any(module in experts for weights in self._weights.values() for module in weights.modules)
        # A tied head is no layer of its own, and can be changed by merging.
        self._known = {*model.checkpoint_layers(), HEAD}
        self._left_out = set() if is_changing_experts else experts
        self._matrices = {name: place for name, place in matrices.items() if name not in self._left_out}

    def _check_start(self, num_slots: int, free_bytes: int | None, num_ranks: int) -> None:
        """Raise StartError, before anything is allocated, for what does not fit: adapters, or so many slots."""
        for weights in self._weights.values():
            self._check(weights)
        sizes = sum(sum(layer.matrix_shape(part)) for layer, part in self._matrices.values())
        num_bytes = num_slots * self.max_rank * sizes * self._dtype.itemsize // num_ranks
        if free_bytes is not None and num_bytes > free_bytes:
            raise StartError(
                f"--max-loras {num_slots} of rank {self.max_rank} take {num_bytes / 1e9:.1f} GB, and "
                f"{max(0, free_bytes) / 1e9:.1f} GB are free: lower --max-loras or --max-lora-rank"
            )

    def _allocate(self, backend: str, dtype: torch.dtype) -> dict[tuple[int, ...], LowRankKernel]:
        """Give every layer its kernels. Returns one of each kind: whether it is gated, experts, inputs, outputs."""
        kernels: dict[tuple[int, ...], LowRankKernel] = {}

        def make(num_inputs: int, num_outputs: Sequence[int], num_experts: int, is_gated: bool) -> LowRankKernel:
            sizes = self.num_slots, self.max_rank, dtype, self._device, num_experts, is_gated
            kernel = make_low_rank_kernel(backend, LowRankShape(num_inputs, num_outputs, *sizes), self.rows.current)
            kernels[is_gated, num_experts, num_inputs, *num_outputs] = kernel
            return kernel

        self.num_bytes = sum(layer.allocate_adapters(make) for layer in self._layers)
        return kernels

    @property
    def num_slots(self) -> int:
        return len(self._in_slot)

    def open(self, number: int, folder: str) -> None:
        """Open the files of an adapter. Raises StartError for one that can't be had or does not fit, whatever it is."""
        if len(self._weights) >= MAX_OPEN:
            raise StartError(f"{len(self._weights)} adapters are open: unload one")
        try:
            weights = AdapterWeights(Path(folder))
            self._check(weights)
        except StartError:
            raise
        except Exception as error:  # no check foresaw it, and requests that run shall not end with it
            raise StartError(f"{folder} can't be used ({error!r}): fetch the adapter again") from error
        self._weights[number] = weights

    def close(self, number: int) -> None:
        """Close the files of an adapter that no step will name any more."""
        self._weights.pop(number, None)

    def begin_step(
        self,
        adapters: Sequence[tuple[int, int]],
        slots: list[int],
        query_start_loc: list[int],
        needed: list[int] | None = None,
    ) -> None:
        """Take in the open adapters of a step, slot and number of each, and the slot of each sequence.

        What is not in its slot yet is loaded. `needed` are the rows that layers see from `rows.narrow` on.
        """
        if not adapters:
            self.rows.begin_without()
            return
        self.fill(adapters)
        self.rows.begin(slots, query_start_loc, needed)

    def lacks(self, adapters: Sequence[tuple[int, int]]) -> bool:
        """Whether any slot of a step does not have its adapter yet: the same on every rank."""
        return any(self._in_slot[slot] != number for slot, number in adapters)

    def fill(self, adapters: Sequence[tuple[int, int]]) -> None:
        """Load the adapters of a step, slot and number of each, that are not in their slots yet."""
        for slot, number in adapters:
            if self._in_slot[slot] != number:
                self._load(slot, number)

    def _compile(self, kernels: Mapping[tuple[int, ...], LowRankKernel], dtype: torch.dtype) -> None:
        """Start a kernel of each size: some are compiled then, for which requests would wait."""
        self.rows.show(np.array([NO_SLOT]))
        zero = torch.zeros(1, dtype=torch.int32, device=self._device)
        for (_, num_experts, num_inputs, *num_outputs), kernel in kernels.items():
            y, x = (torch.zeros(1, size, dtype=dtype, device=self._device) for size in (sum(num_outputs), num_inputs))
            kernel.add_to(y, x, None if num_experts == 1 else RowGroups(zero, zero, zero, zero))
            if isinstance(kernel, GatedLowRankKernel) and kernel.num_gates:
                kernel.gated(y, x)
        self.rows.begin_without()

    @functools.cached_property
    def _modules(self) -> dict[AdaptableLayer, dict[int, str]]:
        """The module of each part of each layer."""
        modules: dict[AdaptableLayer, dict[int, str]] = {layer: {} for layer in self._layers}
        for module, (layer, part) in self._matrices.items():
            modules[layer][part] = module
        return modules

    def _load(self, slot: int, number: int) -> None:
        weights, changed = self._weights[number], set(self._weights[number].modules)
        self._in_slot[slot] = None
        for layer, modules in self._modules.items():
            names = [modules[part] for part in sorted(modules)]
            layer.put_adapter(slot, [LowRankUpdate(*weights.read(name)) if name in changed else None for name in names])
            self.beat()
        self._in_slot[slot] = number

    def _check(self, weights: AdapterWeights) -> None:
        folder = weights.folder
        if weights.max_rank > self.max_rank:
            raise StartError(
                f"{folder} has rank {weights.max_rank}, and there is memory for {self.max_rank}: start with "
                f"--max-lora-rank {weights.max_rank}"
            )
        for module in weights.modules:
            self._check_place(weights, module)
            layer, part = self._matrices[module]
            (a, b), (outputs, inputs) = weights.shapes(module), layer.matrix_shape(part)
            if a[0] != b[1] or (b[0], a[1]) != (outputs, inputs):
                raise StartError(
                    f"{folder} changes {module} by B {list(b)} and A {list(a)}, the model has {[outputs, inputs]}: "
                    f"they do not belong together, {weights.fix}"
                )
            tensors = weights.read(module)[:2]
            if not all(tensor.isfinite().all() for tensor in tensors):
                raise StartError(f"{folder} has NaN or infinite values for {module}: fetch the adapter again")
            if not all(tensor.to(self._dtype).isfinite().all() for tensor in tensors):
                raise StartError(
                    f"{folder} has numbers for {module} that {self._dtype} can't hold: start with --dtype bfloat16"
                )
            self.beat()
        weights.refuse_changed_copies(self._base, self.beat)

    def _check_place(self, weights: AdapterWeights, module: str) -> None:
        """Raise StartError for a change of what has no memory for any."""
        if module in self._left_out:
            raise StartError(
                f"{weights.folder} changes {module}, and experts have no memory for adapters: name one that changes "
                "experts in --lora-adapters, so that the start makes place for all of them"
            )
        if module not in self._known:
            raise StartError(f"{weights.folder} changes {module}, which the model does not have: {weights.fix}")
        if weights.is_of_embeddings(module) or module not in self._matrices:
            raise StartError(
                f"{weights.folder} changes {module}, and beside the model only the matrices of its layers can be "
                "changed: give the adapter as --model-id, which merges it, or merge it with `peft`"
            )


def adaptable_matrices(model: CausalLM) -> dict[str, tuple[AdaptableLayer, int]]:
    """The matrices of the layers, by their names in checkpoints: all but the output head."""
    layers = model.checkpoint_layers()
    return {
        name: (layer, part)
        for name, (layer, part) in layers.items()
        if isinstance(layer, AdaptableLayer) and layer is not model.lm_head
    }
