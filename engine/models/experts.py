"""Mixtures of experts: blocks in which a router sends each token to a few experts, and perhaps one has all tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from engine.layers.rope import Rotary
from engine.link.errors import StartError
from engine.models.base import CheckpointLayers, ModelContext
from engine.models.blocks import DecoderForCausalLM, FeedForward, GatedMLP, column_parallel, prefixed, row_parallel
from engine.models.config import MAX_SIZES, DecoderConfig, is_whole
from parallel.experts import ExpertMatrices, RowParallelExperts, numbered
from parallel.linear import ColumnParallelLinear, input_units
from parallel.partition import split_features

MAX_EXPERTS = 2**16
"""Experts of all layers together: each takes kilobytes before any weight is read. The largest models have 25,000."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertConfig:
    """The numbers of a model's experts."""

    num_experts: int
    top_k: int
    """Experts of each token."""
    intermediate_size: int
    """The inner features of one expert."""
    shared_size: int | None
    """The inner features of the expert that has all tokens; None: there is none."""
    is_normalized: bool
    """Whether the weights of a token's experts add up to one."""
    sparse_layers: frozenset[int]
    """The layers that have experts; the others have one block for all tokens."""


def read_expert_config(
    config: Mapping[str, Any], *, has_shared_expert: bool, num_tensors: int | None = None
) -> ExpertConfig:
    """Read a config.json that `check_sizes` has let through, of a checkpoint with so many tensors. Raises StartError.

    `num_tensors` None: that is not known.
    """
    num_experts = config.get("num_experts")
    values = {**config, "num_experts": config.get("num_local_experts") if num_experts is None else num_experts}
    max_sizes = {
        "num_experts": MAX_EXPERTS,
        "num_experts_per_tok": values["num_experts"],
        "moe_intermediate_size": MAX_SIZES["intermediate_size"],
    }
    if has_shared_expert:
        max_sizes["shared_expert_intermediate_size"] = MAX_SIZES["intermediate_size"]
    for key, max_size in max_sizes.items():
        if not is_whole(values.get(key), 1, max_size):
            raise StartError(f"{key} {values.get(key)!r} in config.json is not a size: fetch the model again")
    sparse_layers = _sparse_layers(config)
    if values["num_experts"] * len(sparse_layers) > MAX_EXPERTS:
        raise StartError(
            f"num_experts {values['num_experts']} in config.json, in each of {len(sparse_layers)} layers, is more than "
            "any model has: fetch the model again"
        )
    if num_tensors is not None and values["num_experts"] * len(sparse_layers) > num_tensors:
        raise StartError(
            f"num_experts {values['num_experts']} in config.json, in each of {len(sparse_layers)} layers, is more than "
            f"the checkpoint's {num_tensors} tensors have: fetch the model again"
        )
    return ExpertConfig(
        num_experts=values["num_experts"],
        top_k=values["num_experts_per_tok"],
        intermediate_size=values["moe_intermediate_size"],
        shared_size=values["shared_expert_intermediate_size"] if has_shared_expert else None,
        is_normalized=bool(config.get("norm_topk_prob")),
        sparse_layers=sparse_layers,
    )


def _sparse_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """Every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    num_layers, step = config["num_hidden_layers"], config.get("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if not is_whole(step, 1, MAX_SIZES["num_hidden_layers"]):
        raise StartError(f"decoder_sparse_step {step!r} in config.json is not a number of layers: correct it")
    if not isinstance(dense, list) or not all(is_whole(index, 0, num_layers - 1) for index in dense):
        raise StartError(f"mlp_only_layers {dense!r} in config.json are not numbers of layers: correct it")
    return frozenset(range(step - 1, num_layers, step)) - frozenset(dense)


class SparseMLP:
    """Experts that are each a `GatedMLP`, mixed by the router's probabilities, and the shared one by a gate."""

    def __init__(self, name: str, config: DecoderConfig, experts: ExpertConfig, context: ModelContext) -> None:
        """`name` is the block's prefix in the checkpoint."""
        self._ops = context.ops
        self._experts = experts
        self.router = _router(name, config, experts, context)
        self.gate_up_proj, self.down_proj = _expert_matrices(f"{name}.experts", config, experts, context)
        self.shared_expert: GatedMLP | None = None
        if experts.shared_size is not None:
            shared = dataclasses.replace(config, intermediate_size=experts.shared_size)
            self.shared_expert = GatedMLP(f"{name}.shared_expert", shared, context)

    def checkpoint_layers(self) -> CheckpointLayers:
        num_experts = self._experts.num_experts
        gate_up = {name: (self.gate_up_proj, part) for name, part in numbered(num_experts, ("gate_proj", "up_proj"))}
        down = {name: (self.down_proj, part) for name, part in numbered(num_experts, ("down_proj",))}
        layers: CheckpointLayers = {"gate": (self.router, 0), **prefixed("experts", {**gate_up, **down})}
        if self.shared_expert is not None:
            layers["shared_expert_gate"] = (self.router, 1)
            layers |= prefixed("shared_expert", self.shared_expert.checkpoint_layers())
        return layers

    @property
    def is_host_driven(self) -> bool:
        """Whether the host reads how many rows each expert has."""
        return self.gate_up_proj.is_host_driven or self.down_proj.is_host_driven

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden_size] -> [tokens, hidden_size]"""
        ops, experts = self._ops, self._experts
        logits = self.router(x)
        routing = ops.route(logits, experts.num_experts, experts.top_k, is_normalized=experts.is_normalized)
        inner = ops.silu_and_mul(self.gate_up_proj(ops.take_rows(x, routing.groups.sources), routing.groups))
        mixed = self.down_proj.mixed(inner, routing.groups, lambda outputs: ops.mix(outputs, routing))
        if self.shared_expert is None:
            return mixed
        return ops.add_gated(mixed, self.shared_expert(x), logits, experts.num_experts)


def _router(name: str, config: DecoderConfig, experts: ExpertConfig, context: ModelContext) -> ColumnParallelLinear:
    """The router and the gate of the shared expert side by side. They are small, and never quantised on load."""
    names, sizes = [f"{name}.gate"], [experts.num_experts]
    if experts.shared_size is not None:
        names, sizes = [*names, f"{name}.shared_expert_gate"], [*sizes, 1]
    quantization = context.quantization
    return ColumnParallelLinear(
        config.hidden_size,
        sizes,
        has_bias=False,
        methods=[quantization.quantized_method(each) or quantization.dense for each in names],
        outputs=[slice(0, size) for size in sizes],
        kernels=quantization.kernel_for,
        parallel=context.parallel,
    )


def _expert_matrices(
    name: str, config: DecoderConfig, experts: ExpertConfig, context: ModelContext
) -> tuple[ExpertMatrices, RowParallelExperts]:
    """The matrices that make the inner features of all experts, and those that take them."""
    inner, hidden, parallel = experts.intermediate_size, config.hidden_size, context.parallel
    units = input_units(context.quantization.method_for(f"{name}.0.down_proj"), inner, hidden)
    shards = split_features(inner, parallel.size, units)
    outputs = [shards[parallel.rank]] * 2
    prefixes = [f"{name}.{expert}" for expert in range(experts.num_experts)]
    gate_up = [
        column_parallel([f"{prefix}.gate_proj", f"{prefix}.up_proj"], hidden, [inner, inner], outputs, context)
        for prefix in prefixes
    ]
    down = [row_parallel(f"{prefix}.down_proj", shards, hidden, context) for prefix in prefixes]
    kernels = context.quantization.grouped_kernel_for
    return ExpertMatrices(gate_up, 2, kernels), RowParallelExperts(down, parallel, kernels)


class SparseDecoderForCausalLM(DecoderForCausalLM):
    """A decoder some of whose layers have experts."""

    def __init__(self, config: DecoderConfig, experts: ExpertConfig, rotary: Rotary, context: ModelContext) -> None:
        """Raises SplitError for a model that can't be cut for so many ranks."""
        self._experts = experts
        super().__init__(config, rotary, context)
        inner = 3 * -(-experts.intermediate_size // context.parallel.size)
        self.activations_per_token += experts.top_k * (2 * config.hidden_size + inner)

    def make_mlp(self, index: int, name: str, config: DecoderConfig, context: ModelContext) -> FeedForward:
        if index not in self._experts.sparse_layers:
            return super().make_mlp(index, name, config, context)
        return SparseMLP(name, config, self._experts, context)

    def why_no_graphs(self) -> list[str]:
        blocks = [layer.mlp for layer in self.layers if isinstance(layer.mlp, SparseMLP)]
        is_host_driven = any(block.is_host_driven for block in blocks)
        return ["the host reads how many rows each expert has"] if is_host_driven else []
