"""The whole model with random weights of Qwen2-7B's shapes: decode, drafts, prompts, and the engine's loop."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from array import array
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import floors
from benchmarks.gpu_proof.card import Ceilings, read_ceilings
from benchmarks.gpu_proof.clock import host_seconds
from benchmarks.gpu_proof.inputs import Inputs
from benchmarks.gpu_proof.loop import time_loop
from benchmarks.gpu_proof.models import QWEN2_7B, SINGLE_LAYER, make_runner, random_model
from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.settings import Settings
from benchmarks.gpu_proof.weights import FORMS
from engine.device import DTYPES
from engine.graphs import GraphLimits
from engine.link.messages import GenerationRequest
from engine.models.base import CausalLM
from engine.runner import ModelRunner
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.sequence import Sequence

MODELS: dict[str, tuple[str, str, floors.Form, floors.Form]] = {
    "16 bits": ("dense", "dense", floors.DENSE, floors.DENSE),
    "int8": ("int8", "int8", floors.INT8, floors.INT8),
    "int4 on load, groups of 64": ("int4 in 64", "int8", floors.INT4_64, floors.INT8),
    "GPTQ or AWQ, groups of 128": ("int4 in 128", "int8", floors.INT4, floors.INT8),
    "GPTQ with act-order": ("act-order", "int8", floors.ACT_ORDER, floors.INT8),
}
"""Name -> form of the layers, of the head, and both as `benchmarks.floors` counts them."""

CONTEXT, TOY_CONTEXT = 1024, 20
BATCHES, TOY_BATCHES = (1, 8, 32, 64, 128), (2,)
DRAFT_ROWS, TOY_DRAFT_ROWS = range(1, 10), range(2, 3)
PROMPTS, TOY_PROMPTS = (512, 4096), (20,)
GRAPHS, TOY_GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128), (2,)
SPARE_BLOCKS = 40
MAX_MEMORY = 0.6
"""The part of the memory beside the weights that keys and values may take."""
REPEATS, WARM_UPS = 10, 3


def run(settings: Settings, report: Report) -> None:
    torch.manual_seed(settings.seed)
    inputs = Inputs.of(settings)
    ceilings = read_ceilings(settings, inputs.device)
    names = list(MODELS)[1:2] if settings.is_toy else list(MODELS)
    for name in names:
        try:
            Bench(inputs, ceilings, report, name).measure()
        except torch.OutOfMemoryError as error:
            report.row("Forms that have no room on this card", model=name, error=str(error).partition("\n")[0][:120])
        gc.collect()
        if not settings.is_interpreted:
            torch.cuda.empty_cache()


@dataclasses.dataclass(frozen=True, slots=True)
class Decode:
    """A step of decode and what came out."""

    seconds: float
    logits: torch.Tensor
    is_repeated: bool
    """Whether a second run gave the same bits."""


class Bench:
    """One form of the model and what is measured of it."""

    def __init__(self, inputs: Inputs, ceilings: Ceilings, report: Report, name: str) -> None:
        self._inputs, self._ceilings, self._report, self._name = inputs, ceilings, report, name
        self._device = inputs.device
        self._config = SINGLE_LAYER if inputs.is_toy else QWEN2_7B
        form, head, self._form, self._head = MODELS[name]
        dtype = DTYPES[self._device.half_dtype]
        self._model = random_model(self._config, FORMS[form], FORMS[head], dtype, self._device, inputs.generator)
        self._context = TOY_CONTEXT if inputs.is_toy else CONTEXT
        self._batches = self._fitting(TOY_BATCHES if inputs.is_toy else BATCHES, dtype)
        sizes = [batch * self._context for batch in self._batches]
        self._prompts = TOY_PROMPTS if inputs.is_toy else PROMPTS
        num_tokens = max(*sizes, *self._prompts)
        self._num_blocks = num_tokens // 16 + SPARE_BLOCKS * max(self._batches)
        self._runner = make_runner(
            self._model, self._device, dtype, num_blocks=self._num_blocks, num_positions=max(8192, *self._prompts)
        )
        fill_caches(self._model)

    def measure(self) -> None:
        is_toy = self._inputs.is_toy
        plain = {batch: self._decode(batch) for batch in self._batches}
        self._capture()
        graphs = {batch: self._decode(batch) for batch in self._batches}
        for batch in self._batches:
            self._report_decode(batch, plain[batch], graphs[batch])
        self._drafts(TOY_DRAFT_ROWS if is_toy else DRAFT_ROWS)
        for size in self._prompts:  # writes where the sequences above read
            self._prompt(size)
        seconds = {batch: step.seconds for batch, step in graphs.items()}
        time_loop(
            self._report, self._name, self._runner, self._device, self._config, self._num_blocks, seconds, is_toy=is_toy
        )

    def _fitting(self, batches: tuple[int, ...], dtype: torch.dtype) -> list[int]:
        """The batches whose keys and values have room beside the weights: small cards have no room for all."""
        runner = ModelRunner(self._model, self._device)
        per_sequence = (self._context // runner.block_size + SPARE_BLOCKS) * runner.kv_bytes_per_block(dtype)
        free_bytes = MAX_MEMORY * self._device.free_memory_bytes()
        return [batch for batch in batches if batch * per_sequence <= free_bytes] or [batches[0]]

    def _capture(self) -> None:
        """Graphs for all that is measured from here on."""
        sizes = TOY_GRAPHS if self._inputs.is_toy else GRAPHS
        tokens = self._num_blocks * self._runner.block_size
        started = time.monotonic()
        self._runner.capture(GraphLimits(sizes=sizes, max_seq_len=2 * self._context, num_kv_tokens=tokens))
        description = self._runner.describe_graphs() or "this device has no graphs"
        print(f"{description} ({time.monotonic() - started:.1f} s)", flush=True)
        has_all = ", ".join(map(str, sizes)) in description
        self._report.check(f"graphs, {self._name}", [] if has_all else [description])

    def _decode(self, batch: int) -> Decode:
        """A step of so many sequences, which must give the same logits twice."""
        scheduled = decode_batch(batch, self._context, self._runner.block_size)
        first, second = (self._runner.execute(scheduled).logits.clone() for _ in range(2))
        return Decode(self._seconds(lambda: self._runner.execute(scheduled)), first, torch.equal(first, second))

    def _report_decode(self, batch: int, plain: Decode, graph: Decode) -> None:
        complaints = [] if bool(plain.logits.isfinite().all()) else ["logits are not finite"]
        complaints += [] if plain.is_repeated and graph.is_repeated else ["two runs differ: a race"]
        complaints += [] if torch.equal(plain.logits, graph.logits) else ["a graph gives other logits"]
        self._report.check(f"logits of {batch} sequences, {self._name}", complaints)
        shape = floors.ModelShape.of(self._config)
        num_bytes = floors.step_bytes(shape, self._form, self._head, context=self._context, batch=batch).total
        flops = floors.step_flops(shape, context=self._context, queries=1, num_rows=1) * batch
        self._report.row(
            f"Decode, {self._context} tokens known",
            model=self._name,
            sequences=batch,
            **{"ms without graphs": round(plain.seconds * 1000, 3)},
            ms=round(graph.seconds * 1000, 3),
            **{"tokens/s": round(batch / graph.seconds, 1), "floor/time": self._part(num_bytes, flops, graph.seconds)},
        )

    def _drafts(self, rows: range) -> None:
        """Steps of one sequence with a draft: what a drafted token costs."""
        columns = {}
        for count in rows:
            scheduled = decode_batch(1, self._context, self._runner.block_size, draft=[1] * (count - 1))
            seconds = self._seconds(functools.partial(self._runner.execute, scheduled))
            columns[f"{count}"] = round(seconds * 1000, 3)
        self._report.row("One sequence with a draft: ms by rows", model=self._name, **columns)

    def _prompt(self, size: int) -> None:
        batch = ScheduledBatch()
        sequence = make_sequence([number % 97 for number in range(size)], range(-(-size // self._runner.block_size)))
        batch.add(sequence, size)
        seconds = self._seconds(lambda: self._runner.execute(batch))
        shape = floors.ModelShape.of(self._config)
        flops = floors.step_flops(shape, context=size, queries=size, num_rows=1)
        self._report.row(
            "Prompts",
            model=self._name,
            tokens=size,
            ms=round(seconds * 1000, 2),
            **{"tokens/s": round(size / seconds), "floor/time": self._part(0, flops, seconds)},
        )

    def _part(self, num_bytes: float, flops: float, seconds: float) -> float:
        return round(self._ceilings.floor_s(num_bytes, flops) / seconds, 3)

    def _seconds(self, call: Callable[[], Any]) -> float:
        repeats, warm_ups = (1, 0) if self._inputs.is_toy else (REPEATS, WARM_UPS)
        return host_seconds(self._device, call, repeats=repeats, warm_ups=warm_ups)


def fill_caches(model: CausalLM) -> None:
    """Random keys and values in all layers, where a new cache has zeros; the protocol has no word for that."""
    decoder: Any = model
    for cache in decoder._caches:
        cache.keys.normal_()
        cache.values.normal_()


def decode_batch(num_sequences: int, context: int, block_size: int, draft: list[int] | None = None) -> ScheduledBatch:
    """Sequences that know `context` tokens, of which the last one is computed.

    Block 0 is none of theirs: capturing a graph writes there.
    """
    batch = ScheduledBatch()
    num_blocks = -(-(context + len(draft or [])) // block_size)
    for index in range(num_sequences):
        first = 1 + index * num_blocks
        sequence = make_sequence([number % 97 for number in range(context)], range(first, first + num_blocks))
        sequence.num_computed_tokens = context - 1
        batch.add(sequence, 1, draft)
    return batch


def make_sequence(token_ids: list[int], blocks: range) -> Sequence:
    request = GenerationRequest(request_id="any", prompt_token_ids=token_ids, max_new_tokens=1)
    sequence = Sequence(request, arrival_time=0.0)
    sequence.block_table = array("i", blocks)
    return sequence
