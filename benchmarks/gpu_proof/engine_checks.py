"""The whole engine on this card with a tiny model: its greedy ids against those of plain torch on the CPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

from benchmarks.gpu_proof.checks import Check
from benchmarks.gpu_proof.inputs import Inputs
from benchmarks.gpu_proof.models import (
    SINGLE_LAYER,
    TINY,
    greedy_request,
    make_core,
    make_runner,
    random_model,
    reference_device,
    run_requests,
)
from benchmarks.gpu_proof.weights import FORMS
from engine.device import Device
from engine.graphs import GraphLimits
from engine.scheduling.sequence import Sequence
from engine.scheduling.speculate import Drafter

NUM_BLOCKS = 64
MODELS = {"dense": "dense", "int8": "int8", "int4 in 32": "int8", "act-order": "dense"}
"""Form of the layers -> form of the head."""


@dataclasses.dataclass
class KnownDrafts:
    """A `Drafter` that knows what comes, and is wrong in every other step."""

    token_ids: SequenceOf[SequenceOf[int]]
    """Prompt and output of each request, by its number."""
    num_drafts: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def draft(self, sequences: SequenceOf[Sequence], rooms: SequenceOf[int], budget: int) -> list[list[int]]:
        drafts = []
        for sequence, room in zip(sequences, rooms, strict=True):
            known = self.token_ids[int(sequence.request.request_id)]
            draft = list(known[sequence.num_tokens : sequence.num_tokens + min(room, 3)])
            if self.num_drafts % 2 and draft:
                draft[-1] = (draft[-1] + 1) % TINY["vocab_size"]
            self.num_drafts += 1
            drafts.append(draft)
        return drafts

    def observe(self, sequence: Sequence, draft: SequenceOf[int], new_token_ids: SequenceOf[int]) -> None:
        self.num_drafted += len(draft)

    def forget(self, sequence: Sequence) -> None:
        pass


def engine_checks(*, is_toy: bool) -> list[Check]:
    """Every form of weights, and every way through the engine."""
    config = SINGLE_LAYER if is_toy else TINY
    runs = [Run(config, form, head) for form, head in list(MODELS.items())[:: 3 if is_toy else 1]]
    names = [f"ids of a tiny model, {run.form}" for run in runs]
    ways = list(WAYS.items())[: 2 if is_toy else None]
    runs += [dataclasses.replace(runs[0], **options) for _, options in ways]
    names += [f"ids of a tiny model, {way}" for way, _ in ways]
    if not is_toy:
        window = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
        runs.append(Run(config | window, "dense", "dense"))
        names.append("ids of a tiny model, with a window")
    else:  # one graph, as each is run when it is captured
        runs = [dataclasses.replace(run, graph_sizes=run.graph_sizes[1:2]) for run in runs]
    return [Check(name, functools.partial(_complaints, run=run)) for name, run in zip(names, runs, strict=True)]


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One way of running requests through an engine."""

    config: dict[str, Any]
    form: str
    head: str
    num_blocks: int = NUM_BLOCKS
    max_batch_tokens: int = 512
    has_drafts: bool = False
    graph_sizes: SequenceOf[int] = ()
    is_overlapped: bool = False


WAYS: dict[str, dict[str, Any]] = {
    "with drafts": {"has_drafts": True},
    "with graphs, steps overlapping": {"graph_sizes": (1, 4, 8), "is_overlapped": True},
    "with graphs": {"graph_sizes": (1, 4, 8)},
    "with graphs and drafts": {"graph_sizes": (1, 4, 16), "has_drafts": True},
    "in chunks": {"max_batch_tokens": 24},
    "steps overlapping": {"is_overlapped": True},
    "with preemption": {"num_blocks": 23},
}
"""Name -> what differs from a plain run."""


def _complaints(inputs: Inputs, run: Run) -> list[str]:
    """The ids on the card against those of a plain run in plain torch."""
    sizes, num_new = ([1, 20], 3) if inputs.is_toy else ([1, 17, 40, 300], 12)
    prompts = [inputs.integers(run.config["vocab_size"], size).tolist() for size in sizes]
    plain = Run(run.config, run.form, run.head)
    expected = _ids(inputs, reference_device(), plain, prompts, num_new, None)
    known = [prompt + ids for prompt, ids in zip(prompts, expected, strict=True)]
    drafter = KnownDrafts(known) if run.has_drafts else None
    ids = _ids(inputs, inputs.device, run, prompts, num_new, drafter)
    return [
        f"prompt {number}: {row} instead of {others}"
        for number, (row, others) in enumerate(zip(ids, expected, strict=True))
        if row != others
    ]


def _ids(
    inputs: Inputs, device: Device, run: Run, prompts: list[list[int]], num_new: int, drafter: Drafter | None
) -> list[list[int]]:
    """The ids that the engine makes in float32; the weights are the same on every device."""
    generator = torch.Generator().manual_seed(inputs.generator.initial_seed())
    model = random_model(run.config, FORMS[run.form], FORMS[run.head], torch.float32, device, generator)
    runner = make_runner(model, device, torch.float32, num_blocks=run.num_blocks, num_positions=1024)
    runner.capture(
        GraphLimits(sizes=run.graph_sizes, max_seq_len=512, num_kv_tokens=run.num_blocks * runner.block_size)
    )
    core = make_core(
        runner,
        device,
        run.config["vocab_size"],
        num_blocks=run.num_blocks,
        max_batch_tokens=run.max_batch_tokens,
        drafter=drafter,
        is_overlapped=run.is_overlapped,
    )
    return run_requests(core, [greedy_request(str(number), prompt, num_new) for number, prompt in enumerate(prompts)])
