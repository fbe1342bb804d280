"""The blocks of decoders: attention, gated MLP, the layer around them, and the whole with vocabulary and head.

A family is its reading of config.json and its differences: it subclasses `DecoderForCausalLM`, and a block of which it
has a kind of its own. Tensors are named here as the checkpoints name them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from engine.attention.base import AttentionBackend, AttentionShape, LayerCache
from engine.layers.base import Rotation
from engine.layers.norm import RMSNorm
from engine.layers.rope import Rotary
from engine.models.base import CheckpointLayers, ModelContext, RowSelection
from engine.models.config import DecoderConfig
from parallel.embedding import VocabTable
from parallel.linear import ColumnParallelLinear, RowParallelLinear, input_units
from parallel.partition import HeadShard, lengths, scaled, split_features, split_heads, split_rows

UNUSED = (
    ".rotary_emb.inv_freq",
    ".self_attn.kv_scale",
    ".self_attn.q_scale",
    ".self_attn.k_scale",
    ".self_attn.v_scale",
    ".self_attn.q_proj.output_scale",
    ".self_attn.k_proj.output_scale",
    ".self_attn.v_proj.output_scale",
    ".self_attn.prob_output_scale",
)
"""Ends of the names of tensors that are not needed: rotary frequencies that old versions of `transformers` stored, and
scales with which other servers compute attention, or keep keys and values, in 8 bits."""


class Attention:
    """Queries, keys and values with rotary positions, attention over them, and the projection of its output."""

    def __init__(
        self, name: str, config: DecoderConfig, shards: Sequence[HeadShard], window: int | None, context: ModelContext
    ) -> None:
        """`name` is the block's prefix in the checkpoint, `shards` are the heads of each rank."""
        rank = context.parallel.rank
        heads = [scaled(shard.heads, config.head_dim) for shard in shards]
        kv_heads = [scaled(shard.kv_heads, config.head_dim) for shard in shards]
        self._ops = context.ops
        self._window = window
        self._num_rotated_heads = shards[rank].num_heads + shards[rank].num_kv_heads
        self.qkv_proj = column_parallel(
            [f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"],
            config.hidden_size,
            [heads[-1].stop, kv_heads[-1].stop, kv_heads[-1].stop],
            [heads[rank], kv_heads[rank], kv_heads[rank]],
            context,
            has_bias=config.has_qkv_bias,
        )
        self.o_proj = row_parallel(
            f"{name}.o_proj", heads, config.hidden_size, context, has_bias=config.has_output_bias
        )

    def checkpoint_layers(self) -> CheckpointLayers:
        return {
            "q_proj": (self.qkv_proj, 0),
            "k_proj": (self.qkv_proj, 1),
            "v_proj": (self.qkv_proj, 2),
            "o_proj": (self.o_proj, 0),
        }

    def position(self, qkv: torch.Tensor, rotation: Rotation, backend: AttentionBackend) -> Rotation | None:
        """Make queries and keys ready for attention, in place: qkv [tokens, (heads + 2 * kv_heads) * head_dim].

        Returns the rotation if that is left to the backend. A family that norms queries and keys does so here, before
        it calls this.
        """
        if backend.has_rotation:
            return rotation
        self._ops.rotate(qkv, rotation, self._num_rotated_heads)
        return None

    def attend(
        self, x: torch.Tensor, rotation: Rotation, backend: AttentionBackend, cache: LayerCache, prepared: Any
    ) -> torch.Tensor:
        """x [tokens, hidden_size] -> what `o_proj` takes, [tokens, heads * head_dim]"""
        qkv = self.qkv_proj(x)
        rotation_left = self.position(qkv, rotation, backend)
        return backend.forward(qkv, cache, prepared, self._window, rotation_left)


class FeedForward(Protocol):
    """The block behind attention."""

    def checkpoint_layers(self) -> CheckpointLayers: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden_size] -> [tokens, hidden_size]"""


class GatedMLP:
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, name: str, config: DecoderConfig, context: ModelContext) -> None:
        """`name` is the block's prefix in the checkpoint."""
        inner, hidden, parallel = config.intermediate_size, config.hidden_size, context.parallel
        units = input_units(context.quantization.method_for(f"{name}.down_proj"), inner, hidden)
        shards = split_features(inner, parallel.size, units)
        self._ops = context.ops
        self.gate_up_proj = column_parallel(
            [f"{name}.gate_proj", f"{name}.up_proj"],
            hidden,
            [inner, inner],
            [shards[parallel.rank]] * 2,
            context,
            is_gated=True,
        )
        self.down_proj = row_parallel(f"{name}.down_proj", shards, hidden, context)

    def checkpoint_layers(self) -> CheckpointLayers:
        return {
            "gate_proj": (self.gate_up_proj, 0),
            "up_proj": (self.gate_up_proj, 1),
            "down_proj": (self.down_proj, 0),
        }

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden_size] -> [tokens, hidden_size]"""
        return self.down_proj(self.gate_up_proj.gated(x, self._ops.silu_and_mul, self.down_proj.only_reader))


class DecoderLayer:
    """A norm before attention and one before the MLP."""

    def __init__(self, attention: Attention, mlp: FeedForward, config: DecoderConfig, context: ModelContext) -> None:
        self._ops = context.ops
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, context.activation_dtype)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, context.activation_dtype)
        self.mlp = mlp

    def checkpoint_layers(self) -> CheckpointLayers:
        return {
            "input_layernorm": (self.input_layernorm, 0),
            **prefixed("self_attn", self.self_attn.checkpoint_layers()),
            "post_attention_layernorm": (self.post_attention_layernorm, 0),
            **prefixed("mlp", self.mlp.checkpoint_layers()),
        }

    def __call__(
        self,
        residual: torch.Tensor,
        x: torch.Tensor | None,
        rotation: Rotation,
        backend: AttentionBackend,
        cache: LayerCache,
        prepared: Any,
        selection: RowSelection | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """residual, x [tokens, hidden_size] -> both [rows, hidden_size], of the rows in `selection`, or of all.

        x is the previous layer's output, not yet added to the residual; None for the first layer. This layer's own
        output is not added either. The residual is updated in place.
        """
        ops, norm = self._ops, self.input_layernorm
        if x is None:
            x = ops.rms_norm(residual, norm.weight, norm.eps)
        else:
            x = ops.add_rms_norm(residual, x, norm.weight, norm.eps)
        attended = self.self_attn.attend(x, rotation, backend, cache, prepared)
        if selection is not None:
            if not len(selection.rows):  # no prompt ends in this step: all ranks see that, so none waits for another
                return residual[:0], residual[:0]
            selection.narrow()
            attended, residual = ops.take_rows(attended, selection.rows), ops.take_rows(residual, selection.rows)
        x, norm = self.self_attn.o_proj(attended), self.post_attention_layernorm
        return residual, self.mlp(ops.add_rms_norm(residual, x, norm.weight, norm.eps))


class DecoderForCausalLM:
    """A pre-norm decoder; implements `engine.models.base.CausalLM` but for reading config.json."""

    attention_class: type[Attention] = Attention
    """A family whose attention differs names its subclass here."""

    def __init__(self, config: DecoderConfig, rotary: Rotary, context: ModelContext) -> None:
        """Raises SplitError for a model that can't be cut for so many ranks."""
        self._context = context
        self.vocab_size = config.vocab_size
        self.num_layers = len(config.windows)
        self.max_position_embeddings = config.max_position_embeddings
        self.rotary = rotary
        parallel = context.parallel
        self.num_ranks = parallel.size
        shards = split_heads(config.num_attention_heads, config.num_key_value_heads, parallel.size)
        rank_heads = shards[parallel.rank]
        self._shape = AttentionShape(rank_heads.num_heads, rank_heads.num_kv_heads, config.head_dim)
        self.activations_per_token = _activations_per_token(config, self._shape, parallel.size)
        self.max_inputs = max(
            config.hidden_size,
            -(-config.intermediate_size // parallel.size),
            self._shape.num_heads * config.head_dim,
        )
        rows = split_rows(config.vocab_size, parallel.size)
        self._logits_widths = lengths(rows)
        self.embed_tokens = vocab_table(rows, config, context)
        self.layers = [
            self.make_layer(index, config, shards, window, context) for index, window in enumerate(config.windows)
        ]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, context.activation_dtype)
        self._is_tied = config.is_tied
        self.lm_head: VocabTable | ColumnParallelLinear = (
            self.embed_tokens if config.is_tied else untied_head("lm_head", rows, config, context)
        )

    @property
    def attention_shape(self) -> AttentionShape:
        """This rank's, once weights are loaded: attention may round where the matrices before it in every layer do."""
        is_rounded = all(layer.self_attn.qkv_proj.is_rounding for layer in self.layers)
        return dataclasses.replace(self._shape, is_rounded=is_rounded)

    def make_layer(
        self, index: int, config: DecoderConfig, shards: Sequence[HeadShard], window: int | None, context: ModelContext
    ) -> DecoderLayer:
        name = f"model.layers.{index}"
        attention = self.attention_class(f"{name}.self_attn", config, shards, window, context)
        return DecoderLayer(attention, self.make_mlp(index, f"{name}.mlp", config, context), config, context)

    def make_mlp(self, index: int, name: str, config: DecoderConfig, context: ModelContext) -> FeedForward:
        """The second block of layer `index`, whose prefix in the checkpoint is `name`."""
        return GatedMLP(name, config, context)

    def checkpoint_layers(self) -> CheckpointLayers:
        layers: CheckpointLayers = {"model.embed_tokens": (self.embed_tokens, 0), "model.norm": (self.norm, 0)}
        if isinstance(self.lm_head, ColumnParallelLinear):
            layers["lm_head"] = (self.lm_head, 0)
        for index, layer in enumerate(self.layers):
            layers |= prefixed(f"model.layers.{index}", layer.checkpoint_layers())
        return layers

    def is_ignored(self, name: str) -> bool:
        """A copy of the tied table, and what `UNUSED` names."""
        return (self._is_tied and name == "lm_head.weight") or name.endswith(UNUSED)

    def why_no_graphs(self) -> list[str]:
        return []

    def use_attention(self, backend: AttentionBackend, caches: list[LayerCache]) -> None:
        self._attention = backend
        self._caches = caches

    def forward(
        self, input_ids: torch.Tensor, rotation: Rotation, prepared: Any, selection: RowSelection | None = None
    ) -> torch.Tensor:
        ops, table = self._context.ops, self.embed_tokens
        dtype = self._context.activation_dtype
        residual = table.embed(input_ids, dtype) if self.num_ranks > 1 else ops.look_up(table.weight, input_ids, dtype)
        x = None
        # The last layer's keys, values and attention are of all tokens; what follows is needed for some of them.
        selections = [*[None] * (self.num_layers - 1), selection]
        for layer, cache, layer_selection in zip(self.layers, self._caches, selections, strict=True):
            residual, x = layer(residual, x, rotation, self._attention, cache, prepared, layer_selection)
        assert x is not None, "a decoder has layers"
        return ops.add(residual, x) if len(residual) else residual  # without rows both are one empty view

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._context.ops.rms_norm(hidden, self.norm.weight, self.norm.eps)
        return self._context.parallel.gather(self.lm_head(normed).to(torch.float32), self._logits_widths)


def _activations_per_token(config: DecoderConfig, shape: AttentionShape, num_shards: int) -> int:
    """Numbers that one rank holds at the peak of a layer."""
    residual_input_output_normed = 4 * config.hidden_size
    qkv_and_attended = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    gate_up_and_product = 3 * -(-config.intermediate_size // num_shards)
    return residual_input_output_normed + qkv_and_attended + gate_up_and_product


def column_parallel(
    names: Sequence[str],
    in_features: int,
    out_features: Sequence[int],
    outputs: Sequence[slice],
    context: ModelContext,
    *,
    has_bias: bool = False,
    is_gated: bool = False,
) -> ColumnParallelLinear:
    """The checkpoint's matrices `names` side by side, `outputs` of each; each in the form that the checkpoint has.

    `is_gated`: the first of two has the gates of the second (`ColumnParallelLinear.gated`).
    """
    return ColumnParallelLinear(
        in_features,
        out_features,
        has_bias=has_bias,
        methods=[context.quantization.method_for(name) for name in names],
        outputs=outputs,
        is_gated=is_gated,
        kernels=context.quantization.kernel_for,
        parallel=context.parallel,
    )


def row_parallel(
    name: str, inputs: Sequence[slice], out_features: int, context: ModelContext, *, has_bias: bool = False
) -> RowParallelLinear:
    """The checkpoint's matrix `name`; `inputs` are those of each rank."""
    quantization = context.quantization
    return RowParallelLinear(
        inputs,
        out_features,
        has_bias=has_bias,
        method=quantization.method_for(name),
        is_gathered=bool(quantization.roundings),
        kernels=quantization.kernel_for,
        parallel=context.parallel,
    )


def vocab_table(rows: Sequence[slice], config: DecoderConfig, context: ModelContext) -> VocabTable:
    """The table of embeddings, which is the head as well in a tied model; `rows` are those of each rank."""
    quantization = context.quantization
    head = quantization.head if config.is_tied else None
    return VocabTable(
        rows, config.hidden_size, quantization.dense, head, quantization.head_kernel_for, context.parallel
    )


def untied_head(name: str, rows: Sequence[slice], config: DecoderConfig, context: ModelContext) -> ColumnParallelLinear:
    """The checkpoint's matrix `name` as output head; `rows` of the vocabulary are those of each rank."""
    return ColumnParallelLinear(
        config.hidden_size,
        (config.vocab_size,),
        has_bias=False,
        methods=[context.quantization.head_method_for(name)],
        outputs=[rows[context.parallel.rank]],
        kernels=context.quantization.head_kernel_for,
        parallel=context.parallel,
    )


def prefixed(prefix: str, layers: CheckpointLayers) -> CheckpointLayers:
    return {f"{prefix}.{name}": target for name, target in layers.items()}
