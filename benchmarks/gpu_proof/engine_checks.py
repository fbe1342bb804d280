"""The whole engine on this card with a tiny model: its greedy ids against those of plain torch on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch

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
from benchmarks.gpu_proof.report import Report
from benchmarks.gpu_proof.weights import FORMS, Form
from engine.device import Device
from engine.graphs import GraphLimits
from engine.scheduling.sequence import Sequence

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


def check_engine(inputs: Inputs, report: Report) -> None:
    config = SINGLE_LAYER if inputs.is_toy else TINY
    sizes, num_new = ([1, 20], 3) if inputs.is_toy else ([1, 17, 40, 300], 12)
    prompts = [inputs.integers(TINY["vocab_size"], size).tolist() for size in sizes]
    for form_name, head_name in list(MODELS.items())[:: 3 if inputs.is_toy else 1]:
        form, head = FORMS[form_name], FORMS[head_name]
        expected = _ids(inputs, reference_device(), config, form, head, prompts, num_new)
        ids = _ids(inputs, inputs.device, config, form, head, prompts, num_new)
        report.check(f"ids of a tiny model, {form_name}", _difference(ids, expected))
    dense = FORMS["dense"]
    expected = _ids(inputs, reference_device(), config, dense, dense, prompts, num_new)
    known = [prompt + ids for prompt, ids in zip(prompts, expected, strict=True)]
    ways: dict[str, dict[str, Any]] = {
        "in chunks": {"max_batch_tokens": 24},
        "with drafts": {"drafter": KnownDrafts(known)},
    }
    ways["with graphs, steps overlapping"] = {"graph_sizes": (1, 4, 8), "is_overlapped": True}
    if not inputs.is_toy:
        ways["with graphs"] = {"graph_sizes": (1, 4, 8)}
        ways["steps overlapping"] = {"is_overlapped": True}
        ways["with preemption"] = {"num_blocks": 23}
        ways["with graphs and drafts"] = {"graph_sizes": (1, 4, 16), "drafter": KnownDrafts(known)}
    for way, options in ways.items():
        ids = _ids(inputs, inputs.device, config, dense, dense, prompts, num_new, **options)
        report.check(f"ids of a tiny model, {way}", _difference(ids, expected))
    if not inputs.is_toy:
        windows = TINY | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
        ids, expected = (
            _ids(inputs, device, windows, dense, dense, prompts, num_new)
            for device in (inputs.device, reference_device())
        )
        report.check("ids of a tiny model, with a window", _difference(ids, expected))


def _ids(
    inputs: Inputs,
    device: Device,
    config: dict[str, Any],
    form: Form,
    head: Form,
    prompts: list[list[int]],
    num_new: int,
    *,
    num_blocks: int = NUM_BLOCKS,
    max_batch_tokens: int = 512,
    drafter: Any = None,
    graph_sizes: SequenceOf[int] = (),
    is_overlapped: bool = False,
) -> list[list[int]]:
    """The ids that the engine makes in float32; the weights are the same on every device."""
    generator = torch.Generator().manual_seed(inputs.generator.initial_seed() % 2**31)
    model = random_model(config, form, head, torch.float32, device, generator)
    runner = make_runner(model, device, torch.float32, num_blocks=num_blocks, num_positions=1024)
    runner.capture(GraphLimits(sizes=graph_sizes, max_seq_len=512, num_kv_tokens=num_blocks * runner.block_size))
    core = make_core(
        runner,
        device,
        config["vocab_size"],
        num_blocks=num_blocks,
        max_batch_tokens=max_batch_tokens,
        drafter=drafter,
        is_overlapped=is_overlapped,
    )
    return run_requests(core, [greedy_request(str(number), prompt, num_new) for number, prompt in enumerate(prompts)])


def _difference(ids: list[list[int]], expected: list[list[int]]) -> list[str]:
    return [
        f"prompt {number}: {row} instead of {others}"
        for number, (row, others) in enumerate(zip(ids, expected, strict=True))
        if row != others
    ]
