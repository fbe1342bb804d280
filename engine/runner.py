"""ModelRunner: a scheduled batch -> logits. Owns the model, the KV memory and the attention backend."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from engine.adapters import AdapterSlots
from engine.attention import ATTENTION_BACKENDS
from engine.attention.base import AttentionBackend, AttentionShape, LayerCache, RepeatableStep
from engine.device import Device
from engine.graphs import GraphLimits, StepGraphs, capture_graphs, graph_bytes
from engine.layers.base import Rotation
from engine.link.progress import StartProgress
from engine.link.registry import import_entry
from engine.models.base import CausalLM, RowSelection
from engine.scheduling.batch import ScheduledBatch
from engine.step_buffers import StepBuffers, StepTensors
from engine.step_inputs import StepInputs, step_inputs
from quant.kernels.transfer import HostCopy

if TYPE_CHECKING:
    from engine.programs import StepPrograms

logger = logging.getLogger(__name__)

SCORED_ROWS = 64
"""Rows of logits that exist at a time to score a prompt: 40 MB with a vocabulary of 152k, and as quick as more."""

NO_SCORES = HostCopy(torch.empty(0))


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computes, still on the device; nothing on other ranks than 0."""

    logits: torch.Tensor
    """[batch.num_rows, vocab_size] float32 of the tokens that get a successor. The next step may write over them."""
    scores: Sequence[torch.Tensor] = ()
    """Log-probabilities of the tokens that `ScheduledSequence.num_scored_tokens` counts, sequence after sequence, in
    pieces [tokens, 1 + has_prompt_ranks + 2 * num_prompt_top_tokens] float32: the token's own, its rank, then ids of
    the likeliest tokens, then theirs. A rank and an id are exact in float32."""

    def copy_scores(self) -> HostCopy:
        """Start the copy of all scores to the host: call it once, after the ids are sampled."""
        return HostCopy(torch.cat(list(self.scores)).flatten()) if self.scores else NO_SCORES


class ModelRunner:
    """Runs steps of one model."""

    def __init__(self, model: CausalLM, device: Device, adapters: AdapterSlots | None = None) -> None:
        """`adapters` None: no step has any."""
        self._model = model
        self.adapters = adapters
        self._device = device
        self._attention = _attention_backend(device.attention, model.attention_shape)
        self._buffers = StepBuffers(device.torch_device, self.block_size)
        self._graphs: dict[bool, StepGraphs] = {}
        """By whether any of a step's rows has an adapter."""
        self._refusals: list[str] = []
        self._programs = _step_programs() if device.repeats_calls and model.num_ranks == 1 else None
        self._caches: list[LayerCache] = []
        self._num_blocks = 0

    @property
    def block_size(self) -> int:
        """Tokens in a block of KV memory."""
        return self._attention.block_size

    def kv_bytes_per_block(self, dtype: torch.dtype) -> int:
        """Memory of one block in all layers."""
        return self._model.num_layers * self._attention.block_bytes(dtype)

    def graph_bytes(self, limits: GraphLimits, activation_bytes_per_row: int) -> int:
        """Memory that graphs take, beside what a step takes anyway; 0 where there are none."""
        if self.why_no_graphs():
            return 0
        return len(self._graph_kinds) * graph_bytes(
            limits,
            self._attention,
            activation_bytes_per_row=activation_bytes_per_row,
            max_inputs=self._model.max_inputs,
            vocab_size=self._model.vocab_size,
        )

    def program_bytes(self, activation_bytes_per_row: int, max_rows: int | None) -> int:
        """Activations and logits that programs keep, of steps of up to `max_rows` (None: any); 0: there are none."""
        if self._programs is None:
            return 0
        num_rows = min(self._programs.max_rows, max_rows or self._programs.max_rows)
        num_results = min(num_rows, self._programs.max_results)
        logits_row = torch.float32.itemsize * self._model.vocab_size
        # Steps whose rows all have results have arrays of their own.
        return (num_rows + num_results) * activation_bytes_per_row + num_results * logits_row

    def allocate(self, num_blocks: int, dtype: torch.dtype, *, num_positions: int) -> None:
        """Memory for `num_blocks` blocks of KV in `dtype`, and for rotating positions below `num_positions`."""
        device = self._device.torch_device
        self._num_blocks = num_blocks
        self._caches = [self._attention.allocate(num_blocks, dtype, device) for _ in range(self._model.num_layers)]
        self._model.use_attention(self._attention, self._caches)
        if self._programs is not None:
            self._programs.clear()
        self._model.rotary.allocate(num_positions)

    @property
    def cache_tensors(self) -> list[torch.Tensor]:
        """The keys and the values of every layer, whose memory nobody may have written yet."""
        return [tensor for cache in self._caches for tensor in (cache.keys, cache.values)]

    @property
    def _graph_kinds(self) -> Sequence[bool]:
        """The keys of the graphs that are captured."""
        has_both = self.adapters is not None and not self.adapters.is_host_driven
        return (False, True) if has_both else (False,)

    def why_no_graphs(self) -> list[str]:
        """Reasons why this model's steps can't run as graphs here; empty if they can."""
        reasons = [] if self._device.make_recorder else ["the device has none"]
        if not self._attention.max_captured_tokens:
            reasons.append("attention does other launches for other sequences")
        if self._model.rotary.is_prompt_dependent:
            reasons.append("dynamic rope scaling makes tables while a step runs")
        if self._model.num_ranks > 1 and not self._device.has_graph_collectives:
            reasons.append("what the shards send each other can't be captured")
        reasons += self._model.why_no_graphs()
        return reasons + [refusal for refusal in self._refusals if refusal not in reasons]

    def refuse_graphs(self, reasons: Sequence[str]) -> None:
        """Have no graphs where there are reasons against them on any rank: all ranks must run a step alike."""
        self._refusals = list(reasons)

    @torch.inference_mode()
    def capture(self, limits: GraphLimits, progress: StartProgress | None = None) -> None:
        """Capture graphs, if nothing speaks against it and `limits` has buckets. All ranks do so together.

        Raises StartError for a graph that can't be captured.
        """
        make_recorder = self._device.make_recorder
        if make_recorder is None or not limits.buckets or self.why_no_graphs():
            return
        recorder = make_recorder()
        for has_adapters in self._graph_kinds:
            if has_adapters:
                assert self.adapters is not None
                self.adapters.rows.keep(limits.buckets[0])
            compute = self._compute_adapted if has_adapters else self._compute_all
            self._graphs[has_adapters] = capture_graphs(
                recorder, compute, self._attention, limits, self._device.torch_device, progress
            )

    def describe_graphs(self) -> str | None:
        """A line for the summary of the start; None on a device that has no graphs anyway."""
        if self._graphs:
            with_adapters = ", and as many with adapters" if True in self._graphs else ""
            return self._graphs[False].describe() + with_adapters
        if self._device.make_recorder is None:
            return None
        return f"No graphs: {'; '.join(self.why_no_graphs()) or '--cuda-graphs 0'}"

    def execute(self, batch: ScheduledBatch, last_token_ids: torch.Tensor | None = None) -> StepResult:
        """Compute a step. Nothing is read back from the device.

        `last_token_ids` [rows], on the device, are what the step before chose, if the batch has unknown tokens.
        """
        return self.run(self.inputs(batch), last_token_ids)

    def inputs(self, batch: ScheduledBatch) -> StepInputs:
        """What `run` needs to know of a scheduled batch."""
        return step_inputs(batch)

    def run(self, inputs: StepInputs, last_token_ids: torch.Tensor | None = None) -> StepResult:
        """The step of `inputs`. Ranks other than 0 make the same calls and have no rows."""
        if self.adapters is not None:
            needed = inputs.logits_indices if inputs.is_selecting else None
            self.adapters.begin_step(inputs.adapters, inputs.adapter_slots, inputs.query_start_loc, needed)
        if self._programs is None or inputs.block_copies or inputs.scored_indices:
            return self._run(inputs, last_token_ids)
        return StepResult(self._run_repeatable(inputs, last_token_ids, self._programs))

    @torch.inference_mode()
    def _run(self, inputs: StepInputs, last_token_ids: torch.Tensor | None) -> StepResult:
        """Any step, call by call or by a graph."""
        if inputs.block_copies:
            self._copy_blocks(inputs.block_copies)
        work_items = self._work_items(inputs)
        graphs = self._graphs.get(bool(inputs.adapters))
        if graphs is not None and (logits := graphs.run(inputs, work_items, last_token_ids)) is not None:
            return StepResult(logits)
        tensors = self._buffers.fill(inputs, work_items, last_token_ids)
        selection = self._selection(inputs, tensors)
        hidden = self._model.forward(tensors.input_ids, *self._prepare(inputs, tensors), selection)
        # Where tokens are scored the last layer had all rows.
        with_logits = hidden[tensors.logits_indices] if inputs.scored_indices else hidden
        return StepResult(self._model.compute_logits(with_logits), self._score(hidden, tensors, inputs))

    def _selection(self, inputs: StepInputs, tensors: StepTensors) -> RowSelection | None:
        """The rows that the last layer goes on with; None: all."""
        return RowSelection(tensors.logits_indices, self._narrow) if inputs.is_selecting else None

    def _narrow(self) -> None:
        """From here on a step has those rows alone that get logits."""
        if self.adapters is not None:
            self.adapters.rows.narrow()
        if self._programs is not None:
            self._programs.narrow()

    def _run_repeatable(
        self, inputs: StepInputs, last_token_ids: torch.Tensor | None, programs: StepPrograms
    ) -> torch.Tensor:
        """Logits of a step. Between kernels nothing of torch is called where the step's calls are a program already."""
        tensors = self._buffers.fill(inputs, self._work_items(inputs), last_token_ids)
        rotation, prepared = self._prepare(inputs, tensors)
        selection = self._selection(inputs, tensors)
        if not isinstance(prepared, RepeatableStep):
            return self._compute(tensors, rotation, prepared, selection)
        num_rows = len(inputs.input_ids), len(inputs.logits_indices)
        has_adapters = bool(inputs.adapters)
        parameters = [tensors.input_ids, rotation.table.cos, rotation.table.sin, rotation.rows, *prepared.tensors]
        if selection is not None:
            parameters.append(selection.rows)
        if has_adapters and self.adapters is not None:
            parameters += self.adapters.rows.tensors
        return programs.run(
            (prepared.variant, has_adapters),
            num_rows,
            parameters,
            lambda: self._compute(tensors, rotation, prepared, selection),
        )

    def _work_items(self, inputs: StepInputs) -> npt.NDArray[np.int32]:
        return self._attention.work_items(inputs.query_start_loc, inputs.seq_lens, inputs.table_width)

    def _prepare(self, inputs: StepInputs, tensors: StepTensors) -> tuple[Rotation, Any]:
        """What `forward` needs beside the tokens."""
        lengths = inputs.query_start_loc, inputs.seq_lens, inputs.prompt_lens
        return self._model.rotary.prepare(tensors.positions, *lengths), self._attention.prepare(tensors.attention)

    @torch.inference_mode()
    def _compute(
        self, tensors: StepTensors, rotation: Rotation, prepared: Any, selection: RowSelection | None = None
    ) -> torch.Tensor:
        """Logits of the tokens in `selection`; None: of all tokens of a step."""
        return self._model.compute_logits(self._model.forward(tensors.input_ids, rotation, prepared, selection))

    def _copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        sources, targets = torch.tensor(copies, device=self._device.torch_device).unbind(1)
        for cache in self._caches:
            cache.copy_blocks(sources, targets, self._num_blocks)

    def _compute_all(self, tensors: StepTensors) -> torch.Tensor:
        """Logits of all tokens of a step, by the device alone."""
        rotation = self._model.rotary.prepare(tensors.positions, (), (), ())
        return self._compute(tensors, rotation, self._attention.prepare(tensors.attention))

    def _compute_adapted(self, tensors: StepTensors) -> torch.Tensor:
        """The same with the adapters of the step's rows."""
        assert self.adapters is not None
        self.adapters.rows.select(len(tensors.input_ids))
        return self._compute_all(tensors)

    def _score(self, hidden: torch.Tensor, tensors: StepTensors, inputs: StepInputs) -> list[torch.Tensor]:
        """The scores of the scored tokens after their rows of hidden [num_tokens, hidden_size]."""
        scores = []
        for first in range(0, len(tensors.scored_indices), SCORED_ROWS):
            part = slice(first, first + SCORED_ROWS)
            logits = self._model.compute_logits(hidden[tensors.scored_indices[part]])
            if len(logits):
                ids, num_top = tensors.scored_token_ids[part], inputs.num_scored_top_tokens
                scores.append(_scores(logits, ids, num_top, has_ranks=inputs.has_scored_ranks))
        return scores


def _step_programs() -> StepPrograms:
    from engine.programs import StepPrograms  # with Numba's compiler, which a GPU does without

    return StepPrograms()


def _attention_backend(name: str, shape: AttentionShape) -> AttentionBackend:
    """The backend with its best block size, or the reference implementation where it can't serve the model."""
    backend = import_entry(ATTENTION_BACKENDS, name, "attention backend")
    if reasons := backend.why_not(shape):
        logger.info("Attention falls back to plain torch: %s", "; ".join(reasons))
        backend = import_entry(ATTENTION_BACKENDS, "torch", "attention backend")
    chosen: type[AttentionBackend] = backend
    return chosen(shape, chosen.block_sizes[0])


def _scores(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, *, has_ranks: bool) -> torch.Tensor:
    """A piece of `StepResult.scores`: logits [rows, vocab_size], token_ids [rows] -> float32 [rows, columns]."""
    total = logits.logsumexp(dim=1, keepdim=True)
    own = logits.gather(1, token_ids.unsqueeze(1))
    columns = [own - total]
    if has_ranks:
        columns.append((logits >= own).sum(dim=1, keepdim=True).to(own.dtype))
    if num_top:
        best, best_ids = logits.topk(num_top, dim=1)
        columns += [best_ids.to(own.dtype), best - total]
    return torch.cat(columns, dim=1)
