"""A step's numbers reach the kernels in one array whose places stay."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engine.link.messages import GenerationRequest
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.sequence import Sequence
from engine.step_buffers import SECTIONS, StepBuffers, StepTensors
from engine.step_inputs import StepInputs, step_inputs
from quant.kernels.transfer import is_pinning, to_device

CPU, STAND_IN = torch.device("cpu"), torch.device("meta")
BLOCK_SIZE = 16


def make_inputs(num_seqs: int, width: int = 3, num_scored: int = 0) -> StepInputs:
    """Two tokens for every sequence."""
    return StepInputs(
        input_ids=[1000 + token for token in range(2 * num_seqs)],
        query_start_loc=[2 * index for index in range(num_seqs + 1)],
        seq_lens=[2 + index % BLOCK_SIZE for index in range(num_seqs)],
        block_table=np.arange(width * num_seqs, dtype=np.int32).tobytes(),
        prompt_lens=[1] * num_seqs,
        logits_indices=[2 * index + 1 for index in range(num_seqs)],
        scored_indices=list(range(num_scored)),
        scored_token_ids=[4000 + index for index in range(num_scored)],
    )


def make_items(num_items: int) -> npt.NDArray[np.int32]:
    return np.arange(4 * num_items, dtype=np.int32).reshape(num_items, 4)


def tensors_of(step: StepTensors) -> dict[str, torch.Tensor]:
    both = {**vars_of(step), **vars_of(step.attention)}
    return {name: both[name] for name in SECTIONS if not name.startswith("unknown_")}


def vars_of(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def addresses(step: StepTensors) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors_of(step).items()}


@st.composite
def batches(draw: st.DrawFn) -> ScheduledBatch:
    """Prompts, chunks of prompts and decoding sequences with drafts, some of which want their prompt scored."""
    batch = ScheduledBatch()
    for number in range(draw(st.integers(1, 9))):
        num_tokens = draw(st.integers(1, 100))
        token_ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=num_tokens, max_size=num_tokens))
        num_prompt_tokens = draw(st.integers(1, num_tokens))
        request = GenerationRequest(
            request_id=f"request {number}",
            prompt_token_ids=token_ids[:num_prompt_tokens],
            max_new_tokens=200,
            has_prompt_logprobs=draw(st.booleans()),
        )
        sequence = Sequence(request, arrival_time=0.0)
        sequence.token_ids = token_ids
        sequence.num_computed_tokens = draw(st.integers(0, num_tokens - 1))
        num_known = min(sequence.num_computed_tokens, num_prompt_tokens - 1)
        sequence.prompt_logprobs = [-1.0] * draw(st.integers(num_known, num_prompt_tokens - 1))
        count = draw(st.integers(1, sequence.num_uncomputed_tokens))
        drafts = st.lists(st.integers(0, 9), max_size=5) if count == sequence.num_uncomputed_tokens else st.just([])
        draft = draw(drafts)
        num_blocks = -(-(num_tokens + len(draft)) // BLOCK_SIZE) + draw(st.integers(0, 2))
        blocks = draw(st.lists(st.integers(0, 2**31 - 1), min_size=num_blocks, max_size=num_blocks))
        sequence.block_table = array("i", blocks)
        batch.add(sequence, count, draft)
    return batch


def listed(batch: ScheduledBatch) -> dict[str, list[Any]]:
    """The numbers of a batch, token by token: the reference implementation."""
    numbers: dict[str, list[Any]] = {
        name: [] for name in SECTIONS if name != "work_items" and not name.startswith("unknown_")
    }
    numbers["query_start_loc"].append(0)
    width = max(len(scheduled.sequence.block_table) for scheduled in batch.scheduled)
    for scheduled in batch.scheduled:
        sequence, num_left = scheduled.sequence, scheduled.num_scored_tokens
        first, num_known = sequence.num_computed_tokens, len(sequence.prompt_logprobs)
        known = first + scheduled.num_tokens
        for position, token_id in enumerate([*sequence.token_ids[:known], *scheduled.draft]):
            row = len(numbers["input_ids"])
            if num_left and position == num_known:
                numbers["scored_indices"].append(row)
                numbers["scored_token_ids"].append(sequence.token_ids[position + 1])
                num_known, num_left = num_known + 1, num_left - 1
            if position < first:
                continue
            numbers["input_ids"].append(token_id)
            numbers["positions"].append(position)
            block = sequence.block_table[position // BLOCK_SIZE]
            numbers["slot_mapping"].append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            if scheduled.is_completing and position >= known - 1:
                numbers["logits_indices"].append(row)
        numbers["query_start_loc"].append(len(numbers["input_ids"]))
        numbers["seq_lens"].append(known + len(scheduled.draft))
        blocks = list(sequence.block_table)
        numbers["block_table"].append(blocks + [0] * (width - len(blocks)))
    return numbers


@given(st.lists(batches(), min_size=1, max_size=3))
def test_every_number_arrives(steps: list[ScheduledBatch]) -> None:
    """On other ranks too, which get the numbers as a message; the buffers have served other steps before."""
    buffers = StepBuffers(CPU, BLOCK_SIZE)
    for batch in steps:
        sent = step_inputs(batch)
        inputs = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=StepInputs)
        assert inputs == sent
        assert inputs.prompt_lens == [scheduled.sequence.num_prompt_tokens for scheduled in batch.scheduled]
        items = make_items(len(batch.scheduled))
        step = buffers.fill(inputs, items)
        expected = {**listed(batch), "work_items": items.tolist()}
        for name, tensor in tensors_of(step).items():
            assert tensor.dtype == SECTIONS[name]
            assert tensor.is_contiguous()
            assert tensor.tolist() == expected[name], name
        assert step.attention.host_query_start_loc == expected["query_start_loc"]
        assert step.attention.host_seq_lens == expected["seq_lens"]


def test_places_stay_until_a_section_is_too_small() -> None:
    buffers = StepBuffers(CPU, BLOCK_SIZE)
    first = addresses(buffers.fill(make_inputs(4), make_items(4)))
    assert addresses(buffers.fill(make_inputs(4), make_items(5))) == first
    assert addresses(buffers.fill(make_inputs(1, width=9), make_items(1))) == first
    buffers.fill(make_inputs(100), make_items(100))  # 200 tokens and 400 numbers of items, in sections of 64
    grown = addresses(buffers.fill(make_inputs(4), make_items(4)))
    assert grown != first
    assert addresses(buffers.fill(make_inputs(120), make_items(120))) == grown, "sections grow by doubling"
    assert addresses(buffers.fill(make_inputs(1), make_items(1))) == grown, "sections never shrink"


class Copies(TorchDispatchMode):
    """Counts the operations that copy memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy" in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "copies"), [(CPU, []), (STAND_IN, ["aten::copy_"])], ids=["cpu", "stand-in"])
def test_a_step_takes_one_copy_to_another_memory_and_none_to_the_same(device: torch.device, copies: list[str]) -> None:
    buffers = StepBuffers(device, BLOCK_SIZE)
    with Copies() as mode:
        step = buffers.fill(make_inputs(3, num_scored=2), make_items(3))
    assert mode.names == copies
    assert {tensor.device for tensor in tensors_of(step).values()} == {device}


@pytest.fixture
def drivers_asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Grows by one whenever torch is asked whether there is an accelerator: there is none."""
    asked: list[str] = []

    def is_available() -> bool:
        asked.append("is_available")
        return False

    monkeypatch.setattr(torch.accelerator, "is_available", is_available)
    is_pinning.cache_clear()
    yield asked
    is_pinning.cache_clear()


def test_one_rule_says_whether_memory_is_pinned(drivers_asked_for: list[str]) -> None:
    """It costs a call of the driver, which no copy of a step repeats."""
    buffers = StepBuffers(STAND_IN, BLOCK_SIZE)
    buffers.fill(make_inputs(200), make_items(300))
    to_device(np.zeros(3, np.int32), STAND_IN)
    assert len(drivers_asked_for) == 1
